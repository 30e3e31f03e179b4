"""Rotated keys that are mixtures, of one head or of all: what is rotated, and what is left for each head.

What the mixtures (`key_mixtures`) do not explain of a head's keys, d dims of it, is not rotated; queries of these dims
get the query map as for pairs of a head's own. A head has d - r such dims: those that carry most of the products with
its queries.

Shape letters: h inputs, H query heads, G key/value heads, d head dim, r rotary dims, n = r/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mha2mla_megatron.calibration.key_mixtures import Mixtures
from mha2mla_megatron.calibration.pairs import complex_pairs, real_dims


@dataclass(frozen=True)
class SplitKeys:
    """A layer's keys, split."""

    rotated: torch.Tensor
    """[r, ...], half-split."""

    left: torch.Tensor
    """[G, d, ...]: what the rotated part does not explain of each head's keys."""


def split_keys(rows: torch.Tensor, mixtures: Mixtures) -> SplitKeys:
    """rows: weights or biases of all key heads, [G, d, ...]."""
    keys = complex_pairs(rows)
    mixed = torch.einsum("ngp,gp...->n...", mixtures.reads, keys)
    left = keys - torch.einsum("ngp,n...->gp...", mixtures.writes, mixed)
    return SplitKeys(real_dims(mixed, 0), real_dims(left, 1))


def rotated_queries(rows: torch.Tensor, mixtures: Mixtures) -> torch.Tensor:
    """The queries that go with the rotated part. rows: of all query heads [H, d, ...]; returns [H, r, ...]."""
    queries = complex_pairs(rows)
    writes = mixtures.writes.repeat_interleave(len(queries) // mixtures.writes.shape[1], 1)  # [n, H, P]
    return real_dims(torch.einsum("nhp,hp...->hn...", writes.conj() * mixtures.query_map, queries), 1)


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


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L with L L^T = moments [G, d, d], and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moments)
    usable = values > 1e-12 * values[:, -1:]
    root = torch.where(usable, values.clamp_min(0), 0.0).sqrt()
    inverse = torch.where(usable, root.clamp_min(1e-300).reciprocal(), 0.0)
    return vectors * root[:, None], inverse[..., None] * vectors.mT
