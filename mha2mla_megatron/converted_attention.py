"""A converted attention layer as a running module, to be measured or trained in the place of the original one."""

from __future__ import annotations

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLAAttention


def make_attention(
    original: Architecture, layout: LatentLayout, tensors: dict[str, torch.Tensor], device: torch.device
) -> MHA2MLAAttention:
    """An exported model's module with these tensors (names under `self_attn.`), float32, weights without gradient."""
    config = MHA2MLALlamaConfig(
        hidden_size=original.hidden_size,
        num_attention_heads=original.num_attention_heads,
        num_key_value_heads=original.num_key_value_heads,
        head_dim=original.head_dim,
        attention_bias=original.qkv_bias,
        attention_output_bias=original.attention_output_bias,
        qk_norm=original.qk_norm,
        rms_norm_eps=original.rms_norm_eps,
        mha2mla={
            "partial_rope": {
                "qk_rope_head_dim": layout.qk_rope_head_dim,
                "qk_nope_head_dim": layout.qk_nope_head_dim,
                "shared": layout.shared_rope,
            },
            "low_rank": {
                "method": layout.method,
                "kv_lora_rank": layout.kv_lora_rank,
                "k_lora_rank": layout.k_lora_rank,
            },
        },
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        module = MHA2MLAAttention(config, 0)
    module.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()})
    return module.requires_grad_(False).eval()
