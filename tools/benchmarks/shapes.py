"""The shapes that the benchmarks are run with; no weights, and nothing that takes seconds to import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mha2mla_megatron.architecture import MLA_MODEL_TYPE, Architecture, parse_architecture
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig


@dataclass(frozen=True)
class Shape:
    """A model's shape and the batch that fills the GPU with it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    d_kv: int
    sequence_length: int
    micro_batch_size: int


SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 32, 64, 2),
    "small": Shape(512, 1536, 8, 8, 4, 32, 1024, 1),
    "135M": Shape(576, 1536, 30, 9, 3, 32, 2048, 16),
    "1.7B": Shape(2048, 8192, 24, 32, 32, 32, 2048, 8),
    "7B": Shape(4096, 11008, 8, 32, 32, 64, 4096, 2),
}
"""d_kv = d/2 and r = d/8 save 68.75 % of the cache.

135M and 1.7B are SmolLM's; 7B is Llama-2's with 8 of its 32 layers, which is what one GPU of 80 GB trains; small is
like 135M with key/value heads that 4 processes can share (SmolLM-135M has 3)."""


def make_architecture(shape: Shape, converted: bool) -> Architecture:
    """The shape as train_step.py times it: uniform r = d/8 and joint latents, or original."""
    config = dict(
        model_type="llama", vocab_size=49152, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    original = parse_architecture(config, "shape")
    if not converted:
        return original
    mla = MHA2MLAConfig(
        PartialRopeConfig(strategy="uniform", qk_rope_head_dim=original.head_dim // 8), LowRankConfig(d_kv=shape.d_kv)
    )
    mla = original.resolve(mla)
    return dataclasses.replace(original, model_type=MLA_MODEL_TYPE, mla=mla)
