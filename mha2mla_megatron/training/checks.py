"""What a run is refused for before it is started: the model, the settings and the number of processes decide it.

Reads no weights and asks for no device, so that tools/plan.py refuses the same. Each raises UserError naming the key,
what was found and what would be valid.
"""

from __future__ import annotations

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.layout_plan.shards import rank_shape
from mha2mla_megatron.model.implementation import fuses_projections, uses_transformer_engine
from mha2mla_megatron.model.parallel import check_batches, check_layout
from mha2mla_megatron.training.config import FinetuneSettings

FP8_MULTIPLE = 16
"""Of which the sides of 8-bit matrices must be a multiple."""


def check_samples(settings: FinetuneSettings, architecture: Architecture, world_size: int) -> None:
    """Refuse samples that the layout cannot be fed with, or that are longer than the model's context."""
    check_batches(
        settings.parallel,
        world_size,
        settings.data.sequence_length,
        settings.micro_batch_size,
        settings.global_batch_size,
    )
    if settings.data.sequence_length > architecture.max_position_embeddings:
        raise UserError(
            f"data.sequence_length: {settings.data.sequence_length} is more than the model's context "
            f"{architecture.max_position_embeddings}"
        )


def check_reset(settings: FinetuneSettings, architecture: Architecture, implementation: str) -> None:
    """Refuse data.reset_attention_mask where no attention takes its mask. implementation: the one that will run."""
    if not settings.data.reset_attention_mask:
        return
    reasons = {
        f"implementation {implementation}, whose fast kernels take no such mask; valid: local": implementation
        != "local",
        f"parallel.context_parallel_size {settings.parallel.context_parallel_size}; valid: 1": (
            settings.parallel.context_parallel_size > 1
        ),
        "a model with sliding windows, whose mask Megatron makes itself": bool(architecture.window_layers),
    }
    for reason, true in reasons.items():
        if true:
            raise UserError(f"data.reset_attention_mask: not possible with {reason}")


def check_kernels(settings: FinetuneSettings, architecture: Architecture, implementation: str, dtype: str) -> None:
    """Refuse a `recompute`, `fp8` or `cuda_graph` that the model's layers cannot have. implementation: the one that
    will run; dtype: float32 or bfloat16."""
    if architecture.experts is not None:
        for key, found in (("fp8", settings.fp8), ("cuda_graph", settings.cuda_graph)):
            if found:
                raise UserError(f"{key}: {found} is not supported with mixtures of experts; leave it off")
    by_module = settings.fp8 is not None or settings.lora.rank is not None
    fused = fuses_projections(implementation, architecture.qk_norm, by_module)
    if settings.recompute == "latent" and not (architecture.mla is not None and fused):
        raise UserError(
            "recompute: latent needs a converted model whose attention takes the fused path (implementation "
            "transformer_engine or local_fused, no norms on queries and keys, fp8 and lora.rank null); valid: none, "
            "selective, full"
        )
    if settings.lora.rank is not None and settings.fp8 is not None:
        raise UserError(f"fp8: {settings.fp8} is not possible with lora; valid: null")
    if settings.lora.rank is not None and implementation == "local_fused":
        raise UserError(
            "implementation: local_fused is not possible with lora, which goes module by module; valid: local, "
            "transformer_engine, transformer_engine_unfused"
        )
    if settings.fp8 is not None:
        _check_fp8(settings, architecture, implementation, dtype)


def _check_fp8(settings: FinetuneSettings, architecture: Architecture, implementation: str, dtype: str) -> None:
    if not uses_transformer_engine(implementation) or dtype != "bfloat16":
        raise UserError(
            f"fp8: needs implementation transformer_engine and dtype bfloat16, and this is {implementation}, {dtype}; "
            "valid: null"
        )
    for name, shape in megatron_shapes(architecture).items():
        sides = rank_shape(name, shape, settings.parallel.tensor_model_parallel_size)
        if ".linear_" in name and len(sides) == 2 and any(side % FP8_MULTIPLE for side in sides):
            found = " x ".join(map(str, sides))
            raise UserError(f"fp8: {name} is {found} on each process; valid: multiples of {FP8_MULTIPLE}")
    parallel = settings.parallel
    sharing = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        sharing *= parallel.tensor_model_parallel_size
    tokens = settings.data.sequence_length * settings.micro_batch_size // sharing
    if tokens % FP8_MULTIPLE:
        raise UserError(f"fp8: a micro batch has {tokens} tokens on each process; valid: a multiple of {FP8_MULTIPLE}")


def check_graph(settings: FinetuneSettings, device: str) -> None:
    """Refuse cuda_graph without a GPU. device: cuda or cpu."""
    if settings.cuda_graph and device != "cuda":
        raise UserError(f"cuda_graph: needs a GPU, and this runs on {device}; valid here: false")


def check_teacher(settings: FinetuneSettings, teacher: Architecture, student: Architecture, world_size: int) -> None:
    """Refuse a teacher that has another vocabulary, cannot take the run's layout or samples, or has attention layers
    that distillation.attention_weight cannot compare with the student's."""
    try:
        check_layout(teacher, settings.parallel, world_size)
        check_samples(settings, teacher, world_size)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"distillation.teacher: {settings.distillation.teacher}: has a vocabulary of {teacher.vocab_size}, "
            f"the model has {student.vocab_size}"
        )
    if settings.distillation.attention_weight > 0:
        for name, found, wanted in (
            ("num_hidden_layers", teacher.num_layers, student.num_layers),
            ("hidden_size", teacher.hidden_size, student.hidden_size),
        ):
            if found != wanted:
                raise UserError(
                    f"distillation.attention_weight: {settings.distillation.attention_weight} needs a teacher with the "
                    f"model's {name} {wanted}, {settings.distillation.teacher} has {found}; valid: 0"
                )
