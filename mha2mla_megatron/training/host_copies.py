"""Copies of a process's tensors in its host's memory, which training may go on beside."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 64
"""Bytes at whose multiples copies begin: a cache line, and enough for every type."""


class HostCopies:
    """Takes copies of tensors.

    kept: into the same memory each time, whose pages are then made, and for a GPU pinned, only once.
    """

    def __init__(self, kept: bool) -> None:
        self.kept = kept
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of the tensors; where the memory is kept, in the place of those taken before.

        Each has a storage of its own size, since all of a tensor's storage is what `torch.save` writes.
        """
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        *starts, end = itertools.accumulate(sizes, initial=0)
        content = self._memory(end).numpy()
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            flat = torch.frombuffer(content, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            copies.append(flat.view(tensor.shape).copy_(tensor, non_blocking=True))
        torch.cuda.synchronize()
        return copies

    def _memory(self, size: int) -> torch.Tensor:
        """uint8 [size] or more."""
        if not self.kept:
            return torch.empty(size, dtype=torch.uint8)
        if size > self.memory.numel():
            self.memory = torch.empty(size, dtype=torch.uint8)
            if torch.cuda.is_available():
                _pin(self.memory)
        return self.memory


def _pin(memory: torch.Tensor) -> None:
    """Let a GPU write to the memory by itself. (torch's own pinned memory is rounded up to a power of two.)"""
    cudart: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, memory.numel(), 0))
    weakref.finalize(memory, cudart.cudaHostUnregister, address)
