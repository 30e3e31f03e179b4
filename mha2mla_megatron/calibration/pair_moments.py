"""Second moments of what each rotary pair adds to the attention logits, under the softmax.

A pair adds t when it is rotated, and f1 or f2 when it stands in for itself in another way (`pairs`). All three are
linear in four parts of the key: the pair rotated, and the pair as it stands in.

Shape letters: b sequences, G key/value heads, N query heads of each, S tokens of a sequence, m queries of a block, t
keys, d head dim, P = d/2 pairs.
"""

from __future__ import annotations

import torch

BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 2 << 30}
"""For a block of queries: their attention rows, and BLOCK_NUMBERS for each pair of dims. Little enough for a CPU's
caches, enough to keep a GPU busy."""

BLOCK_NUMBERS = 100

_PAIRS = [(i, j) for i in range(4) for j in range(i, 4)]
_SYMMETRIC = [_PAIRS.index((min(i, j), max(i, j))) for i in range(4) for j in range(4)]
_FIRST = [i for i in range(4) for _ in range(4)]
_SECOND = [j for _ in range(4) for j in range(4)]


def block_size(queries: torch.Tensor) -> int:
    """How many of the S rows of queries [b, G, N, S, d] are in memory at a time, by `BLOCK_BYTES`."""
    b, groups, per_group, length, d = queries.shape
    row = 4 * b * groups * per_group * (4 * length + BLOCK_NUMBERS * d // 2)
    return max(1, min(length, BLOCK_BYTES[queries.device.type] // row))


def grouped_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [b, G, N, m, i] times right [b, G, i, j], for all query heads of a group in one product."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def attention_weights(
    queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """The probabilities of the queries at positions `rows`, int64 [m], over the first t keys: [b, G, N, m, t].

    queries: [b, G, N, m, d], keys: [b, G, t, d], rotated; window: how many keys a query sees, None: all up to itself.
    """
    index, rows = torch.arange(keys.shape[2], device=rows.device), rows[:, None]
    hidden = index > rows
    if window is not None:
        hidden |= index <= rows - window
    logits = grouped_matmul(queries, keys.transpose(2, 3)) * scaling
    return logits.masked_fill_(hidden, float("-inf")).softmax(-1)


def functionals(rotated: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """(t, f1, f2) of each pair as linear functions of the four parts of its key.

    rotated, instead: queries [..., m, d], as they go with the key's two first and two last parts. Returns
    [..., m, 3, 4, P].
    """
    first, second = instead.chunk(2, -1)
    zero = torch.zeros_like(first)
    t = torch.stack((*rotated.chunk(2, -1), zero, zero), -2)
    f1 = torch.stack((zero, zero, first, second), -2)
    f2 = torch.stack((zero, zero, -second, first), -2)
    return torch.stack((t, f1, f2), -3)


def products(keys: torch.Tensor) -> torch.Tensor:
    """The ten different products of a pair's four key parts. keys: [..., 4 P] -> [..., 10 P]."""
    parts = keys.unflatten(-1, (4, -1))
    return torch.cat([parts[..., i, :] * parts[..., j, :] for i, j in _PAIRS], -1)


def softmax_moments(
    p: torch.Tensor, keys: torch.Tensor, keys_products: torch.Tensor, functionals: torch.Tensor
) -> torch.Tensor:
    """Second moments of (t, f1, f2), centred for each query and summed over queries: [G, N, P, 3, 3].

    p: attention's probabilities [b, G, N, m, t]; keys: their parts [b, G, t, 4 P]; keys_products: their `products`.
    """
    mean = grouped_matmul(p, keys).unflatten(-1, (4, -1))
    second = grouped_matmul(p, keys_products).unflatten(-1, (10, -1))
    covariance = second[..., _SYMMETRIC, :] - mean[..., _FIRST, :] * mean[..., _SECOND, :]  # [b, G, N, m, 16, P]
    applied = (functionals.unsqueeze(5) * covariance.unflatten(-2, (1, 4, 4))).sum(6)
    return torch.einsum("bgnmxip,bgnmyip->gnpxy", applied, functionals)
