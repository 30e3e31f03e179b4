"""What a model family (`model_type`) says of its models beyond their sizes. A new dense family is a row in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mha2mla_megatron.errors import UserError

MLA_MODEL_TYPE = "mha2mla_llama"
LAYER_TYPES = ("full_attention", "sliding_attention")


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

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that config.json has not, where it is not what it takes for Llama."""


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(
        qkv_bias=True, output_bias=False, mlp_bias=False, windows="use_sliding_window",
        windowed_layers="max_window_layers", defaults={"max_window_layers": 28, "sliding_window": 4096},
    ),
    "qwen3": Family(
        mlp_bias=False, qk_norm=True, windows="use_sliding_window", windowed_layers="max_window_layers",
        defaults={"max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
    ),
    "mistral": Family(
        qkv_bias=False, output_bias=False, mlp_bias=False, windows=True, windowed_layers="all",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "smollm3": Family(
        windows="use_sliding_window", windowed_layers="no_rope_layers", no_rope_layers=True,
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
    MLA_MODEL_TYPE: Family(
        output_bias="attention_output_bias", qk_norm="qk_norm", windows=True, no_rope_layers=True,
    ),
}  # fmt: skip


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
