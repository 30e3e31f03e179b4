"""The whole plan: as plain values, and as tables for people."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mha2mla_megatron.config import describe_conversion
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.layout_plan.settings import (
    GIB,
    PlanSettings,
    check_planned,
    planned_architecture,
    planned_teacher,
)
from mha2mla_megatron.layout_plan.stages import most_used, plan_stages
from mha2mla_megatron.layout_plan.suggest import suggest

HELD = ("parameters", "gradients", "optimizer", "teacher")
KEPT = ("attention", "mlp", "layer_inputs", "output")
AT_ONCE = {"others_in_flight": "the others", "sent_on": "sent on", "working": "working", "total": "total"}


def make_plan(settings: PlanSettings) -> dict[str, Any]:
    """The plan of `settings`' layout and of the smallest one that fits, as plain JSON values; writes settings.output.

    `suggestion` is None where nothing fits; `nearest` is what takes the least of all that was tried.
    Raises UserError for a model, a layout or batch sizes that cannot be.
    """
    architecture = planned_architecture(settings)
    teacher = planned_teacher(settings)
    check_planned(settings, architecture, teacher)
    stages = plan_stages(architecture, settings, teacher)
    suggestion, nearest = suggest(architecture, settings, teacher)
    found = {
        "model": dataclasses.asdict(architecture),
        "teacher": None if teacher is None else dataclasses.asdict(teacher),
        "layout": settings.parallel.sizes(settings.gpus),
        "pipeline_model_parallel_layout": settings.parallel.pipeline_model_parallel_layout,
        "sequence_parallel": settings.parallel.uses_sequence_parallel,
        "dtype": settings.planned_dtype,
        "fp8": settings.fp8,
        "implementation": settings.planned_implementation,
        "recompute": settings.recompute,
        "sequence_length": settings.data.sequence_length,
        "micro_batch_size": settings.micro_batch_size,
        "global_batch_size": settings.global_batch_size,
        "micro_batches": settings.micro_batches,
        "bubble": settings.bubble,
        "room": settings.room,
        "total": most_used(stages),
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "suggestion": suggestion,
        "nearest": nearest,
    }
    if settings.output is not None:
        with new_files([Path(settings.output)], settings.overwrite) as (file,):
            write_json(file, found)
    return found


def require_fit(found: dict[str, Any], settings: PlanSettings) -> None:
    """Raise UserError, saying what the nearest layout needs, where nothing fits."""
    if found["suggestion"] is None:
        nearest = found["nearest"]
        raise UserError(
            f"nothing fits into {_room(settings)} on {settings.gpus} GPUs; nearest is {_candidate(nearest)}, which "
            f"needs {_gib(nearest['total'])} GiB: more gpus, more gpu_memory, or a smaller micro_batch_size or "
            "data.sequence_length would help"
        )


def format_plan(found: dict[str, Any], settings: PlanSettings) -> str:
    """Tables of memory and messages, and the suggestion."""
    layout, stages = found["layout"], found["stages"]
    held = [key for key in HELD if key != "teacher" or found["teacher"] is not None]
    memory = [
        (
            str(stage["stage"]),
            str(stage["layers"]),
            f"{stage['parameter_count'] / 1e6:.1f}",
            *(_gib(stage[key]) for key in (*held, *KEPT)),
            str(stage["in_flight"]),
            *(_gib(stage[key]) for key in AT_ONCE),
        )
        for stage in stages
    ]
    headings = (
        "stage", "layers", "M weights", *(key.replace("_", " ") for key in (*held, *KEPT)), "in flight",
        *AT_ONCE.values(),
    )  # fmt: skip
    frozen = sum(stage["parameter_count"] - stage["trained_count"] for stage in stages) / 1e6
    kinds = list(dict.fromkeys(kind for stage in stages for kind in stage["sent"]))
    traffic = [(kind, *(_gib(stage["sent"].get(kind, 0)) for stage in stages)) for kind in kinds]
    return "\n".join(
        (
            f"model: {_model(found['model'])}",
            *([] if found["teacher"] is None else [f"teacher: {_model(found['teacher'])}"]),
            f"layout: {_layout(dataclasses.asdict(settings.parallel))}, data {layout['data']} on {layout['processes']} "
            f"GPUs; {found['dtype']}{'' if found['fp8'] is None else f' and fp8 {found["fp8"]}'}, "
            f"{found['implementation']}, recompute {found['recompute']}",
            f"step: {found['global_batch_size']} samples of {found['sequence_length']} tokens, "
            f"{found['micro_batches']} micro-batches of {found['micro_batch_size']} on each rank; "
            f"pipeline bubble {found['bubble']:.1%}",
            *([f"frozen: {frozen:.1f} M of the weights below; activations as if none were"] if frozen else []),
            "",
            "GiB of one rank",
            format_table(headings, memory),
            "",
            "GiB that one rank sends in a step" if kinds else "nothing is sent",
            *([format_table(("stage", *(str(stage["stage"]) for stage in stages)), traffic)] if kinds else []),
            "",
            *_verdict(found, settings),
        )
    )


def _model(model: dict[str, Any]) -> str:
    mla = model["mla"]
    conversion = "original" if mla is None else f"converted ({describe_conversion(mla)})"
    experts, feed_forward = model["experts"], f"MLP {model['intermediate_size']}"
    if experts is not None:
        chosen = f"{experts['num_experts_per_tok']} of {experts['num_experts']} experts of"
        rest = f", {feed_forward} in the others" if len(experts["layers"]) < model["num_layers"] else ""
        feed_forward = f"{chosen} {experts['intermediate_size']} in {len(experts['layers'])} layers{rest}"
    return (
        f"{model['num_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads, {model['num_key_value_heads']} key/value heads of "
        f"{model['head_dim']}, {feed_forward}, vocabulary {model['vocab_size']}; {conversion}"
    )


def _verdict(found: dict[str, Any], settings: PlanSettings) -> list[str]:
    fits = "fits" if found["total"] <= settings.room else "does not fit"
    lines = [f"this layout needs {_gib(found['total'])} GiB: {fits} into {_room(settings)}"]
    best = found["suggestion"]
    if best is None:
        return lines
    reason = "no layout with fewer GPUs a copy fits; of as many, most tensor parallelism within a node"
    if best["recompute"] != settings.recompute:
        reason = f"nothing fits with recompute={settings.recompute}; with full, {reason}"
    return [
        *lines,
        f"suggestion: {_candidate(best)}, data {best['copies']}: needs {_gib(best['total'])} GiB "
        f"(pipeline bubble {best['bubble']:.1%})",
        f"why: {reason}",
    ]


def _candidate(found: dict[str, Any]) -> str:
    return f"{_layout(found)}, recompute {found['recompute']}"


def _layout(parallel: dict[str, Any]) -> str:
    """parallel: keys of ParallelConfig."""
    tp, sequence = parallel["tensor_model_parallel_size"], parallel["sequence_parallel"]
    words = [
        f"tensor {tp}{' + sequence' if sequence and tp > 1 else ''}",
        f"pipeline {parallel['pipeline_model_parallel_size']}",
    ]
    for key, word, plain in (
        ("virtual_pipeline_model_parallel_size", "virtual", 1),
        ("pipeline_model_parallel_layout", "stages", None),
        ("context_parallel_size", "context", 1),
    ):
        if parallel[key] != plain:
            words.append(f"{word} {parallel[key]}")
    return ", ".join(words)


def _room(settings: PlanSettings) -> str:
    return f"{_gib(settings.room)} GiB (gpu_memory {settings.gpu_memory:g} less reserve {settings.reserve:g})"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
