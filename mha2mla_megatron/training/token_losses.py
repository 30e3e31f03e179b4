"""The training loss of each token, where it is made of more than the text."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.top_k_divergence import TopK
from mha2mla_megatron.training.vocab_parallel_losses import vocab_parallel_losses

ATTENTION_LOSS = "attention_loss"
"""The part that `AttentionMatching` sums, which layers add to the loss."""


def part_names(settings: FinetuneSettings) -> list[str]:
    """What a step's loss is made of; nothing where it is the text's alone. All but attention_loss is of
    `token_losses`."""
    wanted = {
        "kl": settings.distillation.taught,
        ATTENTION_LOSS: settings.distillation.attention_weight > 0,
        "z_loss": settings.z_loss > 0,
    }
    parts = [name for name, there in wanted.items() if there]
    return ["lm_loss", *parts] if parts else []


def token_losses(
    labels: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    weight: torch.Tensor | float,
    settings: FinetuneSettings,
) -> dict[str, torch.Tensor]:
    """`loss` and its parts: `lm_loss`, with a teacher `kl`, with settings.z_loss `z_loss`; [b, s] all.

    labels [b, s], logits [b, s, V/tp], or of a cached teacher the most probable tokens; weight a scalar, of no effect
    without a teacher.
    loss = (1 - weight) lm_loss + weight kl + z_loss, without a teacher lm_loss + z_loss; what layers add to it is
    `AttentionMatching`'s. kl = temperature^2 KL(teacher || student), z_loss the setting of that name times the squared
    logarithm of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5).
    """
    group: Any = parallel_state.get_tensor_model_parallel_group()
    temperature = settings.distillation.temperature
    lm_loss, kl, normaliser = vocab_parallel_losses(student, teacher, labels, temperature, group)
    loss, parts = lm_loss, {"lm_loss": lm_loss}
    if teacher is not None:
        loss, parts["kl"] = (1 - weight) * lm_loss + weight * kl, kl
    if settings.z_loss > 0:
        parts["z_loss"] = settings.z_loss * normaliser.square()
        loss = loss + parts["z_loss"]
    return {"loss": loss, **parts}
