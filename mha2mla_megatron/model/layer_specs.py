"""The parts that the layers are built from: Megatron-core's own (`local`) or Transformer Engine's.

Whatever the implementation, a model's checkpoint has the same names: those of Transformer Engine, where a norm that
only one linear layer reads belongs to that layer (`mlp.linear_fc1.layer_norm_weight`). The converted attention reads
the normalised input in several projections, so there the norm stands for itself: `input_layernorm.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.model.attention import MHA2MLASelfAttention, MHA2MLASelfAttentionSubmodules
from mha2mla_megatron.model.context_attention import GatheredAttention
from mha2mla_megatron.model.experts import with_experts
from mha2mla_megatron.model.implementation import (
    Implementation,
    fuses_projections,
    rotates_fused,
    uses_transformer_engine,
)
from mha2mla_megatron.model.plain_layers import RMSNorm


def layer_specs(
    architecture: Architecture, config: TransformerConfig, implementation: Implementation, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk `vp_stage`, and the final norm.

    A converted model has one spec a layer, since r and c may differ from layer to layer.
    """
    if not uses_transformer_engine(implementation):
        norm: Callable[..., Any] = RMSNorm
        backend: Any = LocalSpecProvider()
        layer = dataclasses.replace(
            get_gpt_layer_local_submodules(normalization="RMSNorm"), input_layernorm=norm, pre_mlp_layernorm=norm
        )
        core_attention: Any = GatheredAttention if config.context_parallel_size > 1 else backend.core_attention()
    else:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        norm, backend = TENorm, TESpecProvider()
        core_attention = backend.core_attention()
        layer = get_gpt_layer_with_transformer_engine_submodules()

    linear_proj = with_bias(backend.row_parallel_linear(), architecture.attention_output_bias)
    first = get_transformer_layer_offset(config, vp_stage)
    stage = range(first, first + get_num_layers_to_build(config, vp_stage))
    if architecture.mla is None:
        original = original_layer(architecture, layer, core_attention, linear_proj, norm)
        layers = dict.fromkeys(stage, original)
    else:
        column_parallel_linear = backend.column_parallel_linear()
        attention: type[MHA2MLASelfAttention] = MHA2MLASelfAttention
        if rotates_fused(implementation, architecture.qk_norm):
            from mha2mla_megatron.model import fused_attention as ours  # needs Triton

            attention = ours.RotatingMHA2MLASelfAttention
            if fuses_projections(implementation, architecture.qk_norm, bool(config.fp8)):
                attention = ours.FusedMHA2MLASelfAttention
                column_parallel_linear = ours.ColumnWeights
        parts = MHA2MLASelfAttentionSubmodules(
            column_parallel_linear=column_parallel_linear,
            core_attention=core_attention,
            linear_proj=linear_proj,
        )
        takes_widths = uses_transformer_engine(implementation)
        layers = {
            index: converted_layer(architecture, index, layer, attention, parts, norm, takes_widths) for index in stage
        }
    layers |= {
        index: with_experts(layers[index], backend, norm)
        for index in stage
        if architecture.experts_of(index) is not None
    }
    specs = [ModuleSpec(module=TransformerLayer, submodules=submodules) for submodules in layers.values()]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def original_layer(
    architecture: Architecture,
    layer: TransformerLayerSubmodules,
    core_attention: Callable[..., Any],
    linear_proj: Callable[..., Any],
    norm: Callable[..., Any],
) -> TransformerLayerSubmodules:
    """Upstream's layer with this core attention and the biases and norms of this model."""
    assert isinstance(layer.self_attention, ModuleSpec)
    parts: Any = layer.self_attention.submodules
    parts = dataclasses.replace(
        parts,
        linear_qkv=with_bias(parts.linear_qkv, architecture.qkv_bias),
        core_attention=core_attention,
        linear_proj=linear_proj,
    )
    if architecture.qk_norm:
        parts = dataclasses.replace(parts, q_layernorm=norm, k_layernorm=norm)
    return dataclasses.replace(layer, self_attention=dataclasses.replace(layer.self_attention, submodules=parts))


def converted_layer(
    architecture: Architecture,
    index: int,
    layer: TransformerLayerSubmodules,
    attention: type[MHA2MLASelfAttention],
    parts: MHA2MLASelfAttentionSubmodules,
    norm: Callable[..., Any],
    takes_widths: bool,
) -> TransformerLayerSubmodules:
    """Upstream's layer with our attention; `index` counts the model's layers from 0. takes_widths: whether core
    attention is to be told of keys and values that differ in width, as Transformer Engine's is."""
    names = {k: v for k, v in layer.sharded_state_dict_keys_map.items() if k != "input_layernorm."}
    layout = architecture.layout(index)
    if layout.qk_head_dim != layout.head_dim and takes_widths:
        core = partial(parts.core_attention, k_channels=layout.qk_head_dim, v_channels=layout.head_dim)
        parts = dataclasses.replace(parts, core_attention=core)
    spec = ModuleSpec(
        module=attention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "layout": layout,
            "qkv_bias": architecture.qkv_bias,
            "qk_norm": architecture.qk_norm,
        },
        submodules=parts,
    )
    return dataclasses.replace(layer, self_attention=spec, input_layernorm=norm, sharded_state_dict_keys_map=names)


def with_bias(build: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """`build` with `bias` whatever its caller asks for: Megatron-core has one setting for attention and MLP."""

    def built(*args: Any, **kwargs: Any) -> Any:
        return build(*args, **{**kwargs, "bias": bias})

    return built
