"""The smallest layout that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.layout_plan.settings import PlanSettings, check_planned
from mha2mla_megatron.layout_plan.stages import most_used, plan_stages

LAYOUT_KEYS = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "context_parallel_size",
)  # fmt: skip


def suggest(
    architecture: Architecture, settings: PlanSettings, teacher: Architecture | None
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(the smallest layout that fits or None, the one that takes the least of those tried), as plain values.

    First the recompute of `settings`, then full, which costs a third more arithmetic. For each, the fewest GPUs for one
    copy of the model, since more copies send less than more parts; of as many GPUs, the most tensor parallelism within
    a node, since a pipeline stands idle at times. Context parallelism stays as it is given.
    """
    nearest: dict[str, Any] = {}
    for candidate in _candidates(architecture, settings, teacher):
        found = {
            **{key: getattr(candidate.parallel, key) for key in LAYOUT_KEYS},
            "recompute": candidate.recompute,
            "copies": candidate.data_size,
            "bubble": candidate.bubble,
            "total": most_used(plan_stages(architecture, candidate, teacher)),
        }
        if not nearest or found["total"] < nearest["total"]:
            nearest = found
        if found["total"] <= settings.room:
            return found, nearest
    return None, nearest


def _candidates(
    architecture: Architecture, settings: PlanSettings, teacher: Architecture | None
) -> Iterator[PlanSettings]:
    """Layouts that divide model, GPUs and batch, in the order of preference; the given one, which may be none of those
    that one would choose, comes last."""
    context = settings.parallel.context_parallel_size
    for recompute in dict.fromkeys((settings.recompute, "full")):
        for size in range(1, settings.gpus + 1):
            for tp in range(min(size, settings.gpus_per_node), 0, -1):
                if size % tp:
                    continue
                by_sequence = tp > 1 and settings.data.sequence_length % (tp * context) == 0
                parallel = dataclasses.replace(
                    settings.parallel,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=size // tp,
                    virtual_pipeline_model_parallel_size=1,
                    pipeline_model_parallel_layout=None,
                    sequence_parallel=by_sequence,
                )
                try:
                    candidate = dataclasses.replace(settings, parallel=parallel, recompute=recompute)
                    check_planned(candidate, architecture, teacher)
                except UserError:
                    continue
                yield candidate
    yield settings
