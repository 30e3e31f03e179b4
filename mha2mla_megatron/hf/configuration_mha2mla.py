"""Configuration of a Llama-like model whose attention was converted to multi-head latent attention."""

from collections.abc import Mapping
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

from .layout_mha2mla import MAX_DIMENSION, MAX_LAYERS, LatentLayout, is_whole, layer_value

MLA_DECODES = ("auto", "expanded", "absorbed")
MLA_KERNELS = ("auto", "torch")
LAYER_TYPES = ("full_attention", "sliding_attention")
SIZES = ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "max_position_embeddings")


class MHA2MLALlamaConfig(LlamaConfig):
    """LlamaConfig plus what the conversion decided. Raises ValueError for shapes that no converted model has.

    mha2mla: the resolved conversion settings; read here: `partial_rope.qk_rope_head_dim`, `low_rank.method`,
        `low_rank.kv_lora_rank` and, where it is there, `low_rank.k_lora_rank` (numbers, or lists with one per layer);
        `partial_rope.shared` and `partial_rope.qk_nope_head_dim`, where they are there.
    attention_bias: biases on the query, key and value projections.
    attention_output_bias: bias on the output projection.
    qk_norm: RMSNorm over each query and key head before rotation. Keys are cached normalised, so never from a latent.
    layer_types: `full_attention` or `sliding_attention`, which sees `sliding_window` tokens, for each layer.
    no_rope_layers: 0 for each layer of which the original rotated nothing; read by converters, as r is 0 there anyway.
    mla_decode: how new tokens attend over a cache. `expanded`: rebuild keys and values of the whole cache; `absorbed`:
        attend over the latents themselves; `auto`: whichever takes fewer multiplications.
    mla_kernel: what runs the absorbed form. `auto`: the Triton kernel where it can, else torch; `torch`: torch.
    """

    model_type = "mha2mla_llama"
    base_model_tp_plan = {}

    mha2mla: dict | None = None
    attention_output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    mla_decode: str = "auto"
    mla_kernel: str = "auto"

    def __post_init__(self, **kwargs):
        for name, limit in (*((name, MAX_DIMENSION) for name in SIZES), ("num_hidden_layers", MAX_LAYERS)):
            if not 0 < getattr(self, name) <= limit:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number from 1 to {limit}")
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        self._check_layers()
        super().__post_init__(**kwargs)
        for name, valid in (("mla_decode", MLA_DECODES), ("mla_kernel", MLA_KERNELS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if self.mha2mla:
            rope, low_rank = _part(self.mha2mla, "partial_rope"), _part(self.mha2mla, "low_rank")
            given = (rope["qk_rope_head_dim"], low_rank["kv_lora_rank"], low_rank.get("k_lora_rank"))
            per_layer = [values for values in given if isinstance(values, list | tuple)]
            if any(len(values) != self.num_hidden_layers for values in per_layer):
                raise ValueError(f"config.mha2mla: a list of another length than the model's {self.num_hidden_layers}")
            for layer in range(self.num_hidden_layers if per_layer else 1):
                self.layout(layer).check()
                if self.qk_norm and self.layout(layer).factors_key:
                    raise ValueError(
                        f"low_rank.method: {low_rank['method']}, but qk_norm: normalised keys have no latent"
                    )
                if self.qk_norm and self.layout(layer).shared_rope:
                    raise ValueError("partial_rope.shared: true, but qk_norm: normalised keys are each head's own")
                if self.qk_norm and self.layout(layer).qk_head_dim != self.head_dim:
                    raise ValueError("partial_rope.qk_nope_head_dim: not with qk_norm, whose weights are head_dim each")

    def _check_layers(self) -> None:
        """Raises ValueError for lists that are not one entry for each layer, unknown types, a window without length."""
        for name in ("layer_types", "no_rope_layers"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or len(values) != self.num_hidden_layers:
                raise ValueError(f"{name}: not a list with an entry for each of {self.num_hidden_layers} layers")
        for value in self.layer_types or ():
            if value not in LAYER_TYPES:
                raise ValueError(f"layer_types: {value!r} is not one of {', '.join(LAYER_TYPES)}")
        window: Any = self.sliding_window
        if "sliding_attention" in (self.layer_types or ()) and not (is_whole(window) and window > 0):
            raise ValueError(f"sliding_window: {window!r} is not a number from 1 on, and layer_types has such layers")

    def layout(self, layer: int) -> LatentLayout:
        """The shapes of one layer's attention. Raises ValueError for a config without its conversion settings."""
        if not self.mha2mla:
            raise ValueError("config.mha2mla is missing: not a model converted by mha2mla_megatron")
        rope, low_rank = _part(self.mha2mla, "partial_rope"), _part(self.mha2mla, "low_rank")
        r = layer_value(rope["qk_rope_head_dim"], layer)
        if r is None:
            raise ValueError("config.mha2mla: qk_rope_head_dim is not set")
        assert self.num_key_value_heads is not None and self.head_dim is not None
        return LatentLayout(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            r,
            low_rank["method"],
            layer_value(low_rank["kv_lora_rank"], layer),
            layer_value(low_rank.get("k_lora_rank"), layer),
            rope.get("shared") or False,
            rope.get("qk_nope_head_dim") or 0,
        )


class MHA2MLAMixtralConfig(MHA2MLALlamaConfig):
    """The same with mixtures of experts in Mixtral's manner, of width `intermediate_size`.

    num_local_experts, num_experts_per_tok: experts of a layer, and of a token.
    mlp_only_layers: layers, from 0, that have an ordinary feed-forward all the same.
    router_jitter_noise: half the width of the noise on inputs in training.
    """

    model_type = "mha2mla_mixtral"
    attribute_map = {"num_experts": "num_local_experts"}

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    mlp_only_layers: list[int] | None = None
    router_jitter_noise: float = 0.0


class MHA2MLAQwen3MoeConfig(MHA2MLALlamaConfig):
    """The same with mixtures of experts in Qwen3's manner.

    num_local_experts, num_experts_per_tok: experts of a layer, and of a token.
    moe_intermediate_size: width of an expert.
    norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    mlp_only_layers: layers, from 0, that have an ordinary feed-forward, of width `intermediate_size`.
    """

    model_type = "mha2mla_qwen3_moe"
    attribute_map = {"num_experts": "num_local_experts"}

    num_local_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] | None = None


def _part(mha2mla: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """mha2mla.<name>, which has to hold what is read here."""
    keys = {"partial_rope": ("qk_rope_head_dim",), "low_rank": ("method", "kv_lora_rank")}[name]
    part = mha2mla.get(name) if isinstance(mha2mla, Mapping) else None
    if not isinstance(part, Mapping) or any(key not in part for key in keys):
        raise ValueError(f"config.mha2mla.{name}: {', '.join(keys)} are missing: not a converted model's config")
    return part


__all__ = ["MHA2MLALlamaConfig", "MHA2MLAMixtralConfig", "MHA2MLAQwen3MoeConfig"]
