"""Steps whose loss or gradients are not finite: the run stops there, or leaves them out, and names their samples."""

from __future__ import annotations

import sys

import torch
from megatron.core import parallel_state

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.step import StepResult


class NonFiniteSteps:
    """Decides about each step, and counts the ones left out; every process decides the same.

    skipped, in_a_row: the counts so far, of the whole run and up to its last step.
    """

    def __init__(self, settings: FinetuneSettings, skipped: int, in_a_row: int) -> None:
        self.settings, self.skipped, self.in_a_row = settings, skipped, in_a_row

    def check(self, step: int, result: StepResult) -> None:
        """Look at the result of `step`, which counts from 1.

        Raises UserError, with the weights as they were before the step, where the run is not to go on.
        """
        if result.updated:
            self.in_a_row = 0
            return
        found = (
            f"step {step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}, in {self._where(step, result)}"
        )
        if self.settings.on_nan == "stop":
            raise UserError(f"{found}; no weight was changed. on_nan=skip leaves such steps out")
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.settings.max_skips_in_a_row:
            raise UserError(f"{found}; {self.in_a_row} steps in a row, max_skips_in_a_row is {self.in_a_row - 1}")
        if torch.distributed.get_rank() == 0:
            print(f"warning: {found}: left out ({self.skipped} so far)", file=sys.stderr, flush=True)

    def _where(self, step: int, result: StepResult) -> str:
        """The samples of the micro batches with such a loss; of the whole step where the loss of each was finite."""
        size, first = self.settings.micro_batch_size, (step - 1) * self.settings.global_batch_size
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = [first + (index * ranks + rank) * size for index in result.bad_micro_batches]
        gathered: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, mine)
        starts = sorted({start for part in gathered for start in part})
        spans = [(start, start + size - 1) for start in starts] or [
            (first, first + self.settings.global_batch_size - 1)
        ]
        return "samples " + ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
