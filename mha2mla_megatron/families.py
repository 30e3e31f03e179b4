"""What a model family (`model_type`) says of its models beyond their sizes. A new dense family is a row in FAMILIES.

One with experts has rows in `checkpoint/mapping.py` and classes in `hf/experts_mha2mla.py`, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mha2mla_megatron.errors import UserError

MLA_MODEL_TYPE = "mha2mla_llama"
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ExpertNames:
    """How a family's experts are read from its config.json and named, without `.weight`, under a layer of its files."""

    intermediate_size: str
    """The key of an expert's width."""

    norm_topk_prob: str | bool
    """Whether the weights of a token's experts are divided by their sum."""

    router: str

    gate_proj: str
    """An expert's; {} is its number, from 0."""

    up_proj: str

    down_proj: str


@dataclass(frozen=True)
class Family:
    """How a family's config.json is read. What is `str | bool` is one of its keys, or the same for every model."""

    qkv_bias: str | bool = "attention_bias"
    output_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = "mlp_bias"

    qk_norm: str | bool = False
    """An RMSNorm over the dims of each query and key head, before rotation."""

    windows: str | bool = False
    """Whether attention may be limited to `sliding_window` tokens."""

    windowed_layers: str = "layer_types"
    """Which layers then are, where `layer_types` does not say: those from `max_window_layers` on, those without
    rotation (`no_rope_layers`) or `all`. layer_types: none."""

    no_rope_layers: bool = False
    """Whether some layers rotate nothing: zeros in `no_rope_layers`, or every `no_rope_layer_interval`-th."""

    experts: ExpertNames | None = None
    """Of the experts that stand for the feed-forward of each layer, but those of `mlp_only_layers` and, with
    `decoder_sparse_step`, all but every n-th."""

    converted: str = MLA_MODEL_TYPE
    """The model_type of its conversions; a converted family's is its own."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that config.json has not, where it is not what it takes for Llama."""


MIXTRAL_EXPERTS = ExpertNames(
    intermediate_size="intermediate_size", norm_topk_prob=True, router="block_sparse_moe.gate",
    gate_proj="block_sparse_moe.experts.{}.w1", up_proj="block_sparse_moe.experts.{}.w3",
    down_proj="block_sparse_moe.experts.{}.w2",
)  # fmt: skip
QWEN3_EXPERTS = ExpertNames(
    intermediate_size="moe_intermediate_size", norm_topk_prob="norm_topk_prob", router="mlp.gate",
    gate_proj="mlp.experts.{}.gate_proj", up_proj="mlp.experts.{}.up_proj", down_proj="mlp.experts.{}.down_proj",
)  # fmt: skip
CONVERTED = Family(output_bias="attention_output_bias", qk_norm="qk_norm", windows=True, no_rope_layers=True)

FAMILIES = {
    "llama": Family(),
    "qwen2": Family(
        qkv_bias=True, output_bias=False, mlp_bias=False, windows="use_sliding_window",
        windowed_layers="max_window_layers",
        defaults={"max_window_layers": 28, "sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "qwen3": Family(
        mlp_bias=False, qk_norm=True, windows="use_sliding_window", windowed_layers="max_window_layers",
        defaults={
            "max_window_layers": 28, "sliding_window": 4096, "head_dim": 128, "max_position_embeddings": 32768,
        },
    ),
    "mistral": Family(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows=True, windowed_layers="all",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "smollm3": Family(
        windows="use_sliding_window", windowed_layers="no_rope_layers", no_rope_layers=True,
        defaults={
            "no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
    ),
    "mixtral": Family(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows=True, windowed_layers="all",
        experts=MIXTRAL_EXPERTS, converted="mha2mla_mixtral",
        defaults={
            "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8,
            "num_experts_per_tok": 2, "max_position_embeddings": 131072,
        },
    ),
    "qwen3_moe": Family(
        mlp_bias=False, qk_norm=True, windows="use_sliding_window", windowed_layers="all",
        experts=QWEN3_EXPERTS, converted="mha2mla_qwen3_moe",
        defaults={
            "num_key_value_heads": 4, "sliding_window": 4096, "moe_intermediate_size": 768, "num_local_experts": 128,
            "num_experts_per_tok": 8, "max_position_embeddings": 32768,
        },
    ),
    MLA_MODEL_TYPE: CONVERTED,
    "mha2mla_mixtral": replace(CONVERTED, experts=MIXTRAL_EXPERTS, converted="mha2mla_mixtral"),
    "mha2mla_qwen3_moe": replace(CONVERTED, experts=QWEN3_EXPERTS, converted="mha2mla_qwen3_moe"),
}  # fmt: skip


def is_converted(model_type: Any) -> bool:
    """Whether this is the model_type of converted models."""
    return isinstance(model_type, str) and model_type in FAMILIES and FAMILIES[model_type].converted == model_type


def flag(config: Mapping[str, Any], value: str | bool) -> bool:
    """A field of Family, for one model."""
    return bool(config.get(value)) if isinstance(value, str) else value


def layers_without_rope(config: Mapping[str, Any], family: Family, num_layers: int, source: str) -> tuple[int, ...]:
    """The layers, from 0, whose queries and keys are not rotated."""
    if not family.no_rope_layers:
        return ()
    rotates, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval")
    if rotates is None:
        if interval is None:
            return ()
        if not isinstance(interval, int) or interval < 1:
            raise UserError(f"{source}: no_rope_layer_interval={interval!r}; a whole number from 1 is needed")
        return tuple(range(interval - 1, num_layers, interval))
    if not isinstance(rotates, list) or len(rotates) < num_layers or any(value not in (0, 1) for value in rotates):
        raise UserError(f"{source}: no_rope_layers={rotates!r}; a list of 0 and 1 for {num_layers} layers is needed")
    return tuple(layer for layer in range(num_layers) if not rotates[layer])


def layers_with_window(
    config: Mapping[str, Any], family: Family, num_layers: int, no_rope: tuple[int, ...], source: str
) -> tuple[int, ...]:
    """The layers, from 0, that see `sliding_window` tokens only. no_rope: those of `layers_without_rope`."""
    if not flag(config, family.windows) or config.get("sliding_window") is None:
        return ()
    if family.windowed_layers == "all":
        return tuple(range(num_layers))
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in LAYER_TYPES for kind in types):
            raise UserError(
                f"{source}: layer_types={types!r}; one of {', '.join(LAYER_TYPES)} for each layer is needed"
            )
        return tuple(layer for layer in range(num_layers) if types[layer] == "sliding_attention")
    if family.windowed_layers == "no_rope_layers":
        return no_rope
    if family.windowed_layers == "max_window_layers":
        first = config["max_window_layers"]
        if not isinstance(first, int) or first < 0:
            raise UserError(f"{source}: max_window_layers={first!r}; a whole number from 0 is needed")
        return tuple(range(first, num_layers))
    return ()
