"""Student and teacher side by side in Megatron's schedules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.utils import get_attr_wrapped_model, get_model_config


class TaughtChunk(torch.nn.Module):
    """A chunk of the student and that of the teacher in the same place, which a schedule takes for one chunk.

    From stage to stage both models' hidden states travel as one tensor [s, b, h + h'] whose numbers are those of the
    student [s, b, h] and then those of the teacher [s, b, h'], so that each is contiguous. (s tokens that this process
    has of a sample between the layers, b samples, h and h' hidden sizes.) Its gradient is 0 in the teacher's part.
    """

    def __init__(self, student: DistributedDataParallel, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.module = student  # the name by which Megatron looks into wrappers
        self.teacher = teacher
        self.is_last = get_attr_wrapped_model(student, "post_process")
        # The schedule's own config: the width of what it sends, and whose gradients it completes.
        self.config = copy.copy(student.config)
        self.width = self.config.hidden_size
        self.config.hidden_size += get_model_config(teacher).hidden_size
        self.config.finalize_model_grads_func = _finalize_students

    def set_is_first_microbatch(self) -> None:
        self.module.set_is_first_microbatch()

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        """What the chunk before gave, None in the first one."""
        (packed,) = received
        student = teacher = None
        if packed is not None:
            sequence, samples, both = packed.shape
            flat, number = packed.view(-1), sequence * samples * self.width
            student = flat[:number].view(sequence, samples, self.width)
            teacher = flat.detach()[number:].view(sequence, samples, both - self.width)
        for model, own in ((self.module, student), (self.teacher, teacher)):
            set_input_tensor: Any = get_attr_wrapped_model(model, "set_input_tensor")
            set_input_tensor(own)

    def forward(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the last chunk the logits [b, s, V/tp] of student and teacher; from others what is sent on, and None.

        tokens, position_ids [b, s]; mask: None for causal attention.
        """
        with torch.no_grad():
            teacher = self.teacher(tokens, position_ids, mask)
        student = self.module(tokens, position_ids, mask)
        if self.is_last:
            return student, teacher
        return torch.cat((student.flatten(), teacher.flatten())).view(*student.shape[:2], -1), None


def _finalize_students(chunks: Sequence[TaughtChunk], *arguments: Any, **named: Any) -> None:
    finalize_model_grads([chunk.module for chunk in chunks], *arguments, **named)
