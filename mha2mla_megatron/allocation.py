"""Spending a cache budget where it buys most: r and c of every layer, chosen together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """What one layer can have."""

    qk_rope_head_dim: int

    kv_lora_rank: int

    k_lora_rank: int | None
    """Of split; None: as kv_lora_rank."""

    cost: int
    """Cached elements per token."""

    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice for each layer with the smallest summed loss whose summed cost is at most `budget`.

    Exact, by dynamic programming over the budget in steps of the costs' greatest common divisor. Of equal losses the
    costlier choice is taken, so that nothing of the budget is left that some layer could use.

    Raises ValueError if even the cheapest choices cost more.
    """
    unit = math.gcd(*(choice.cost for choices in layers for choice in choices))
    size = budget // unit + 1
    best = np.zeros(size)  # the smallest loss of the layers so far within a cost
    picks: list[np.ndarray] = []
    for choices in layers:
        affordable = sorted({choice.cost // unit for choice in choices if choice.cost <= budget})
        cheapest = {cost: math.inf for cost in affordable}
        for choice in choices:
            if choice.cost <= budget:
                cheapest[choice.cost // unit] = min(cheapest[choice.cost // unit], choice.loss)
        totals, pick = np.full(size, np.inf), np.full(size, -1, dtype=np.int64)
        for cost in affordable:
            candidate = best[: size - cost] + cheapest[cost]
            better = candidate <= totals[cost:]
            totals[cost:][better] = candidate[better]
            pick[cost:][better] = cost
        best = totals
        picks.append(pick)
    if not np.isfinite(best[-1]):
        raise ValueError(f"a budget of {budget} does not pay for the cheapest choices")
    result: list[Choice] = []
    left = size - 1
    for choices, pick in zip(reversed(layers), reversed(picks), strict=True):
        cost = int(pick[left])
        result.append(min((c for c in choices if c.cost == cost * unit), key=lambda c: c.loss))
        left -= cost
    return result[::-1]
