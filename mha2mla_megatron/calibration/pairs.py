"""What a rotary pair is worth, and what can stand in for it without a rotation.

The rotated pair adds t = Re(conj(q) k e^(i theta (m - n))) to a logit. Not rotated, it can add a f1 + b f2 with
f1 = Re(conj(q) k) and f2 = Im(conj(q) k): that is Re(conj(q (a + ib)) k), the same key and a query turned and scaled by
a + ib, which is folded into the rows of W_q and costs nothing at run time. The best (a, b) is a least-squares fit.

Shape letters: H query heads, G key/value heads, P = d/2 pairs of a head.
"""

from __future__ import annotations

import torch


def fit_query_map(moments: torch.Tensor) -> torch.Tensor:
    """(a, b) of every pair and query head, argmin of E[(t - a f1 - b f2)^2]: [H, P, 2].

    moments: second moments of (t, f1, f2), [H, P, 3, 3]. A pair with no signal at all keeps its query: (1, 0).
    """
    features, target = moments[..., 1:, 1:], moments[..., 0, 1:]
    size = features.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    empty = size == 0
    eye = torch.eye(2, dtype=moments.dtype, device=moments.device)
    # A ridge far below what changes a fit: f1 and f2 may be proportional, where any split of the two is as good.
    fitted = torch.linalg.solve(features + torch.where(empty, 1.0, 1e-9 * size) * eye, target[..., None])[..., 0]
    return torch.where(empty[..., 0], identity_map(moments), fitted)


def identity_map(moments: torch.Tensor) -> torch.Tensor:
    """(1, 0) for every pair: the query as it is. [H, P, 2]."""
    return scaling_map(1.0, *moments.shape[:2]).to(moments)


def scaling_map(scale: float, heads: int, pairs: int) -> torch.Tensor:
    """(scale, 0) for every pair: float64 [H, P, 2]."""
    return torch.tensor([scale, 0.0], dtype=torch.float64).repeat(heads, pairs, 1)


def pair_losses(moments: torch.Tensor, query_map: torch.Tensor) -> torch.Tensor:
    """E[(t - a f1 - b f2)^2] / 2, the price of not rotating each pair: [H, P], in the units of `moments`.

    With moments of logits under the softmax, this is the Kullback-Leibler divergence of the attention weights to second
    order.
    """
    residual = torch.cat((torch.ones_like(query_map[..., :1]), -query_map), -1)
    return 0.5 * torch.einsum("hpx,hpxy,hpy->hp", residual, moments, residual).clamp_min(0)


def per_group(losses: torch.Tensor, groups: int) -> torch.Tensor:
    """[H, P] summed over the query heads of each key/value head: [G, P]."""
    return losses.view(groups, -1, losses.shape[-1]).sum(1)


def apply_query_map(rows: torch.Tensor, query_map: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Query rows of every head with the map folded into the pairs that are not rotated.

    rows: [H, d, ...], weights or biases; query_map: [H, P, 2]; pairs: int64 [G, r/2], those that keep their rotation
    and their query. Returns float64 [H, d, ...].
    """
    heads, half = query_map.shape[:2]
    groups = len(pairs)
    kept = torch.zeros(groups, half, dtype=torch.bool, device=rows.device).scatter_(1, pairs.to(rows.device), True)
    kept = kept.repeat_interleave(heads // groups, 0)
    a, b = query_map.to(rows.device, torch.float64).unbind(-1)
    a, b = torch.where(kept, 1.0, a), torch.where(kept, 0.0, b)
    shape = (heads, half, *[1] * (rows.dim() - 2))
    a, b = a.view(shape), b.view(shape)
    first, second = rows.to(torch.float64).chunk(2, 1)
    return torch.cat((a * first - b * second, a * second + b * first), 1)


def complex_pairs(rows: torch.Tensor) -> torch.Tensor:
    """A head's rows [heads, d, ...] as pairs: complex128 [heads, P, ...]."""
    first, second = rows.to(torch.float64).chunk(2, 1)
    return torch.complex(first, second)


def real_dims(pairs: torch.Tensor, dim: int) -> torch.Tensor:
    """Complex pairs along `dim` as twice as many dims, float64, half-split."""
    return torch.cat((pairs.real, pairs.imag), dim)
