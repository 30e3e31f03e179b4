"""One rotated key for all heads: which combinations of the heads' keys to rotate, and what is left for each head.

A pair of dims is a complex number that turns with its frequency; so pairs of one frequency, of whatever heads, may be
mixed by complex numbers before the rotation or after it. Of the keys k_g of G heads at one frequency, a rotated key k'
that all heads read is such a mixture, k' = sum_g reads_g k_g, and head g finds its part of itself in it, k_g ~ writes_g
k'. Which mixtures matter most is a principal component analysis of each frequency over the heads, with each head's keys
scaled so that their energy is the price of not rotating them (`pairs.pair_losses`): eigenvalues then add up to the
prices, and those kept are the largest of all frequencies together. (TransMLA, arXiv 2502.07864, mixes the heads' planes
too, by their energy alone, and keeps one mixture of each frequency.)

What the kept mixtures do not explain of a head's keys, d dims of it, is not rotated; queries of these dims get the
query map as for pairs of a head's own. A head has d - r such dims: those that carry most of the products with its
queries.

Shape letters: h inputs, H query heads, G key/value heads, d head dim, P = d/2 pairs, r rotary dims, n = r/2, N = G P.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Directions:
    """Mixtures of the heads' keys at one frequency each, those whose rotation matters most first."""

    pairs: torch.Tensor
    """Their frequencies, int64 [N]."""

    losses: torch.Tensor
    """The price of not rotating each, float64 [N]; all together that of rotating nothing."""

    reads: torch.Tensor
    """complex128 [N, G]: the mixture is sum_g reads_g k_g."""

    writes: torch.Tensor
    """complex128 [N, G], of norm 1: head g's key is writes_g times the mixture, and what is uncorrelated to it."""


@dataclass(frozen=True)
class SharedKeys:
    """A layer's keys, split."""

    pairs: torch.Tensor
    """int64 [n], ascending; a frequency may occur several times."""

    rotated: torch.Tensor
    """[r, ...], half-split."""

    left: torch.Tensor
    """[G, d, ...]: what the rotated part does not explain of each head's keys."""


def shared_directions(keys: torch.Tensor, input_moment: torch.Tensor, losses: torch.Tensor) -> Directions:
    """keys: weights [G, d, h]; input_moment: E[x x^T], [h, h]; losses: [G, P], of each head's own pairs. Float64."""
    k = _complex(keys)
    second = torch.einsum("gph,kph->pgk", k @ input_moment.to(k.dtype), k.conj())  # E[k_g conj(k_k)]
    energy = second.diagonal(dim1=1, dim2=2).real  # [P, G]
    scale = torch.where(energy > 0, (losses.T / energy.clamp_min(1e-300)).clamp_min(0).sqrt(), 0.0)
    values, vectors = torch.linalg.eigh(scale[:, :, None] * second * scale[:, None, :])  # [P, G], [P, G, G]
    reads = (vectors.conj() * scale[:, :, None]).transpose(1, 2)  # [P, N / P, G]
    writes = torch.einsum("pgk,pnk->png", second, reads.conj())
    size = writes.norm(dim=-1, keepdim=True)
    # Of a mixture's size and phase nothing depends: writes get norm 1, and a largest entry that is real. So with one
    # head the mixture is that head's key.
    largest = writes.gather(-1, writes.abs().argmax(-1, keepdim=True))
    factor = largest / largest.abs().clamp_min(1e-300)
    energy_of_mixture = values.clamp_min(1e-300)[..., None]
    reads = reads * factor * size / energy_of_mixture
    writes = writes / (factor * size.clamp_min(1e-300))
    order = torch.sort(values.flatten(), descending=True, stable=True).indices
    pairs = torch.arange(len(values), device=order.device).repeat_interleave(values.shape[1])
    return Directions(
        pairs[order], values.flatten()[order].clamp_min(0), reads.flatten(0, 1)[order], writes.flatten(0, 1)[order]
    )


