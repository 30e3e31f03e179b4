"""Low-rank factorisations: the best rank-c product `up @ down` of a weight matrix (paper section 3.2), in a metric.

Everything is computed in float64 through the eigenvectors of the smaller Gram matrix, which is faster than a singular
value decomposition of the stacked matrix and exact at full rank: the basis is orthogonal whatever the spectrum. Of a
large matrix's low rank the singular vectors may instead come from `leading_subspace`, which proves that they lose next
to nothing.
"""

from __future__ import annotations

import torch

from mha2mla_megatron.calibration.metric import IDENTITY, Metric
from mha2mla_megatron.leading_subspace import leading_singular_vectors

SMALL_GAIN = 1e-3
"""Part of the loss that a turn of `factorise_nested` must gain for another one."""


def factorise(
    weight: torch.Tensor, rank: int, singular_values: str, metric: Metric = IDENTITY
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors whose product W' minimises tr(Y (W - W') C (W - W')^T) among all of that rank.

    With Y = R R^T and C = L L^T it is the truncated singular value decomposition U_c S_c V_c^T of R^T W L, taken back:
    up = R^-T U_c S_c, down = V_c^T L^-1.

    weight: [n, h], any float dtype; 1 <= rank <= min(n, h).
    singular_values: `up` leaves S_c with the first factor, `sqrt` puts S_c^1/2 into each.

    Returns (up [n, c], down [c, h]), float64.
    """
    w = metric.whiten(weight.to(torch.float64))
    n, h = w.shape
    # What a metric stretches spans more orders of magnitude than float32 has digits for.
    search = torch.float32 if metric.is_identity else torch.float64
    basis, image = _singular_vectors(w if n > h else w.T, rank, search)
    s = image.norm(dim=0)
    up, down = (image, basis.T) if n > h else (basis * s, (image / _nonzero(s)).T)
    if singular_values == "sqrt":
        root = s.sqrt()
        up, down = up / _nonzero(root), down * root[:, None]
    return metric.undo_rows(up), metric.undo_columns(down)


def factorise_nested(
    weight: torch.Tensor, keys: int, rank: int, key_rank: int, singular_values: str, metric: Metric = IDENTITY
) -> tuple[torch.Tensor, torch.Tensor]:
    """`factorise`, but for the first `keys` rows only the first `key_rank` columns of the latent may be used.

    With the other rows first, R^T W L = [w_2; w_1], where w_1 has but keys in it: whatever else an error of the keys
    costs, the values' own can make up for it. Of an orthonormal basis [A | B] of the latent, A of key_rank vectors,
    the objective is minimised by the largest |w A|^2 + |w_2 B|^2. The best A within a given space of [A | B], A for a
    given B and B for a given A are eigenvectors each; the first starts from the best space of all, the others follow in
    turn until they gain next to nothing, which is soon. It is a local optimum.

    weight: [n, h], any float dtype; 1 <= key_rank <= rank <= min(n, h), key_rank <= keys < n.

    Returns (up [n, c], whose upper right block is zero, down [c, h]), float64.
    """
    n = len(weight)
    values_first = torch.arange(n, device=weight.device).roll(-keys)
    metric = metric.select(values_first)
    w = metric.whiten(weight.to(torch.float64)[values_first])
    values = w[: n - keys]
    all_rows, without_keys = w.T @ w, values.T @ values
    space = _top_eigenvectors(all_rows, rank)
    turn = _top_eigenvectors(space.T @ (all_rows - without_keys) @ space, rank)
    a, b = space @ turn[:, :key_rank], space @ turn[:, key_rank:]
    total = all_rows.trace()

    def loss() -> torch.Tensor:
        return total - (w @ a).square().sum() - (values @ b).square().sum()

    before, after = None, loss()
    while key_rank < rank and (before is None or after < (1 - SMALL_GAIN) * before):
        b = _top_eigenvectors(_without(without_keys, a), rank - key_rank)
        a = _top_eigenvectors(_without(all_rows, b), key_rank)
        before, after = after, loss()
    down = torch.cat((a, b), 1).T
    up = w @ down.T
    up[n - keys :, key_rank:] = 0
    if singular_values == "sqrt":
        root = up.norm(dim=0).sqrt()
        up, down = up / _nonzero(root), down * root[:, None]
    return metric.undo_rows(up).roll(keys, 0), metric.undo_columns(down)


def truncation_losses(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The smallest value of the objective at each rank from 0 to min(n, h): float64 [min(n, h) + 1], not increasing."""
    w = metric.whiten(weight.to(torch.float64))
    gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending
    return torch.cat((energies.new_zeros(1), energies.cumsum(0))).flip(0)


def _singular_vectors(w: torch.Tensor, count: int, search: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Right singular vectors V_c of the `count` largest singular values, largest first, signs fixed: [h, count], and
    W V_c. w: float64 [n, h], n >= h. search: precision of the search, where there is one."""
    found = leading_singular_vectors(w, count, search)
    if found is None:
        vectors = _top_eigenvectors(w.T @ w, count)
        return vectors, w @ vectors
    vectors, image = found
    signs = _signs(vectors)
    return vectors * signs, image * signs


def _top_eigenvectors(gram: torch.Tensor, count: int) -> torch.Tensor:
    """Eigenvectors of the `count` largest eigenvalues, largest first: [n, count], signs fixed."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    return vectors * _signs(vectors)


def _signs(vectors: torch.Tensor) -> torch.Tensor:
    """The sign of an eigenvector is arbitrary. Times these [1, count] the component of largest magnitude is positive,
    so that the result does not depend on the linear algebra library."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)


def _without(gram: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of what is orthogonal to the basis, (I - Q Q^T) G (I - Q Q^T), with the basis itself below all:
    else it would be among the eigenvectors where few eigenvalues are left."""
    below = torch.where(gram.trace() > 0, gram.trace(), 1.0)
    gram = gram - basis @ (basis.T @ gram)
    return gram - (gram @ basis + below * basis) @ basis.T


def _nonzero(s: torch.Tensor) -> torch.Tensor:
    """s with 1 where it vanishes, so that a rank-deficient weight gives zero factors and not 0/0."""
    return torch.where(s > 0, s, torch.ones_like(s))
