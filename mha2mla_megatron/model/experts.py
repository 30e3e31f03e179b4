"""Megatron's mixture of experts, with one name in checkpoints for each expert's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mha2mla_megatron.experts import Experts


class NamedExperts(SequentialMLP):
    """Upstream saves all experts of a layer as one tensor. Here each is saved like an MLP of its own: under its name,
    as in Hugging Face's files, and in pieces that are rows, as `training/own_shards.py` needs them."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        expert: Any
        for index, expert in enumerate(self.local_experts):
            state.update(expert.sharded_state_dict(f"{prefix}local_experts.{index}.", sharded_offsets, metadata))
        return state


def expert_settings(experts: Experts, num_layers: int) -> dict[str, Any]:
    """TransformerConfig's fields for these experts, without losses that balance their load.

    Raises UserError for a router that Megatron does not have.
    """
    experts.check_router()
    return dict(
        num_moe_experts=experts.num_experts,
        moe_layer_freq=[int(layer in experts.layers) for layer in range(num_layers)],
        moe_ffn_hidden_size=experts.intermediate_size,
        moe_router_topk=experts.num_experts_per_tok,
        # The softmax of the chosen experts' logits is that of all, divided by the sum of the chosen ones.
        moe_router_pre_softmax=not experts.norm_topk_prob,
        moe_router_load_balancing_type="none",
    )


def with_experts(
    layer: TransformerLayerSubmodules, backend: Any, norm: Callable[..., Any]
) -> TransformerLayerSubmodules:
    """The layer with experts for its feed-forward. Router and experts read the norm, which stands for itself."""
    parts = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    mlp = partial(MoELayer, submodules=MoESubmodules(experts=partial(NamedExperts, submodules=parts)))
    names = {k: v for k, v in layer.sharded_state_dict_keys_map.items() if k != "pre_mlp_layernorm."}
    return dataclasses.replace(layer, pre_mlp_layernorm=norm, mlp=mlp, sharded_state_dict_keys_map=names)
