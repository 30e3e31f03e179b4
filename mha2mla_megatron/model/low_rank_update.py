"""Linear layers of Megatron with a trained low-rank update of their weight (LoRA, Hu et al., arXiv 2106.09685).

The update is added to the weight, not to the output: each forward pass forms W + factor B A of a process's part of the
layer. Whatever the layer does with its weight (parallelism, a fused norm, Transformer Engine's kernels) is done with
that one, in the weight's type, as if it had been trained itself.

Shape letters: n rows and m columns of this process's part of the weight, r rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from mha2mla_megatron.checkpoint.adapters import FIRST, SECOND, adapter_names
from mha2mla_megatron.layout_plan.shards import split_dim
from mha2mla_megatron.model.provider import parameters_of
from mha2mla_megatron.model.rebuilding import rebuilt


class LowRankUpdate(torch.nn.Module):
    """Stands before the class of a linear layer: its forward pass sees weight + factor lora_B lora_A as `weight`.

    lora_A: [r, m], lora_B: [n, r]. Of a layer that is split by rows (n), A is the same on all tensor-parallel
    processes, of one split by columns (m), B; each sees a part of that one's gradient, and they are summed.

    Autograd keeps no updated weight but forms it again in the backward pass, bit for bit.
    """

    weight: torch.nn.Parameter
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_factor: float
    split: int | None
    """Of the weight, over tensor-parallel processes; None: each has all of it."""
    stacked: bool
    """Whether the rows are those of two matrices, each split by itself: gate and up."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's."""
        updated = self._updated_weight()
        self.__dict__["weight"] = updated  # found before the parameter of that name
        try:
            with rebuilt([updated], [self._updated_weight]):
                return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["weight"]

    def _updated_weight(self) -> torch.Tensor:
        """[n, m], in the weight's type: one product, rounded once."""
        a, b, group = self.lora_A, self.lora_B, _tp_group()
        if self.split == 0:
            a = copy_to_tensor_model_parallel_region(a, group)
        elif self.split == 1:
            b = copy_to_tensor_model_parallel_region(b, group)
        return torch.addmm(self.weight, b, a, alpha=self.lora_factor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For `dist_checkpointing`: where the parts of the layer, and of its update, are in the whole ones."""
        places = {0: {"weight": 0, "bias": 0, SECOND: 0}, 1: {"weight": 1, FIRST: 1}, None: {}}[self.split]
        groups = dict(tp_group=_tp_group(), dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"])
        state = self.state_dict(prefix="", keep_vars=True)
        placed = make_sharded_tensors_for_checkpoint(state, prefix, places, sharded_offsets, **groups)
        if self.stacked:  # for weight and bias the MLP does it
            second = f"{prefix}{SECOND}"
            placed[second] = apply_swiglu_sharded_factory(placed[second], sharded_offsets)
        return placed


def add_low_rank_updates(model: Any, shapes: Mapping[str, tuple[int, ...]], factor: float, seed: int) -> None:
    """Give linear layers of this process's part of a chunk updates. To be called before gradient buffers are made.

    shapes: Megatron name -> shape of each whole A and B. A is uniform within +-1 / sqrt(columns), the same at any
    layout, and B is 0, so that the model is what it was.
    """
    names = {parameter: name for name, parameter in parameters_of(model)}
    for layer in list(model.modules()):
        weight = names.get(getattr(layer, "weight", None), "")
        first, _ = adapter_names(weight)
        if first in shapes:
            split = split_dim(weight, tuple(layer.weight.shape))
            _add(layer, _initial(first, shapes[first], seed), factor, split, stacked=".linear_fc1." in weight)


def _add(layer: Any, a: torch.Tensor, factor: float, split: int | None, stacked: bool) -> None:
    """a: of the whole weight, float32 [r, columns]."""
    weight, group = layer.weight, _tp_group()
    if split == 1:
        a = a.chunk(group.size(), dim=1)[group.rank()]
    layer.lora_A = torch.nn.Parameter(a.to(weight).contiguous())
    layer.lora_B = torch.nn.Parameter(weight.new_zeros(len(weight), len(a)))
    layer.lora_factor, layer.split, layer.stacked = factor, split, stacked
    if split is None:  # under sequence parallelism each process sees a part of the tokens
        parameter: Any
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.sequence_parallel = getattr(weight, "sequence_parallel", False)
    else:
        own = layer.lora_B if split == 0 else layer.lora_A
        set_tensor_model_parallel_attributes(own, is_parallel=True, dim=split, stride=1)
    layer.__class__ = type(f"LowRank{type(layer).__name__}", (LowRankUpdate, type(layer)), {})


def _initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A's values, which depend on its name and the seed alone."""
    chance = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=chance)


def _tp_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()
