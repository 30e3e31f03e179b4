"""A step folder as the model that it stands for: the trained tensors or their averages, with low-rank updates added to
their matrices."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import torch

from mha2mla_megatron.checkpoint.adapters import ALPHA, adapter_names
from mha2mla_megatron.checkpoint.average import average_name
from mha2mla_megatron.checkpoint.megatron import TorchDistReader
from mha2mla_megatron.errors import UserError


class MergedReader(TorchDistReader):
    """As its parent; a matrix with a low-rank update is W + alpha / r B A, computed in float32, in the type of W.

    averaged: take the average of each tensor that has one, in the tensor's type.
    """

    def __init__(self, folder: Path, averaged: bool = False) -> None:
        super().__init__(folder)
        self.averaged = averaged

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, names = self._chosen(name), adapter_names(name)
        if all(each in self.entries for each in names):
            a, b = (self._chosen(each).float() for each in names)
            weight = weight.float() + self._alpha / len(a) * (b @ a)
        return weight.to(self.entries[name].properties.dtype)

    def _chosen(self, name: str) -> torch.Tensor:
        average = average_name(name)
        return super().__getitem__(average if self.averaged and average in self.entries else name)

    @cached_property
    def _alpha(self) -> float:
        alpha = self.values().get("run", {}).get(ALPHA)
        if not isinstance(alpha, float) or not 0 < alpha < math.inf:
            raise UserError(f"{self.folder}: has low-rank updates, but does not say their {ALPHA} ({alpha!r})")
        return alpha
