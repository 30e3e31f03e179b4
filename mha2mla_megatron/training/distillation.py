"""The frozen teacher of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.parallel import launched_world_size
from mha2mla_megatron.model.provider import build_on_device, transformer_config
from mha2mla_megatron.training.checkpoint import load_weights
from mha2mla_megatron.training.checks import check_teacher
from mha2mla_megatron.training.config import FinetuneSettings


class Distillation:
    """A teacher in the run's own layout and type, without gradients, optimizer or a place in the checkpoints.

    weight: how much the student follows it in the current step, a float64 scalar on the device. A tensor, for a CUDA
    graph has numbers as they were when it was captured, and reads tensors at each replay.
    """

    def __init__(
        self, architecture: Architecture, settings: FinetuneSettings, dtype: torch.dtype, device: torch.device
    ) -> None:
        config = transformer_config(architecture, settings.parallel, dtype)
        self.model = build_on_device(architecture, config, settings.implementation, device)
        self.model.requires_grad_(False).eval()
        self.weight = torch.tensor(settings.distillation.weight, dtype=torch.float64, device=device)

    def predict(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The teacher's logits [b, s, V/tp] of tokens [b, s]. mask: as the student's, None for causal attention."""
        with torch.no_grad():
            return self.model(tokens, position_ids, mask)


def find_teacher(settings: FinetuneSettings, student: Architecture) -> tuple[Architecture, Path]:
    """(architecture, step folder) of the teacher; reads no weights.

    Raises UserError for a teacher that is missing, has another vocabulary, or cannot take the run's layout or samples.
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
    settings: FinetuneSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> Distillation:
    """The teacher with its weights. Raises UserError for a checkpoint that is damaged or of another model."""
    distillation = Distillation(architecture, settings, dtype, device)
    try:
        load_weights([distillation.model], weights, architecture)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    return distillation