def led_by(directions: Directions, pairs: torch.Tensor) -> Directions:
    """The same, but first the one that matters most of each of these frequencies, int64 [n], whatever the others are
    worth."""
    first = torch.stack([(directions.pairs == pair).nonzero()[0, 0] for pair in pairs])
    others = torch.ones_like(directions.pairs, dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    order = torch.cat((first, others))
    return Directions(*(getattr(directions, field.name)[order] for field in dataclasses.fields(directions)))


def split_keys(rows: torch.Tensor, directions: Directions, qk_rope_head_dim: int) -> SharedKeys:
    """rows: weights or biases of all key heads, [G, d, ...]."""
    kept = _kept(directions, qk_rope_head_dim)
    k, pairs = _complex(rows), directions.pairs[kept]
    reads, writes = (_broadcast(x[kept].T, k) for x in (directions.reads, directions.writes))  # [G, n, ...]
    mixtures = (reads * k[:, pairs]).sum(0)
    left = k.index_add(1, pairs, -writes * mixtures)
    return SharedKeys(pairs, _real(mixtures), _real(left, dim=1))


def rotated_queries(rows: torch.Tensor, directions: Directions, qk_rope_head_dim: int) -> torch.Tensor:
    """The queries that go with the rotated part. rows: of all query heads [H, d, ...]; returns [H, r, ...]."""
    kept = _kept(directions, qk_rope_head_dim)
    q = _complex(rows)[:, directions.pairs[kept]]
    writes = directions.writes[kept].T  # [G, n]
    return _real(_broadcast(writes.repeat_interleave(len(q) // len(writes), 0).conj(), q) * q, dim=1)


def best_dims(
    queries: torch.Tensor, keys: torch.Tensor, input_moment: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` dims of each key/value head that carry most of q^T k, as maps (for queries, for keys), each
    [G, count, d]: the least E[(q^T k - q'^T k')^2] over independent q and k.

    queries: weights [H, d, h]; keys: [G, d, h]; input_moment: E[x x^T]. Float64.
    """
    groups, d, _ = keys.shape
    if count == d:
        same = torch.eye(d, dtype=keys.dtype, device=keys.device).repeat(groups, 1, 1)
        return same, same
    query_root, _ = _roots((queries @ input_moment @ queries.mT).unflatten(0, (groups, -1)).sum(1))
    key_root, key_inverse = _roots(keys @ input_moment @ keys.mT)
    # With q = Lq q~ and k = Lk k~, both white, q^T k = q~^T (Lq^T Lk) k~: the best are singular vectors.
    _, values, right = torch.linalg.svd(query_root.mT @ key_root)
    values, right = values[:, :count, None], right[:, :count]
    size = (queries.square().mean() / keys.square().mean().clamp_min(1e-300)).sqrt().clamp(1e-6, 1e6)
    # Shared out so that queries and keys stay as large relative to one another as they are.
    key_size = (values / size).sqrt()
    for_queries = right @ key_root.mT / key_size.clamp_min(1e-300)
    return torch.where(values > 1e-12 * values[:, :1], for_queries, 0.0), key_size * (right @ key_inverse)


def _kept(directions: Directions, qk_rope_head_dim: int) -> torch.Tensor:
    """The first r/2 directions, by frequency."""
    return torch.sort(directions.pairs[: qk_rope_head_dim // 2], stable=True).indices


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L with L L^T = moments [G, d, d], and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moments)
    usable = values > 1e-12 * values[:, -1:]
    root = torch.where(usable, values.clamp_min(0), 0.0).sqrt()
    inverse = torch.where(usable, root.clamp_min(1e-300).reciprocal(), 0.0)
    return vectors * root[:, None], inverse[..., None] * vectors.mT


def _complex(rows: torch.Tensor) -> torch.Tensor:
    """[heads, d, ...] as complex128 [heads, P, ...]."""
    first, second = rows.to(torch.float64).chunk(2, 1)
    return torch.complex(first, second)


def _real(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Complex [..., n, ...] as float64 [..., 2 n, ...], half-split."""
    return torch.cat((rows.real, rows.imag), dim)


def _broadcast(coefficients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[heads, n] to be multiplied with [heads, n, ...]."""
    return coefficients.view(*coefficients.shape, *[1] * (rows.dim() - 2))
