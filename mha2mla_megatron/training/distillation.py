"""The frozen teacher of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from mha2mla_megatron.training.top_k_divergence import TopK


class Teacher:
    """What the student follows beside the text.

    chunks: what runs in training, of this rank. matching: of attention outputs, None where the loss has none. weight:
    how much the student follows the teacher in the current step, a float64 scalar on the device. A tensor, for a CUDA
    graph has numbers as they were when it was captured, and reads tensors at each replay.
    """

    matching: AttentionMatching | None = None

    def __init__(self, students: Sequence[Any], settings: FinetuneSettings, device: torch.device) -> None:
        """students: the student's chunks, from `build_training_model`."""
        self.chunks: Sequence[Any] = students
        self.weight = torch.tensor(settings.distillation.weight, dtype=torch.float64, device=device)

    def split_output(
        self, output: Any, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | TopK | None]:
        """(the student's output, what the teacher says) of a micro batch, from what a chunk gave.

        In the last chunk these are for `token_losses`: logits [b, s, V/tp] of both, or the teacher's most probable
        tokens. In others the first is what is sent on.
        """
        raise NotImplementedError


class Distillation(Teacher):
    """A teacher in the run's own layout and type, without gradients, optimizer or a place in the checkpoints.

    Its chunks are those of the student with those of the teacher.
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
        super().__init__(students, settings, device)
        wanted = settings.distillation
        self.teacher = build_teacher(architecture, settings, dtype, device)
        self.chunks = [TaughtChunk(*pair) for pair in zip(students, self.teacher, strict=True)]
        if wanted.attention_weight > 0:
            self.matching = AttentionMatching(
                list(zip(students, self.teacher, strict=True)),
                architecture.num_layers,
                wanted.attention_weight,
                self.weight,
                len(settings.data.sources),
                settings.parallel.uses_sequence_parallel,
            )

    def split_output(self, output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return output


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
