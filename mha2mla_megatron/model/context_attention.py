"""Attention over sequences that several processes share, in plain torch.

Shape letters: S sequence, n context-parallel processes, B batch, H query heads, G key/value heads, d head dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig


class GatheredAttention(DotProductAttention):
    """Megatron's attention of this process's queries to the keys and values of all.

    Megatron cuts a sequence into 2n pieces and gives process i the pieces i and 2n - 1 - i. The keys and values of all
    processes are gathered as they come, in the order of the processes; the mask knows where each of them belongs.
    In the backward pass their gradients are summed over the processes and scattered back.
    """

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)  # upstream refuses more than one process, which is what this class is for
        alone.context_parallel_size = 1
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Query [S/n, B, H, d], key and value [S/n, B, G, d] to [S/n, B, H * d]; causal, as every model here is."""
        assert attention_mask is None, "the mask is made here"
        key, value = (gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value))
        positions = [positions_of(rank, self.cp_group.size(), len(key)) for rank in range(self.cp_group.size())]
        mine, all_of_them = positions[self.cp_group.rank()], torch.cat(positions)
        hidden = (all_of_them > mine[:, None]).to(query.device)
        return super().forward(query, key, value, hidden[None, None], **kwargs)


def positions_of(rank: int, processes: int, length: int) -> torch.Tensor:
    """The positions that one process holds of a sequence of this length, in its order; int64 [length / processes]."""
    pieces = torch.arange(length).chunk(2 * processes)
    return torch.cat((pieces[rank], pieces[-1 - rank]))
