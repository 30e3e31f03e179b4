"""A cache of slots: sequences of different lengths side by side in tensors that are allocated once.

It holds whatever two tensors a layer caches: the latents of a converted model, the keys and values of an original one.
A forward goes over consecutive slots, so the sequences in use stay in the first ones, and where one ends the last
takes its place (`move`). A step then reads views of the cache and copies nothing.

Shape letters: b slots of a forward, s new tokens, t rows of the longest slot of a forward, n heads, w width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Place:
    """Where the tokens of the next forward go; one object for all layers."""

    first: int
    """The first slot."""
    longest: int
    """Rows that the longest of the slots has already."""
    positions: torch.Tensor
    """[b, s]: the row of each new token in its slot."""


class SlotLayer(CacheLayerMixin):
    """One layer: keys [slots, n, max_length, w], and values with a width of their own."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(self.cache.slots, x.shape[1], self.cache.max_length, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' states [b, n, s, w]; return views [b, n, t, w] of their slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.cache.place
        batch, length = place.positions.shape
        row = torch.arange(batch, device=place.positions.device)[:, None]
        seen = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            assert held is not None
            slots = held[place.first : place.first + batch]
            slots[row, :, place.positions] = new.transpose(1, 2)  # two index tensors around a slice: [b, s, n, w]
            seen.append(slots[:, :, : place.longest + length])
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        return self.cache.place.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.max_length


class SlotCache(Cache):
    """num_layers layers of so many slots, max_length rows each; all of it is allocated at the first forward."""

    def __init__(self, num_layers: int, slots: int, max_length: int) -> None:
        self.slots, self.max_length = slots, max_length
        self.place = Place(0, 0, torch.empty(0, 0, dtype=torch.long))
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in (layer.keys, layer.values) if part is not None)

    def inputs(self, tokens: torch.Tensor, first: int, lengths: Sequence[int]) -> dict[str, Any]:
        """The model's arguments to let tokens [b, s] follow the lengths[i] tokens of slot first + i.

        A sequence without a past has no mask: causal, and a converted model attends in the expanded form. Others get a
        bool mask [b, 1, s, t]: each sees the rows of its own slot that are written. Raises ValueError where slots or
        rows are not enough.
        """
        batch, new = tokens.shape
        if first + batch > self.slots or max(lengths) + new > self.max_length or len(lengths) != batch:
            raise ValueError(
                f"{batch} sequence(s) from slot {first} on, of {max(lengths)} + {new} tokens at most: this cache has "
                f"{self.slots} slots of {self.max_length} tokens"
            )
        start = torch.tensor(lengths, device=tokens.device)
        positions = start[:, None] + torch.arange(new, device=tokens.device)
        self.place = Place(first, max(lengths), positions)
        mask = None
        if any(lengths) or batch > 1:
            rows = torch.arange(self.place.longest + new, device=tokens.device)
            mask = (rows <= positions[:, :, None])[:, None]
        return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, "past_key_values": self}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` rows of one slot to another."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                assert held is not None
                held[target, :, :length] = held[source, :, :length]
