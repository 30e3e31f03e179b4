"""The leading singular vectors of a large matrix without the others: searched for in few dims, proven in all.

The eigenvectors of the Gram matrix G = W^T W take most of their time to bring G to tridiagonal form. Where few are
wanted, block Lanczos needs but products of G with some columns, until the space that they span holds the leading
vectors. That is a proposal only, of float32 if so asked. Its energy is measured with W itself, in float64, and bounds
that of the best space:

    best - found <= sum_i |r_i|^2 / max(t_i - t_c, t_c - b),

for k >= c orthonormal Ritz vectors x_i with values t_1 >= ... >= t_k, residuals r_i = G x_i - t_i x_i, and a b < t_c
above all eigenvalues of B, which is G on what is orthogonal to the x_i.

Proof. The c largest eigenvalues of G sum up to at most c s + tr Z for every s and every Z >= 0 with Z + s I >= G. Take
s = t_c and for each x_i one of two parts of Z. Either the square of (t_i - s)^1/2 x_i + (t_i - s)^-1/2 r_i, of trace
t_i - s + |r_i|^2 / (t_i - s). Or, for all the others together, the positive part of diag(t_i - s) + R^T (s I - B)^-1 R,
where R has their residuals; its trace is at most the sum of (t_i - s)_+ + |r_i|^2 / (s - b).
"""

from __future__ import annotations

import torch

TOLERANCE = 1e-6
"""Energy that may be missed, as a part of what the best space leaves out."""

MARGIN = 0.5
"""Part of the tolerance at which the search ends; the rest is for its rounding, which it does not see itself."""

BLOCK = 1 / 128
"""Columns that G is multiplied by at once, of all: fewer need a smaller space, more are faster products."""

SMALLEST_SIDE = 1024
"""The smaller side of W from which the search pays."""

LARGEST_RANK, LARGEST_SPACE = 1 / 8, 3 / 5
"""Parts of that side: up to which rank the search pays, and how far its space may grow."""


def leading_singular_vectors(
    w: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The right singular vectors V_c of the `rank` largest singular values, largest first, and W V_c.

    w: float64 [n, h], n >= h. dtype: of the search; float32 is faster, but finds nothing good enough where the largest
    eigenvalues of G are thousands of times the c-th. The span of V_c is within TOLERANCE of the best; singular vectors
    of nearly equal values may be mixed, beyond the last of them too.

    Returns (V_c [h, c], W V_c [n, c]), float64; None where a search would not pay or nothing was proven.
    """
    h = w.shape[1]
    # On a GPU all eigenvectors take a tenth of a second.
    if w.device.type != "cpu" or h < SMALLEST_SIDE or rank > LARGEST_RANK * h:
        return None
    scale = torch.linalg.vector_norm(w)
    if scale == 0:
        return None
    gram = _gram(w.to(dtype) / scale)  # of trace 1
    basis, projected = gram.new_empty(h, 0), gram.new_empty(0, 0)
    width = int(BLOCK * h)
    block = torch.linalg.qr(torch.randn(h, width, dtype=dtype, generator=torch.Generator().manual_seed(0)))[0]
    size = max(4, 5 * rank // 2 // width) * width
    while size <= LARGEST_SPACE * h:
        basis, projected, block, coupling = _extend(gram, basis, projected, block, size)
        values, vectors = (t.flip(-1) for t in torch.linalg.eigh(projected))
        residuals = (coupling @ vectors[-width:]).square().sum(0)
        # At most, of the products in G and in a Cholesky factor, whose errors go with the traces of G and of b I.
        rounding = torch.finfo(dtype).eps * (1 + h * float(values[rank - 1]))
        # b between t_c and the first value left out, which may still grow: where it is most certain.
        cuts = {
            kept: float(values[rank - 1] + values[kept]) / 2 + rounding
            for kept in range(rank, min(5 * rank // 4, size - 1) + 1)
        }
        missed, kept = min((_missed(values[:k], residuals[:k], rank, b), k) for k, b in cuts.items())
        if missed < MARGIN * TOLERANCE:
            return _prove(w, scale, gram, basis @ vectors[:, :kept], rank, cuts[kept], rounding)
        size = 27 * size // 20 // width * width
    return None


def _gram(w: torch.Tensor) -> torch.Tensor:
    """w^T w, with one product for two blocks that mirror each other."""
    h = w.shape[1]
    if h < SMALLEST_SIDE:
        return w.T @ w
    left, right = w[:, : h // 2], w[:, h // 2 :]
    corner = left.T @ right
    return torch.cat((torch.cat((_gram(left), corner), 1), torch.cat((corner.T, _gram(right)), 1)))


def _extend(
    gram: torch.Tensor, basis: torch.Tensor, projected: torch.Tensor, block: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block Lanczos with full orthogonalisation, from the space that there is on to `size` dims.

    Returns (its basis Q [h, size], Q^T G Q, the next block [h, width], what it adds to G times the last one).
    """
    old, width = basis.shape[1], block.shape[1]
    q, t = gram.new_empty(len(gram), size), gram.new_zeros(size, size)
    q[:, :old], t[:old, :old] = basis, projected
    coupling = gram.new_empty(0, 0)
    for start in range(old, size, width):
        end = start + width
        q[:, start:end] = block
        rest = gram @ block
        for _ in range(2):  # After one, rounding brings back what was found before.
            part = q[:, :end].T @ rest
            rest -= q[:, :end] @ part
            t[:end, start:end] += part
        t[start:end, :start] = t[:start, start:end].T
        block, coupling = torch.linalg.qr(rest)
    return q, t, block, coupling


def _missed(values: torch.Tensor, residuals: torch.Tensor, rank: int, b: float) -> float:
    """The right hand side of the inequality, as a part of what the best space leaves out; residuals: |r_i|^2, of a G of
    trace 1. Infinite if b is not below t_c, or nothing is left out."""
    edge, left_out = float(values[rank - 1]), 1 - float(values[:rank].sum())
    if b >= edge or left_out <= 0:
        return float("inf")
    return float((residuals / (values - edge).clamp_min(edge - b)).sum()) / left_out


def _prove(
    w: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor, basis: torch.Tensor, rank: int, b: float, rounding: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The Ritz vectors of W in the span of the basis, and W times them, if they are proven to be good enough."""
    x = torch.linalg.qr(basis.to(torch.float64))[0]
    image = w @ x / scale
    values, turn = (t.flip(-1) for t in torch.linalg.eigh(image.T @ image))
    x, image = x @ turn, image @ turn
    residuals = (w.T @ image / scale - x * values).square().sum(0)
    if not _missed(values, residuals, rank, b) < TOLERANCE:
        return None
    # All eigenvalues of G - X T X^T are below b if b I minus it has a Cholesky factor.
    low = x.to(gram.dtype)
    rest = torch.addmm(gram, low * values.to(gram.dtype), low.T, alpha=-1).neg_()
    rest.diagonal().add_(b - rounding)
    return None if torch.linalg.cholesky_ex(rest).info else (x[:, :rank], image[:, :rank] * scale)
