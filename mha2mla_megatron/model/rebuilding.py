"""Tensors that autograd does not keep for the backward pass, because there is a way to get them again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def rebuilt(tensors: list[torch.Tensor], ways: list[Callable[[], torch.Tensor]]) -> AbstractContextManager[None]:
    """In this context autograd keeps, of each of `tensors`, only the way to get it again, bit for bit, in any shape.

    The tensors must live as long as the context: they are known by their memory. Ways must not mention them: they would
    live on.
    """
    known = {(tensor.data_ptr(), tensor.numel()): way for tensor, way in zip(tensors, ways, strict=True)}
    del tensors

    def pack(tensor: torch.Tensor) -> Any:
        way = known.get((tensor.data_ptr(), tensor.numel()))
        return tensor if way is None else (way, tensor.shape, tensor.stride())

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        way, shape, stride = kept
        return way().as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
