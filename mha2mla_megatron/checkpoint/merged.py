"""A step folder as the model that it stands for: low-rank updates added to their matrices."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from mha2mla_megatron.checkpoint.adapters import ALPHA, adapter_names
from mha2mla_megatron.checkpoint.megatron import TorchDistReader
from mha2mla_megatron.errors import UserError


class MergedReader(TorchDistReader):
    """As its parent; a matrix with a low-rank update is W + alpha / r B A, computed in float32, in the type of W."""

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, names = super().__getitem__(name), adapter_names(name)
        if any(each not in self.entries for each in names):
            return weight
        a, b = (TorchDistReader.__getitem__(self, each).float() for each in names)
        return (weight.float() + self._alpha / len(a) * (b @ a)).to(weight.dtype)

    @cached_property
    def _alpha(self) -> float:
        alpha = self.values().get("run", {}).get(ALPHA)
        if not isinstance(alpha, float) or not 0 < alpha < math.inf:
            raise UserError(f"{self.folder}: has low-rank updates, but does not say their {ALPHA} ({alpha!r})")
        return alpha
