"""What a model's rotary scaling makes of its frequencies and of its scores, and which kinds of it can be trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mha2mla_megatron.architecture import Architecture, read_config, rope_key
from mha2mla_megatron.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the sequence's length."""


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """The model's rotary frequencies after its own scaling, as transformers computes them: float32 [d/2].

    Raises UserError for a kind of scaling that depends on the sequence or scales the attention too.
    """
    rope = architecture.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported; valid: {', '.join(ROPE_TYPES)}")
    rotary = _rotary_embedding(architecture)
    if rotary.attention_scaling != 1.0:
        raise UserError(
            f"rope_type {rope['rope_type']!r} with an attention factor of {rotary.attention_scaling:g} "
            "is not supported; valid: attention_factor 1"
        )
    # A plain tensor, not a module's buffer: as in Megatron, casting the model to bf16 must leave it alone.
    return rotary.inv_freq.clone()


def warn_of_untrainable_scaling(architecture: Architecture, source: Path) -> None:
    """Say, of a model that becomes a Megatron checkpoint, that its rotary scaling cannot be trained there.

    source: the folder whose config.json has it.
    """
    if architecture.rope_parameters["rope_type"] == "default":
        return  # what follows asks transformers, which takes seconds to import
    try:
        inverse_frequencies(architecture)
    except UserError as error:
        where = f"{source / 'config.json'}: {rope_key(read_config(source))}"
        line = f"{where}: {error}; the checkpoint can be converted back, but tools/finetune.py will refuse it"
        print(f"warning: {line}", file=sys.stderr, flush=True)


def attention_factor(architecture: Architecture) -> float:
    """What transformers multiplies cos and sin by, and so the scores of rotated dims twice; 1 for most models.

    Raises UserError where the config's rotary parameters give none, or are not those of a kind that transformers knows.
    """
    if architecture.rope_parameters["rope_type"] == "default":
        return 1.0
    factor = _rotary_embedding(architecture).attention_scaling
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise UserError(f"rope_parameters: an attention factor of {factor!r}; a number above 0 is needed")
    return float(factor)


def _rotary_embedding(architecture: Architecture) -> LlamaRotaryEmbedding:
    """transformers' own, for the model's rotary parameters."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = architecture.rope_parameters
    try:
        return LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=architecture.hidden_size,
                num_attention_heads=architecture.num_attention_heads,
                head_dim=architecture.head_dim,
                max_position_embeddings=architecture.max_position_embeddings,
                rope_parameters=dict(rope),
            )
        )
    except Exception as error:  # many kinds, by what is missing or of another type
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"rope_parameters: not valid for rope_type {rope['rope_type']!r} ({reason})") from None
