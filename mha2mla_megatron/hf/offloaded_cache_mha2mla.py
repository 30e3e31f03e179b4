"""What `generate(cache_implementation="offloaded")` keeps: latents in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache


class OffloadedLatentCache(DynamicCache):
    """transformers' offloaded cache, in whose order of copies nothing is read before it is written.

    A layer leaves for the host on the stream that computes and comes back on another one. transformers lets the first
    wait for the second, not the second for the first: where a GPU is behind its host, a layer may come back before it
    has arrived there, into memory that an attention still reads.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config, offloading=True)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)


__all__ = ["OffloadedLatentCache"]
