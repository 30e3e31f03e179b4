"""What we know of a model from its config.json: its shapes, its family, and the tensors its folder must hold."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mha2mla_megatron.config import MHA2MLAConfig, config_from_dict
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.experts import Experts, read_experts
from mha2mla_megatron.families import FAMILIES, flag, is_converted, layers_with_window, layers_without_rope
from mha2mla_megatron.files import read_json_object
from mha2mla_megatron.hf.layout_mha2mla import MAX_DIMENSION, MAX_LAYERS, LatentLayout, biased_projections

READERS_OF_OTHERS = {
    "model_config.json": "tools/import_mha2mla.py reads nanotron's",
    "latest_checkpointed_iteration.txt": "tools/convert_megatron_to_hf.py reads Megatron's",
    "metadata.json": "tools/convert_megatron_to_hf.py reads Megatron's",
}
"""By a file of theirs, what reads folders of other formats."""

OLD_QUANTISATION_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""What stood in a file of its own before config.json had a `quantization_config`."""

__all__ = [
    "Architecture",
    "parse_architecture",
    "read_architecture",
    "read_config",
    "refuse_special_weights",
    "rope_key",
]


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder, original (`mla` is None) or converted."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of the feed-forwards that are no experts."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over the dims of each query and key head, before rotation."""
    no_rope_layers: tuple[int, ...]
    """Layers, from 0, of which the original rotates nothing."""
    sliding_window: int | None
    """Tokens that the layers of `window_layers` see, the query's own among them; None where there are none."""
    window_layers: tuple[int, ...]
    experts: Experts | None
    mla: MHA2MLAConfig | None

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """hidden size, query heads, key/value heads, head dim."""
        return self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def whole_cache_elements(self) -> int:
        """Elements per token and layer of a cache of whole keys and values."""
        return 2 * self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees; None: all."""
        return self.sliding_window if layer in self.window_layers else None

    def resolve(self, mla: MHA2MLAConfig) -> MHA2MLAConfig:
        """A conversion of this model with nothing left open. Raises UserError for what this model cannot have."""
        if self.qk_norm:
            for key in ("shared", "mixed"):
                if getattr(mla.partial_rope, key):
                    raise UserError(
                        f"partial_rope.{key}: not possible for a model with norms on queries and keys, which are of "
                        "each head's dims as they are: leave it unset"
                    )
            if mla.partial_rope.query_map:
                raise UserError(
                    "partial_rope.query_map: not possible for a model with norms on queries and keys, which would undo "
                    "it: leave it unset"
                )
            mla = dataclasses.replace(mla, partial_rope=dataclasses.replace(mla.partial_rope, query_map=False))
        resolved = mla.resolve(self.num_layers, *self.heads, no_rope_layers=self.no_rope_layers)
        if self.qk_norm and resolved.low_rank.method not in ("value", "none"):
            raise UserError(
                f"low_rank.method={resolved.low_rank.method}: not possible for a model with a norm on its keys: they "
                "are cached normalised, and no low-rank function of the input gives that; valid: value, none"
            )
        return resolved

    def converted(self, mla: MHA2MLAConfig) -> Architecture:
        """This model after a conversion that leaves nothing open."""
        return dataclasses.replace(self, model_type=FAMILIES[self.model_type].converted, mla=mla)

    def layout(self, layer: int) -> LatentLayout:
        """The shapes of one converted layer."""
        assert self.mla is not None
        return self.mla.layout(layer, *self.heads)

    def qk_head_dim(self, layer: int) -> int:
        """Dims of a query or key head; those of a value head are d."""
        return self.head_dim if self.mla is None else self.layout(layer).qk_head_dim

    def experts_of(self, layer: int) -> Experts | None:
        """Those that the layer has for its feed-forward; None where that is dense."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None

    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name under `self_attn.` -> shape of every attention tensor of one layer."""
        h, heads, groups, d = self.heads
        if self.mla is None:
            shapes = {
                "q_proj": (heads * d, h),
                "k_proj": (groups * d, h),
                "v_proj": (groups * d, h),
                "o_proj": (h, heads * d),
            }
            biased = frozenset(("q_proj", "k_proj", "v_proj"))
        else:
            shapes = self.layout(layer).projections()
            biased = biased_projections(self.qk_norm)
        tensors: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            tensors[f"{name}.weight"] = shape
            if self.attention_output_bias if name == "o_proj" else self.qkv_bias and name in biased:
                tensors[f"{name}.bias"] = shape[:1]
        if self.qk_norm:
            # A conversion orders the dims of each key/value head, and of the query heads of its group, by itself.
            norm = (d,) if self.mla is None else (groups, d)
            tensors.update({"q_norm.weight": norm, "k_norm.weight": norm})
        if self.mla is not None and self.layout(layer).qk_rope_head_dim > 0:
            tensors["rope_pairs"] = (self.layout(layer).rope_heads, self.layout(layer).qk_rope_head_dim // 2)
        return tensors

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the model's folder must hold, no more and no less."""
        h, m = self.hidden_size, self.intermediate_size
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        mlp = {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            tensors[prefix + "input_layernorm.weight"] = (h,)
            for name, shape in self.attention_shapes(layer).items():
                tensors[f"{prefix}self_attn.{name}"] = shape
            tensors[prefix + "post_attention_layernorm.weight"] = (h,)
            if (experts := self.experts_of(layer)) is not None:
                tensors.update({prefix + name: shape for name, shape in experts.tensor_shapes(h).items()})
                continue
            for name, shape in mlp.items():
                tensors[f"{prefix}mlp.{name}.weight"] = shape
                if self.mlp_bias:
                    tensors[f"{prefix}mlp.{name}.bias"] = shape[:1]
        tensors["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, h)
        return tensors

    def droppable(self, name: str) -> bool:
        """Tensors that some folders hold and no model needs: saved inv_freq tables, a tied lm_head."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.tie_word_embeddings)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict."""
    hint = ""
    for name, tool in READERS_OF_OTHERS.items():
        if (folder / name).is_file():
            hint = f"; {tool}"
    return read_json_object(folder / "config.json", f"{folder}: not a Hugging Face model folder (no config.json){hint}")


def refuse_special_weights(folder: Path) -> None:
    """Raise UserError for a folder that holds an adapter, or quantised weights, and not those of a whole model."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        merge = (
            "from peft import AutoPeftModelForCausalLM as M; "
            f'M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained("MERGED")'
        )
        raise UserError(
            f"{adapter}: a PEFT (LoRA) adapter, not a model; merge it into its base model and give the result: "
            f"{shlex.join(('python', '-c', merge))}; copy the tokenizer there too"
        )
    for name, method in OLD_QUANTISATION_CONFIGS.items():
        if (folder / name).is_file():
            raise UserError(_quantised(str(folder / name), method))
    if (folder / "config.json").is_file():
        _refuse_quantised(read_config(folder), str(folder / "config.json"))


def _refuse_quantised(config: dict[str, Any], source: str) -> None:
    """GPTQ, AWQ, bitsandbytes, fp8 and whatever else transformers writes there."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
        raise UserError(_quantised(f"{source}: quantization_config", method))


def _quantised(where: str, method: str) -> str:
    return f"{where}: the weights are quantised ({method}); give the unquantised model, or one that was de-quantised"


def read_architecture(folder: Path) -> Architecture:
    """Read and check `folder`/config.json. Raises UserError naming the key for anything that we cannot do exactly."""
    config = read_config(folder)
    project = config.get("mha2mla") or config.get("RoPE")
    if not is_converted(config.get("model_type")) and isinstance(project, dict) and not project.get("is_baseline"):
        command = f"python tools/import_mha2mla.py {shlex.quote(str(folder))} IMPORTED"
        raise UserError(
            f"{folder / 'config.json'}: a model of the MHA2MLA authors' code; import it first and give the result: "
            f"{command}"
        )
    return parse_architecture(config, str(folder / "config.json"))


def parse_architecture(config: dict[str, Any], source: str) -> Architecture:
    """`read_architecture` of a config that is already in memory; `source` is named in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{source}: unknown architecture model_type={model_type!r}; known: {', '.join(FAMILIES)}")
    for key in ("rope_interleaved", "rope_interleave", "rotary_interleaved"):
        if config.get(key):
            raise UserError(f"{source}: {key}=true: interleaved rotary embeddings are not supported, only half-split")
    _refuse_quantised(config, source)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act={config['hidden_act']!r} is not supported; valid: 'silu'")
    family = FAMILIES[model_type]
    config = {**family.defaults, **config}
    number = _Numbers(config, source)
    h, heads = number("hidden_size"), number("num_attention_heads")
    groups = number("num_key_value_heads", heads)
    if config.get("head_dim") is None and h % heads:
        raise UserError(f"{source}: hidden_size {h} does not divide by num_attention_heads {heads}, and no head_dim")
    head_dim = number("head_dim", h // heads)
    if heads % groups:
        raise UserError(f"{source}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}")
    if head_dim % 2:
        raise UserError(f"{source}: head_dim {head_dim} is odd; rotary dims come in pairs")
    num_layers = number("num_hidden_layers", maximum=MAX_LAYERS)
    no_rope = layers_without_rope(config, family, num_layers, source)
    windows = layers_with_window(config, family, num_layers, no_rope, source)
    architecture = Architecture(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=h,
        intermediate_size=number("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings", 2048),
        rms_norm_eps=_positive(config.get("rms_norm_eps", 1e-6), f"{source}: rms_norm_eps"),
        rope_parameters=_rope_parameters(config, source),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=flag(config, family.qkv_bias),
        attention_output_bias=flag(config, family.output_bias),
        mlp_bias=flag(config, family.mlp_bias),
        qk_norm=flag(config, family.qk_norm),
        no_rope_layers=no_rope,
        sliding_window=number("sliding_window") if windows else None,
        window_layers=windows,
        experts=read_experts(config, family.experts, num_layers, number, source),
        mla=None,
    )
    if not is_converted(model_type):
        return architecture
    mla = config_from_dict(config.get("mha2mla") or {}, f"{source}: mha2mla")
    return dataclasses.replace(architecture, mla=architecture.resolve(mla))


class _Numbers:
    """Reads positive whole numbers out of a config."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def __call__(self, key: str, default: int | None = None, maximum: int = MAX_DIMENSION) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise UserError(f"{self.source}: {key}={value!r}; a whole number from 1 to {maximum} is needed")
        return value


def rope_key(config: dict[str, Any]) -> str:
    """The key of a config.json that has its rotary scaling: transformers 5's, or the older one."""
    return "rope_parameters" if config.get("rope_parameters") else "rope_scaling"


def _rope_parameters(config: dict[str, Any], source: str) -> dict[str, Any]:
    """transformers 5's `rope_parameters`, also from the older `rope_theta` and `rope_scaling`."""
    key = rope_key(config)
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{source}: {key}={found!r}; a mapping is needed")
    rope = dict(found)
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(rope["rope_type"], str):
        raise UserError(f"{source}: {key}: rope_type={rope['rope_type']!r}; a word is needed")
    _positive(rope["rope_theta"], f"{source}: rope_theta")
    key = "original_max_position_embeddings"
    if config.get(key) is not None and rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope[key] = int(_positive(config[key], f"{source}: {key}"))  # rather than the scaling's own, as in transformers
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is not 1: the model is already partially rotated")
    return rope


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{name}={value!r}; a number above 0 is needed")
    return float(value)
