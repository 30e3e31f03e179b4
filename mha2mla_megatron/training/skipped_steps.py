"""Steps that change no weight: the loss or the gradients are not finite, or the gradient norm is far above the usual.

The run stops there, or leaves them out and counts them.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from typing import Any

import torch
from megatron.core import parallel_state

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.position import Position
from mha2mla_megatron.training.step import StepResult


class SkippedSteps:
    """Decides about each step, and counts the ones left out; every process decides the same.

    run: the values of a saved run, from which it goes on; those of an earlier version have no counts. position: its
    place in the order of the samples.
    """

    def __init__(self, settings: FinetuneSettings, run: dict[str, Any], position: Position) -> None:
        self.settings, self.position = settings, position
        self.skipped, self.in_a_row = run.get("skipped", 0), run.get("skipped_in_a_row", 0)
        self.norms: deque[float] = deque(run.get("grad_norms", []), maxlen=settings.optimizer.spike_window)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        counts: dict[str, Any] = {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}
        return counts if self.settings.optimizer.spike_factor is None else {**counts, "grad_norms": list(self.norms)}

    def is_usual(self, norm: float) -> bool:
        """Whether a gradient norm is no spike: none is before spike_window updates are known."""
        wanted = self.settings.optimizer
        if wanted.spike_factor is None or len(self.norms) < wanted.spike_window:
            return True
        return norm <= wanted.spike_factor * statistics.median(self.norms)

    def check(self, step: int, result: StepResult) -> None:
        """Look at the result of `step`, which counts from 1.

        Raises UserError, with the weights as they were before the step, where the run is not to go on.
        """
        if result.updated:
            self.in_a_row = 0
            if self.settings.optimizer.spike_factor is not None:
                self.norms.append(result.grad_norm)
            return
        found = (
            f"step {step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}, in {self._where(step, result)}"
        )
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            usual = statistics.median(self.norms)
            found += f", {result.grad_norm / usual:.4g} times the median {usual:.4g} of {len(self.norms)} updates"
        elif self.settings.on_nan == "stop":
            raise UserError(f"{found}; no weight was changed. on_nan=skip leaves such steps out")
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.settings.max_skips_in_a_row:
            raise UserError(f"{found}; {self.in_a_row} steps in a row, max_skips_in_a_row is {self.in_a_row - 1}")
        if torch.distributed.get_rank() == 0:
            print(f"warning: {found}: left out ({self.skipped} so far)", file=sys.stderr, flush=True)

    def _where(self, step: int, result: StepResult) -> str:
        """The samples of the micro batches with such a loss; of the whole step where the loss of each was finite."""
        size, first = self.settings.micro_batch_size, self.position.at(step - 1)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = [first + (index * ranks + rank) * size for index in result.bad_micro_batches]
        gathered: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, mine)
        starts = sorted({start for part in gathered for start in part})
        spans = [(start, start + size - 1) for start in starts] or [
            (first, first + self.settings.global_batch_size - 1)
        ]
        return "samples " + ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
