"""How many bytes autograd keeps for backward passes, counted through torch's own hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SavedActivations:
    """Bytes of all storages kept at once, those of the models' parameters left out; `peak` is the largest seen."""

    def __init__(self, *models: torch.nn.Module) -> None:
        self.left_out = {part.untyped_storage().data_ptr() for model in models for part in model.parameters()}
        self.uses: Counter[int] = Counter()
        self.bytes = self.peak = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor):
            yield


class _Kept:
    """One saved tensor; it goes when the graph lets go of it, and keeps its storage's address from being used again."""

    def __init__(self, owner: SavedActivations, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.owner, self.tensor, self.key, self.size = owner, tensor, storage.data_ptr(), storage.nbytes()
        if self.key in owner.left_out:
            return
        owner.uses[self.key] += 1
        if owner.uses[self.key] == 1:
            owner.bytes += self.size
            owner.peak = max(owner.peak, owner.bytes)

    def __del__(self) -> None:
        if self.key in self.owner.left_out:
            return
        self.owner.uses[self.key] -= 1
        if self.owner.uses[self.key] == 0:
            self.owner.bytes -= self.size


def random_batch(samples: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A micro-batch as the data loader makes it."""
    tokens = torch.randint(0, vocabulary, (samples, length + 1))
    return {
        "tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(samples, -1), "loss_mask": torch.ones(samples, length),
    }  # fmt: skip
