"""An exponential moving average of the trained weights: the setting optimizer.ema_decay.

Each data-parallel process has the average of the range of every parameter whose master weights it updates, so that
nothing is exchanged. It is no part of the optimizer's state: that is of the optimizer inside Megatron's, which may be
another library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mha2mla_megatron.checkpoint.average import AVERAGE
from mha2mla_megatron.training.own_shards import joined, own_pieces, own_ranges, parts_of, places_of


class WeightAverage:
    """average <- decay average + (1 - decay) weight, of this process's part of the float32 master weights.

    It begins as the weights are when it is made. Parameters without optimizer state, which are frozen, have none.
    """

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.parts = parts_of(optimizer)
        self.tensors = [weight.clone() for weight in self._weights()]
        """Of each range, flat, float32."""
        self._move = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """To be called after each step that changed the weights."""
        if self.tensors:  # a pipeline stage may have nothing to train
            self._move(self.tensors, list(self._weights()), 0)

    def placed(self, model_state: Any) -> dict[int, dict[int, Any]]:
        """Number of the range -> place in it -> piece of the whole average, as checkpoints name it.

        model_state: where Megatron places the weights.
        """
        places = places_of(model_state)
        ranges = (found for part in self.parts for found in own_ranges(part))
        return {
            number: dict(own_pieces(places[weight], start, stop, average, AVERAGE))
            for number, ((weight, start, stop), average) in enumerate(zip(ranges, self.tensors, strict=True))
        }

    def take(self, loaded: dict[int, dict[int, torch.Tensor]]) -> None:
        """Go on from what was loaded for `placed`."""
        for number, average in enumerate(self.tensors):
            average.copy_(joined(loaded[number]))

    def _weights(self) -> Iterator[torch.Tensor]:
        """The master weights of each range, flat, as they are now."""
        for part in self.parts:
            for weight, *_ in own_ranges(part):
                # Not by way of the optimizer's state: where that is empty, to ask for it leaves something in it.
                group, index = part.model_param_group_index_map[weight]
                yield part.optimizer.param_groups[group]["params"][index].detach()
