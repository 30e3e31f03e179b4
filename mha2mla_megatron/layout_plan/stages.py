"""Memory and messages of each pipeline stage of a layout."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.adapters import adapter_names
from mha2mla_megatron.layout_plan.activations import FLOAT32, ForwardPass
from mha2mla_megatron.layout_plan.schedule import backward_passes
from mha2mla_megatron.layout_plan.settings import PlanSettings
from mha2mla_megatron.layout_plan.shards import Chunk, count, fp8_copies, stage_chunks, stage_parameters
from mha2mla_megatron.layout_plan.traffic import step_traffic, teacher_traffic
from mha2mla_megatron.model.implementation import fuses_projections, rotates_fused, uses_transformer_engine
from mha2mla_megatron.training.lora import lora_shapes
from mha2mla_megatron.training.lr_scale import lr_factors


@dataclass(frozen=True)
class StagePlan:
    """One rank of one pipeline stage; everything but counts is bytes."""

    stage: int
    layers: int
    parameter_count: int
    trained_count: int
    """Those of them that neither optimizer.lr_scale nor lora freezes."""

    parameters: int
    """Weights, and their copies in 8 bits."""

    gradients: int
    optimizer: int
    """Its state, with the average of the weights."""

    teacher: int
    """Weights of the frozen teacher."""

    attention: int
    """Kept by one micro-batch in all chunks of the stage for its backward pass, as are the next three."""

    mlp: int
    layer_inputs: int
    output: int
    chunks: list[int]
    """The sum of these four in each chunk."""

    in_flight: int
    """Forward passes whose activations are there at once when most is in use: of micro-batches, or with virtual stages
    of micro-batches through one chunk each."""

    others_in_flight: int
    """Activations of all of them but those of one micro-batch in all chunks."""

    sent_on: int
    """Outputs of chunks, which stay until their gradients come back."""

    working: int
    """Temporary tensors at the moment when most is in use."""

    total: int
    sent: dict[str, int]
    """Kind of message -> bytes that the rank sends in a step."""


def plan_stages(
    architecture: Architecture, settings: PlanSettings, teacher: Architecture | None = None
) -> list[StagePlan]:
    """Every pipeline stage of a layout that divides the model, and the teacher of settings.distillation, if there is
    one."""
    parallel = settings.parallel
    work = _forward_pass(architecture, settings)
    taught = None
    if teacher is not None:
        taught = _forward_pass(teacher, dataclasses.replace(settings, recompute="none", fp8=None))
    beside = 0 if taught is None else taught.hidden  # travels with the model's hidden states
    element, half = work.element_size, work.element_size < FLOAT32
    adapters = lora_shapes(architecture, settings.lora)
    factors = lr_factors(architecture, settings.optimizer.lr_scale, adapters)
    # Both moments; where the weights are not float32 themselves, the master weights; the weights' average.
    shared = 2 + half + (settings.optimizer.ema_decay > 0)
    tied = {"output_layer.weight": "embedding.word_embeddings.weight"} if architecture.tie_word_embeddings else {}
    found = []
    for stage, parameters in enumerate(stage_parameters(architecture, parallel, adapters)):
        trained = {name: shape for name, shape in parameters.items() if factors[tied.get(name, name)] > 0}
        chunks = stage_chunks(architecture, parallel)[stage]
        number, updated = count(parameters), count(trained)
        kept = [_kept(work, chunk, 0 if chunk.first else beside) for chunk in chunks]
        sizes = [sum(of.values()) for of in kept]
        outputs = [0 if chunk.last else work.hidden + beside for chunk in chunks]
        largest = max(map(math.prod, parameters.values()))
        if adapters:  # the sum of a matrix and its update, and the gradient of that
            updated_weights = (shape for name, shape in parameters.items() if adapter_names(name)[0] in adapters)
            largest = 2 * max(map(math.prod, updated_weights), default=0)
        moments = [
            {
                "in_flight": sum(in_flight),
                "others_in_flight": math.sumprod(in_flight, sizes) - sum(sizes),
                "sent_on": math.sumprod(in_flight, outputs),
                "working": work.working(chunks[backward].layers, chunks[backward].last, largest),
            }
            for in_flight, backward in dict.fromkeys(backward_passes(parallel, stage, settings.micro_batches))
        ]
        most = max(moments, key=lambda now: now["others_in_flight"] + now["sent_on"] + now["working"])
        in_flight = most.pop("in_flight")
        parts: dict[str, Any] = {
            "parameters": number * element + (fp8_copies(parameters) if work.fp8 else 0),
            "gradients": updated * FLOAT32,
            "optimizer": math.ceil(updated / settings.replicas) * shared * FLOAT32,
            "teacher": 0 if teacher is None else count(stage_parameters(teacher, parallel)[stage]) * element,
            **{part: sum(of[part] for of in kept) for part in kept[0]},
            **most,
        }
        sent = step_traffic(work, chunks, trained, settings.micro_batches, settings.replicas)
        if taught is not None:
            sent |= teacher_traffic(taught, stage, settings.micro_batches)
        parts |= {"chunks": sizes, "in_flight": in_flight, "total": sum(parts.values()), "sent": sent}
        found.append(StagePlan(stage, sum(len(chunk.layers) for chunk in chunks), number, updated, **parts))
    return found


def most_used(stages: list[StagePlan]) -> int:
    """Bytes of the rank that needs most."""
    return max(stage.total for stage in stages)


def _forward_pass(architecture: Architecture, settings: PlanSettings) -> ForwardPass:
    half = settings.planned_dtype == "bfloat16"
    implementation, fp8 = settings.planned_implementation, settings.fp8 is not None
    by_module = fp8 or settings.lora.rank is not None
    return ForwardPass(
        architecture,
        settings.parallel,
        settings.data.sequence_length,
        settings.micro_batch_size,
        2 if half else FLOAT32,
        settings.recompute,
        # Its fused attention is for 16-bit types.
        transformer_engine=half and uses_transformer_engine(implementation),
        fused_rotation=rotates_fused(implementation, architecture.qk_norm),
        fused_projections=fuses_projections(implementation, architecture.qk_norm, by_module),
        fused=settings.device == "cuda",
        fp8=fp8,
        loss_models=2
        if settings.distillation.teacher is not None
        else int(settings.distillation.taught or settings.z_loss > 0),
        matched=settings.distillation.attention_weight > 0,
    )


def _kept(work: ForwardPass, chunk: Chunk, beside: int) -> dict[str, int]:
    """By one micro-batch in one chunk. beside: a teacher's hidden states in the tensor that the chunk was sent."""
    saved = work.saved(chunk.layers)
    saved["layer_inputs"] += beside
    return {**saved, "output": work.output_saved if chunk.last else 0}
