"""The frozen teacher of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.parallel import launched_world_size
from mha2mla_megatron.model.provider import build_on_device, transformer_config
from mha2mla_megatron.training.attention_matching import AttentionMatching
from mha2mla_megatron.training.checkpoint import load_weights
from mha2mla_megatron.training.checks import check_teacher
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.taught_chunk import TaughtChunk


class Distillation:
    """A teacher in the run's own layout and type, without gradients, optimizer or a place in the checkpoints.

    chunks: those of the student with those of the teacher, which run in training. matching: of attention outputs, None
    where the loss has none. weight: how much the student follows the teacher in the current step, a float64 scalar on
    the device. A tensor, for a CUDA graph has numbers as they were when it was captured, and reads tensors at each
    replay.
    """

    def __init__(
        self,
        architecture: Architecture,
        students: Sequence[DistributedDataParallel],
        settings: FinetuneSettings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """architecture: of the teacher. students: the student's chunks, from `build_training_model`."""
        wanted = settings.distillation
        self.teacher = build_teacher(architecture, settings, dtype, device)
        self.weight = torch.tensor(wanted.weight, dtype=torch.float64, device=device)
        self.chunks = [TaughtChunk(*pair) for pair in zip(students, self.teacher, strict=True)]
        self.matching: AttentionMatching | None = None
        if wanted.attention_weight > 0:
            self.matching = AttentionMatching(
                list(zip(students, self.teacher, strict=True)),
                architecture.num_layers,
                wanted.attention_weight,
                self.weight,
                len(settings.data.sources),
                settings.parallel.uses_sequence_parallel,
            )


def build_teacher(
    architecture: Architecture, settings: FinetuneSettings, dtype: torch.dtype, device: torch.device
) -> list[MegatronModule]:
    """This rank's chunks of a frozen model with random weights."""
    config = transformer_config(architecture, settings.parallel, dtype)
    count = settings.parallel.virtual_pipeline_model_parallel_size
    stages = range(count) if count > 1 else (None,)
    chunks = [build_on_device(architecture, config, settings.implementation, device, stage) for stage in stages]
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return chunks


def find_teacher(settings: FinetuneSettings, student: Architecture) -> tuple[Architecture, Path]:
    """(architecture, step folder) of the teacher; reads no weights.

    Raises UserError for a teacher that is missing, or that `check_teacher` refuses.
    """
    try:
        side, weights = locate_checkpoint(Path(str(settings.distillation.teacher)))
        teacher = read_architecture(side)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    check_teacher(settings, teacher, student, launched_world_size())
    return teacher, weights


def load_teacher(
    architecture: Architecture,
    weights: Path,
    students: Sequence[DistributedDataParallel],
    settings: FinetuneSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> Distillation:
    """The teacher with its weights. Raises UserError for a checkpoint that is damaged or of another model."""
    distillation = Distillation(architecture, students, settings, dtype, device)
    try:
        load_weights(distillation.teacher, weights, architecture)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    return distillation
