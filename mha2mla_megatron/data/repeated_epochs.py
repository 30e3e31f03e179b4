"""Epochs that are all cut into samples in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch

if TYPE_CHECKING:
    from mha2mla_megatron.data.teacher_cache import CachedSource


class RepeatedEpochs(torch.utils.data.Dataset):
    """The samples of one epoch, and the same ones in every later epoch, in another order each.

    dataset: the `size` samples of an epoch, shuffled. predictions: what a teacher says of them, added to each; None:
    nothing is.
    """

    def __init__(self, dataset: Any, size: int, seed: int, predictions: CachedSource | None) -> None:
        self.dataset, self.size, self.seed, self.predictions = dataset, size, seed, predictions
        self.orders: dict[int, numpy.ndarray] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, number = divmod(index, self.size)
        if epoch > 0:
            number = int(self._order(epoch)[number])
        sample = self.dataset[number]
        if self.predictions is None:
            return sample
        return {**sample, **self.predictions.of_sample(number, sample["tokens"])}

    def _order(self, epoch: int) -> numpy.ndarray:
        """A permutation of the epoch's samples. Epochs are read one after another: two at once are enough."""
        if epoch not in self.orders:
            self.orders = {other: order for other, order in self.orders.items() if other >= epoch - 1}
            # The old generator, whose numbers stay the same whatever numpy's version.
            self.orders[epoch] = numpy.random.RandomState([self.seed, epoch]).permutation(self.size)
        return self.orders[epoch]
