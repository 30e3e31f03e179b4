"""Mixtures of experts: the layers that have them, how a token's experts are chosen, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.families import ExpertNames, flag

if TYPE_CHECKING:
    import torch

MAX_EXPERTS = 1 << 16
"""Of all layers: more than any model has, and few enough to list their tensors."""


@dataclass(frozen=True)
class Experts:
    """A layer's router gives each expert a softmax probability; a token's output is the sum of those of its most
    probable experts, weighted by these probabilities."""

    names: ExpertNames

    layers: tuple[int, ...]
    """Counted from 0; the others have an ordinary feed-forward."""

    num_experts: int

    num_experts_per_tok: int

    intermediate_size: int
    """Of one expert."""

    norm_topk_prob: bool
    """Whether a token's weights are divided by their sum."""

    def check_router(self) -> None:
        """Raise UserError for a router that Megatron does not have."""
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            raise UserError(
                "num_experts_per_tok: 1, whose weight, divided by the sum, is always 1: Megatron has no such router"
            )

    def tensor_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Name under a layer -> shape of the router and of every expert."""
        h, m = hidden_size, self.intermediate_size
        projections = {self.names.gate_proj: (m, h), self.names.up_proj: (m, h), self.names.down_proj: (h, m)}
        return {f"{self.names.router}.weight": (self.num_experts, h)} | {
            f"{name.format(expert)}.weight": shape
            for expert in range(self.num_experts)
            for name, shape in projections.items()
        }

    def stacked(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor | None:
        """A tensor as transformers has it in memory, from those of the files; None for what is no part of experts.

        name: `model.layers.L.mlp.` and `gate.weight` (the router), `experts.gate_up_proj` [experts, 2 x width, h] or
        `experts.down_proj` [experts, h, width]. read: gives a tensor of the files.
        """
        layer, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            return read(f"{layer}.{self.names.router}.weight")
        rows = {
            "experts.gate_up_proj": (self.names.gate_proj, self.names.up_proj),
            "experts.down_proj": (self.names.down_proj,),
        }.get(part)
        if rows is None:
            return None
        import torch  # seconds, which all that read no tensor do without

        return torch.stack(
            [
                torch.cat([read(f"{layer}.{name.format(expert)}.weight") for name in rows])
                for expert in range(self.num_experts)
            ]
        )


def read_experts(
    config: Mapping[str, Any], names: ExpertNames | None, num_layers: int, number: Callable[..., int], source: str
) -> Experts | None:
    """A model's experts; None where no layer has any. number: reads a whole number of config.

    Raises UserError naming the key for what no model has.
    """
    if names is None:
        return None
    # Two names of one number: transformers reads both, and writes the second.
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    num_experts = number(key, maximum=MAX_EXPERTS // num_layers)
    chosen = number("num_experts_per_tok", maximum=num_experts)
    dense, step = config.get("mlp_only_layers") or [], number("decoder_sparse_step", 1)
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise UserError(f"{source}: mlp_only_layers={dense!r}; a list of layers, from 0, is needed")
    dense = set(dense)
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    if not layers:
        return None
    return Experts(
        names, layers, num_experts, chosen, number(names.intermediate_size), flag(config, names.norm_topk_prob)
    )
