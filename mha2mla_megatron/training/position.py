"""Where a run stands in the order of its samples, and what that order depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mha2mla_megatron.data.blend import blend_weights, source_names
from mha2mla_megatron.data.dataset import documents_digest
from mha2mla_megatron.training.config import FinetuneSettings


@dataclass(frozen=True)
class Position:
    """Samples `first` to `total` - 1 are still to come, from step `step` on, which counts from 0.

    order: what decides which sample is the n-th, as plain values by the settings' names.
    """

    step: int
    first: int
    total: int
    batch: int
    order: dict[str, Any]

    @classmethod
    def of(cls, settings: FinetuneSettings, step: int, first: int) -> Position:
        data, batch = settings.data, settings.global_batch_size
        total = first + (settings.steps - step) * batch
        shares = blend_weights("data.train", data.train)
        order = {
            # The files may have moved since.
            "data.train": [list(pair) for pair in zip(source_names(data.train), shares.values(), strict=True)],
            "documents of data.train (digests of the .idx files)": [documents_digest(prefix) for prefix in shares],
            "data.split": list(data.shares),
            "data.sequence_length": data.sequence_length,
            "seed": settings.seed,
            "whether epochs are cut alike (distillation.cache)": settings.distillation.cache is not None,
            # Megatron shuffles all epochs but the last together, so their number matters.
            "samples of the whole run (steps x global_batch_size)": total,
        }
        return cls(step, first, max(total, first), batch, order)

    def at(self, step: int) -> int:
        """Samples taken after so many steps."""
        return self.first + (step - self.step) * self.batch

    def changes(self, before: dict[str, Any]) -> list[str]:
        """A line for each setting that gives another order than `before`, the one the run had when it was saved."""
        return [
            f"{key} was {before[key]} and is {now}: samples come in another order than before, so that some will be "
            "seen twice and some not at all"
            for key, now in self.order.items()
            if key in before and before[key] != now and self.step > 0
        ]
