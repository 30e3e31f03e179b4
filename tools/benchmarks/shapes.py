"""The models that the benchmarks are run with: shapes of real ones, no weights; nothing that takes long to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mha2mla_megatron.architecture import Architecture, parse_architecture
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.training.flops import training_flops


@dataclass(frozen=True)
class ModelShape:
    """A model's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Shape(ModelShape):
    """And the batch that fills the GPU with it."""

    sequence_length: int
    micro_batch_size: int

    @property
    def tokens(self) -> int:
        """Of one micro batch."""
        return self.sequence_length * self.micro_batch_size


SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 49152, True, 64, 2),
    "small": Shape(512, 1536, 8, 8, 4, 49152, True, 1024, 1),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, True, 2048, 16),
    "360M": Shape(960, 2560, 32, 15, 5, 49152, True, 2048, 16),
    "1.7B": Shape(2048, 8192, 24, 32, 32, 49152, True, 2048, 8),
    "7B": Shape(4096, 11008, 8, 32, 32, 32000, False, 4096, 2),
}
"""135M to 1.7B are SmolLM's; 7B is Llama-2's with 8 of its 32 layers, which is what one GPU of 80 GB trains; small is
like 135M with key/value heads that 4 processes can share (SmolLM-135M has 3)."""

CONVERSIONS = {
    "mla-68.75": ("joint", 2),
    "mla-87.5": ("joint", 8),
    "split-68.75": ("split", 4),
    "shared-68.75": ("joint", 2),
    "wide-68.75": ("joint", 2),
}
"""What is converted how, by the cache that it saves in percent: uniform r = d/8, and latents of G d / this number; of
shared rotated keys r = 3d/8, and latents of as many numbers more as these save; wide: the same beside all d unrotated
dims.

Every layer has a table of pairs for each head, whatever the strategy that chose them: 2-norm trains at the same speed.
"""

MODELS = ("original", *CONVERSIONS)


KINDS = {"original": "original", "converted": "mla-68.75", "shared": "shared-68.75"}
"""The models that stand for all of their kind where only one is run."""


def original_config(shape: Shape) -> dict[str, Any]:
    """The config.json of a Llama of this shape."""
    return dict(
        model_type="llama", vocab_size=shape.vocabulary, hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups, max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=shape.tied, rms_norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip


def conversion(shape: Shape, model: str) -> MHA2MLAConfig:
    """How `original_config` becomes this one of `CONVERSIONS`."""
    method, part = CONVERSIONS[model]
    own, latents = shape.head_dim // 8, shape.groups * shape.head_dim // part
    if not model.startswith(("shared", "wide")):
        return MHA2MLAConfig(
            PartialRopeConfig(strategy="uniform", qk_rope_head_dim=own),
            LowRankConfig(method=method, kv_lora_rank=latents),
        )
    nope = shape.head_dim if model.startswith("wide") else None
    rope = PartialRopeConfig(
        strategy="activation", scores="none", shared=True, qk_rope_head_dim=3 * own, qk_nope_head_dim=nope
    )
    return MHA2MLAConfig(rope, LowRankConfig(method=method, kv_lora_rank=latents + (shape.groups - 3) * own))


def make_architecture(shape: Shape, model: str) -> Architecture:
    """One of `MODELS`."""
    original = parse_architecture(original_config(shape), "shape")
    if model == "original":
        return original
    return original.converted(original.resolve(conversion(shape, model)))


def step_flops(shape: Shape, model: str) -> float:
    """Floating-point operations of one training step that the model itself asks for."""
    return shape.tokens * training_flops(make_architecture(shape, model), shape.sequence_length)
