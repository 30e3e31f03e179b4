"""Memory and messages of each pipeline stage of a layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.layout_plan.activations import FLOAT32, ForwardPass
from mha2mla_megatron.layout_plan.settings import PlanSettings
from mha2mla_megatron.layout_plan.shards import count, stage_layers, stage_parameters
from mha2mla_megatron.layout_plan.traffic import step_traffic
from mha2mla_megatron.model.implementation import fuses_projections, rotates_fused, uses_transformer_engine
from mha2mla_megatron.training.lr_scale import lr_factors


@dataclass(frozen=True)
class StagePlan:
    """One rank of one pipeline stage; everything but counts is bytes."""

    stage: int
    layers: int
    parameter_count: int
    trained_count: int
    """Those of them that optimizer.lr_scale does not freeze."""

    parameters: int
    gradients: int
    optimizer: int
    attention: int
    """Kept by one micro-batch for its backward pass, as are the next three."""

    mlp: int
    layer_inputs: int
    output: int
    in_flight: int
    """Micro-batches whose activations are there at once."""

    others_in_flight: int
    """Activations of all of them but one."""

    working: int
    """Temporary tensors at the moment when most is in use."""

    total: int
    sent: dict[str, int]
    """Kind of message -> bytes that the rank sends in a step."""


def plan_stages(architecture: Architecture, settings: PlanSettings) -> list[StagePlan]:
    """Every pipeline stage of a layout that divides the model."""
    parallel = settings.parallel
    stages = parallel.pipeline_model_parallel_size
    half = settings.planned_dtype == "bfloat16"
    work = ForwardPass(
        architecture,
        parallel,
        settings.data.sequence_length,
        settings.micro_batch_size,
        2 if half else FLOAT32,
        settings.recompute,
        # Its fused attention is for 16-bit types.
        transformer_engine=half and uses_transformer_engine(settings.planned_implementation),
        fused_rotation=rotates_fused(settings.planned_implementation, architecture.qk_norm),
        fused_projections=fuses_projections(
            settings.planned_implementation, architecture.qk_norm, settings.fp8 is not None
        ),
        fused=settings.device == "cuda",
    )
    factors = lr_factors(architecture, settings.optimizer.lr_scale)
    tied = {"output_layer.weight": "embedding.word_embeddings.weight"} if architecture.tie_word_embeddings else {}
    found = []
    for stage, parameters in enumerate(stage_parameters(architecture, parallel)):
        trained = {name: shape for name, shape in parameters.items() if factors[tied.get(name, name)] > 0}
        first, last = stage == 0, stage == stages - 1
        layers, number, updated = stage_layers(architecture, parallel, stage), count(parameters), count(trained)
        kept = {**work.saved(layers), "output": work.output_saved if last else 0}
        # 1F1B starts with as many forward passes as there are stages from here on.
        in_flight = min(stages - stage, settings.micro_batches)
        others = (in_flight - 1) * sum(kept.values())
        if not last:
            others += in_flight * work.hidden  # what was sent on stays until its gradient comes back
        parts = {
            "parameters": number * work.element_size,
            "gradients": updated * FLOAT32,
            # Both moments and, where the weights are not float32 themselves, the master weights.
            "optimizer": math.ceil(updated / settings.data_size) * (3 if half else 2) * FLOAT32,
            **kept,
            "others_in_flight": others,
            "working": work.working(layers, last, max(map(math.prod, parameters.values()))),
        }
        sent = step_traffic(work, layers, trained, first, last, settings.micro_batches, settings.data_size)
        total = sum(parts.values())
        found.append(
            StagePlan(stage, len(layers), number, updated, in_flight=in_flight, total=total, sent=sent, **parts)
        )
    return found


def most_used(stages: list[StagePlan]) -> int:
    """Bytes of the rank that needs most."""
    return max(stage.total for stage in stages)
