"""Settings of a conversion that its other settings leave without effect: refused, as they were given to have one."""

from __future__ import annotations

from mha2mla_megatron.config import SCORED_STRATEGIES, LowRankConfig, PartialRopeConfig
from mha2mla_megatron.errors import UserError


def refuse_ignored_rope(rope: PartialRopeConfig, statistics: str | None) -> None:
    """Raise UserError for a setting of `partial_rope` that the strategy does not look at.

    statistics: the file that stands in for `scores` where that is not given; it may be there for something else.
    """
    strategy = rope.chosen_strategy
    for key, given, reason in (
        ("uniform_start", strategy != "uniform" and rope.uniform_start != 0, "of strategy uniform"),
        ("ends_high_pairs", strategy != "ends" and rope.ends_high_pairs is not None, "of strategy ends"),
        ("query_map", strategy == "full" and bool(rope.query_map), "of strategies that leave out rotations"),
        (
            "scores",
            not (strategy in SCORED_STRATEGIES or rope.query_map or rope.shared or rope.mixed)
            and rope.scores not in (None, statistics),
            f"of strategies {' and '.join(SCORED_STRATEGIES)}, of query_map=true, and of shared or mixed=true",
        ),
    ):
        if given:
            raise UserError(f"partial_rope.{key}: {reason}, and partial_rope.strategy is {strategy}; leave it unset")


def refuse_ignored_low_rank(low_rank: LowRankConfig, statistics: str | None, budgeted: bool, healed: bool) -> None:
    """Raise UserError for a setting of `low_rank` that the method, or the objective, does not look at.

    statistics: as above, for `low_rank.statistics`, which a cache budget and healing need too.
    """
    factors = low_rank.chosen_method != "none" or (budgeted and low_rank.method == "auto")
    aware = factors and low_rank.chosen_objective != "weights"
    found = "method is none" if not factors else "objective is weights"
    for key, given, reason in (
        ("singular_values", not factors and low_rank.singular_values != "up", "of methods that factor"),
        ("objective", not factors and low_rank.objective not in ("auto", "weights"), "of methods that factor"),
        ("damping", not aware and low_rank.damping != LowRankConfig.damping, "of factors made with statistics"),
        (
            "statistics",
            not (aware or budgeted or healed) and low_rank.statistics not in (None, statistics),
            "of factors made with statistics, a cache budget and healing",
        ),
    ):
        if given:
            raise UserError(f"low_rank.{key}: {reason}, and low_rank.{found}; leave it unset")
