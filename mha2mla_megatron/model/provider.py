"""From an Architecture to Megatron-core's model. The only file that names the model class."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.frequencies import inverse_frequencies
from mha2mla_megatron.model.cpu_mode import has_transformer_engine
from mha2mla_megatron.model.experts import expert_settings
from mha2mla_megatron.model.implementation import choose_implementation
from mha2mla_megatron.model.layer_specs import layer_specs
from mha2mla_megatron.model.parallel import ParallelConfig

NOT_FOR_CONVERTED = ("apply_rope_fusion", "fused_single_qkv_rope", "flash_decode", "tp_comm_overlap")
"""TransformerConfig switches for kernels that take one rotary table for all heads, or one fused qkv projection."""


def transformer_config(
    architecture: Architecture, parallel: ParallelConfig, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron's config of this model.

    dtype: of the weights and activations, float32 or bfloat16. overrides: any other TransformerConfig fields.
    Raises UserError for a switch that the converted attention cannot work with, and for a router that is not there.
    """
    if architecture.mla is not None:
        for name in NOT_FOR_CONVERTED:
            if overrides.get(name):
                raise UserError(f"{name}: not possible with the converted attention; leave it off")
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    on_gpu = torch.cuda.is_available()
    layers, window = range(architecture.num_layers), architecture.sliding_window
    settings: dict[str, Any] = dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        # Of a converted model too, whose queries and keys may be wider.
        softmax_scale=architecture.head_dim**-0.5,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=architecture.mlp_bias,
        add_qkv_bias=architecture.qkv_bias,
        # The converted attention has norms and no rotation of its own accord.
        qk_layernorm=architecture.qk_norm and architecture.mla is None,
        no_rope_freq=[int(layer in architecture.no_rope_layers) for layer in layers]
        if architecture.no_rope_layers and architecture.mla is None
        else None,
        # Tokens before a query's own; the other list says which layers have the window.
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None
        if window is None
        else [int(layer in architecture.window_layers) for layer in layers],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        # Two stages would send each other two tensors at once, which a batch of messages cannot tell apart.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        sequence_parallel=parallel.uses_sequence_parallel,
        # One name per layer in checkpoints, since the shapes of converted layers may differ.
        hetereogenous_dist_checkpoint=True,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=architecture.mla is None and has_transformer_engine(),
        cross_entropy_loss_fusion=has_transformer_engine(),
        cross_entropy_fusion_impl="te" if has_transformer_engine() else "native",
        # With the local linear layers this would need apex.
        gradient_accumulation_fusion=False,
    )
    if architecture.experts is not None:
        settings |= expert_settings(architecture.experts, architecture.num_layers)
    return TransformerConfig(**{**settings, **overrides})


def build_model(
    architecture: Architecture,
    config: TransformerConfig,
    implementation: str = "auto",
    vp_stage: int | None = None,
) -> GPTModel:
    """This process's part of the model, with random weights and on its device.

    config: from `transformer_config`. vp_stage: which of its chunks, from 0, where it has several. The first chunk of
    all holds the embedding, the last one the output layer, whose logits stay split over the vocabulary between
    tensor-parallel processes. Call `initialize_parallel` before.

    Raises UserError for a rope scaling that cannot be reproduced exactly, and for an implementation that is not here.
    """
    chosen = choose_implementation(implementation)
    frequencies = inverse_frequencies(architecture)
    with _no_deprecation_notice():
        model = GPTModel(
            config,
            layer_specs(architecture, config, chosen, vp_stage),  # type: ignore[arg-type]
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
    model.rotary_pos_emb.inv_freq = frequencies
    return model


def build_on_device(
    architecture: Architecture,
    config: TransformerConfig,
    implementation: str,
    device: torch.device,
    vp_stage: int | None = None,
) -> MegatronModule:
    """`build_model` of a run's settings, in Megatron's wrapper for 16-bit weights where the config says bf16."""
    model = build_model(architecture, config, implementation, vp_stage).to(device)
    return _Module16(config, model) if config.bf16 else model


class _Module16(Float16Module):
    """Its results stay in 16 bits: whatever makes a loss of logits takes them to float32 piece by piece."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


def sharded_weights(model: Any) -> dict[str, Any]:
    """The model's weights for `dist_checkpointing`, named alike for every implementation.

    Linear layers add an `_extra_state`, the scales of quantised kernels; none are used here, and it is left out.
    """
    state = model.sharded_state_dict()
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def parameters_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the whole model, as in checkpoints, parameter) of what this process holds of a chunk."""
    names = {name: entry.key for name, entry in sharded_weights(model).items()}
    for name, parameter in model.named_parameters():
        yield names[name.removeprefix("module.")], parameter


@contextmanager
def _no_deprecation_notice() -> Iterator[None]:
    """GPTModel logs that HybridModel replaces it; that one takes neither our layers nor the models' rope scaling."""
    logger = logging.getLogger(GPTModel.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
