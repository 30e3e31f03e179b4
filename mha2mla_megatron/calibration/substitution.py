"""A rotary pair at another frequency: what it would add to the attention logits if it turned as a neighbour does.

Neighbouring frequencies are much alike as far as a token looks back, most of all the slow ones. A pair that turns with
a neighbour's frequency, its query turned and scaled to fit as it is where nothing rotates (`pairs`), loses a part of
what it loses without a rotation: for the slower half of SmolLM's pairs a tenth to a fifth. And pairs of one frequency
can share a rotated key (`key_mixtures`).

Shape letters: b sequences, S their length, H query heads, G key/value heads, d head dim, P = d/2 pairs, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mha2mla_megatron.calibration.pair_moments import (
    attention_weights,
    block_size,
    functionals,
    products,
    softmax_moments,
)
from mha2mla_megatron.calibration.pairs import fit_query_map, identity_map, pair_losses, per_group

QUERY_STRIDE = 8
"""Every such query is looked at. The price of a substitution is an average over far more of them than it needs."""


def neighbours(pairs: int) -> list[int]:
    """Of pair j the pairs j + k whose frequency it may take. A faster one is worse than a slower one as far away, which
    is nearer to no rotation; a frequency less than about a quarter of its own has little left of it (with 32 pairs and
    base 100000, or 64 and 10000)."""
    return [*range(-max(1, pairs // 16), 0), *range(1, max(1, pairs // 8) + 1)]


def substitution_moments(
    queries: torch.Tensor,
    keys: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Second moments of (t, f1, f2) as in `statistics`, with f1 and f2 of the pair turned as each neighbour:
    [K, H, P, 3, 3], zero where there is no such neighbour. Summed over every QUERY_STRIDE-th query, and scaled so that
    they are sums over all.

    queries: [b, H, S, d], keys: [b, G, S, d], unrotated, float32; tables: cos and sin, [1 or b, S, d].
    """
    groups, (length, d) = keys.shape[1], queries.shape[2:]

    def rotated(tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = apply_rotary_pos_emb(queries, keys, *tables)
        return q.unflatten(1, (groups, -1)), k

    own_queries, own_keys = rotated(tables)
    # The last of each run of as many, so that no query that sees little counts for others that see more.
    looked_at = torch.arange(QUERY_STRIDE - 1, length, QUERY_STRIDE, device=queries.device)
    blocks = looked_at.split(block_size(own_queries))
    pair, sums = torch.arange(d // 2, device=queries.device), []
    for shift in neighbours(d // 2):
        index = (pair + shift).clamp(0, d // 2 - 1)
        index = torch.cat((index, d // 2 + index))
        as_neighbour, neighbours_keys = rotated((tables[0][..., index], tables[1][..., index]))
        parts = torch.cat((own_keys, neighbours_keys), -1)
        parts_products = products(parts)
        moments = queries.new_zeros(groups, own_queries.shape[2], d // 2, 3, 3)
        for rows in blocks:
            seen = int(rows[-1]) + 1
            q = own_queries[..., rows, :]
            p = attention_weights(q, own_keys[:, :, :seen], rows, scaling, window)
            linear = functionals(q, as_neighbour[..., rows, :])
            moments += softmax_moments(p, parts[:, :, :seen], parts_products[:, :, :seen], linear)
        exists = (pair + shift >= 0) & (pair + shift < d // 2)
        sums.append(moments.flatten(0, 1) * exists[:, None, None])
    return torch.stack(sums) * (scaling**2 * length / len(looked_at))


@dataclass(frozen=True)
class Rotations:
    """What each pair is worth, turned with each frequency."""

    gains: torch.Tensor
    """float64 [P, G, P]: of rotating pair p (the last index) with the frequency of pair b (the first), against not
    rotating it, in the units of `pair_losses`. 0 where b is no neighbour of p."""

    query_maps: torch.Tensor
    """float64 [P, H, P, 2]: what becomes of the query then; (1, 0) with its own frequency."""

    def chunk(self, count: int) -> list[Rotations]:
        """Those of `count` parts of the heads."""
        parts = zip(self.gains.chunk(count, 1), self.query_maps.chunk(count, 1), strict=True)
        return [Rotations(gains, query_maps.contiguous()) for gains, query_maps in parts]


def rotations(losses: torch.Tensor, moments: torch.Tensor, fitted: bool = True) -> Rotations:
    """losses: [G, P], of rotating nothing; moments: `substitution_moments` per token, float64; fitted: whether queries
    are turned and scaled."""
    groups, pairs = losses.shape
    gains = torch.diag_embed(losses).transpose(0, 1).contiguous()  # [P, G, P]
    maps = identity_map(moments[0]).expand(pairs, -1, -1, -1).clone()
    for shift, moment in zip(neighbours(pairs), moments, strict=True):
        own = torch.arange(max(0, -shift), min(pairs, pairs - shift), device=losses.device)
        query_map = fit_query_map(moment) if fitted else identity_map(moment)
        left = per_group(pair_losses(moment, query_map), groups)
        gains[own + shift, :, own] = (losses - left).clamp_min(0)[:, own].T
        maps[own + shift, :, own] = query_map[:, own].transpose(0, 1)
    return Rotations(gains, maps)
