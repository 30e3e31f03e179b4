"""What a model's rotary pairs turn with."""

from __future__ import annotations

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the sequence's length."""


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """The model's rotary frequencies after its own scaling, as transformers computes them: float32 [d/2].

    Raises UserError for a kind of scaling that depends on the sequence or scales the attention too.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = architecture.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported; valid: {', '.join(ROPE_TYPES)}")
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=architecture.hidden_size,
            num_attention_heads=architecture.num_attention_heads,
            head_dim=architecture.head_dim,
            max_position_embeddings=architecture.max_position_embeddings,
            rope_parameters=dict(rope),
        )
    )
    if rotary.attention_scaling != 1.0:
        raise UserError(
            f"rope_type {rope['rope_type']!r} with an attention factor of {rotary.attention_scaling:g} "
            "is not supported; valid: attention_factor 1"
        )
    # A plain tensor, not a module's buffer: as in Megatron, casting the model to bf16 must leave it alone.
    return rotary.inv_freq.clone()
