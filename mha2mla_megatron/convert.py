"""MHA -> MLA: one attention layer's weights, and a whole model as a stream of layers (no Megatron, no distribution)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import MLA_MODEL_TYPE, Architecture, read_architecture, read_config
from mha2mla_megatron.checkpoint.folders import copy_companions, new_folder
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.errors import UserError, require_one_of
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.low_rank import factorise
from mha2mla_megatron.partial_rope import head_row_order, kept_pairs, load_scores
from mha2mla_megatron.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ConvertSettings:
    """Settings of tools/convert_mha_to_mla.py."""

    partial_rope: PartialRopeConfig = field(default_factory=PartialRopeConfig)

    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    dtype: str = "auto"
    """Type of the written weights: auto (as the source), float32, bfloat16 or float16. All arithmetic is float64."""

    device: str = "auto"
    """Where the factorisation runs: auto (the GPU if there is one), cpu, cuda."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: there is no GPU here")
        parse_size(self.max_shard_size, "max_shard_size")


def convert_attention(
    weights: dict[str, torch.Tensor], pairs: torch.Tensor, layout: LatentLayout, singular_values: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One layer's attention converted: rows reordered to [r | d - r] per head, then K_nope and V factored.

    weights: q_proj, k_proj, v_proj, o_proj `.weight` [out, in] (and `.bias` [out] where the model has them).
    pairs: int64 [G, r/2], the pairs that keep their rotation.

    Returns the converted tensors by name, float64 where factored, and the relative Frobenius errors of K and V.
    """
    groups, d = layout.num_key_value_heads, layout.head_dim
    order = head_row_order(pairs, d).to(weights["q_proj.weight"].device)  # [G, d]
    r = layout.qk_rope_head_dim

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        """Rows of [heads * d, ...] within each head; heads of one group share their order: [G, heads / G, d, ...]."""
        heads = tensor.view(groups, -1, d, *tensor.shape[1:])
        index = order.view(groups, 1, d, *[1] * (tensor.dim() - 1)).expand_as(heads)
        return heads.gather(2, index)

    converted = {"o_proj.weight": weights["o_proj.weight"]}
    converted["q_proj.weight"] = reorder(weights["q_proj.weight"]).reshape_as(weights["q_proj.weight"])
    k = reorder(weights["k_proj.weight"])[:, 0]  # [G, d, h]
    k_rope, k_nope = k[:, :r].flatten(0, 1), k[:, r:].flatten(0, 1)
    v = weights["v_proj.weight"]
    if r > 0:
        converted["k_rope_proj.weight"] = k_rope
        converted["rope_pairs"] = pairs
    if "q_proj.bias" in weights:
        converted["q_proj.bias"] = reorder(weights["q_proj.bias"]).flatten()
        if r > 0:
            converted["k_rope_proj.bias"] = reorder(weights["k_proj.bias"])[:, 0, :r].flatten()
        converted["v_up_proj.bias" if layout.factors_value else "v_proj.bias"] = weights["v_proj.bias"]
    if "o_proj.bias" in weights:
        converted["o_proj.bias"] = weights["o_proj.bias"]

    factors = _factor(k_nope, v, layout, singular_values)
    converted.update(factors)
    if not layout.factors_key and layout.nope_dim > 0:
        converted["k_nope_proj.weight"] = k_nope
    if not layout.factors_value:
        converted["v_proj.weight"] = v
    return converted, _relative_errors(k, v, k_nope, factors, layout)


def _factor(
    k_nope: torch.Tensor, v: torch.Tensor, layout: LatentLayout, singular_values: str
) -> dict[str, torch.Tensor]:
    """kv_down_proj, k_up_proj and v_up_proj of the layer's method, those that it has."""
    c = layout.kv_lora_rank
    if c is None or not (layout.factors_key or layout.factors_value):
        return {}
    if layout.method == "joint":
        up, down = factorise(torch.cat((k_nope, v)), c, singular_values)
        k_up, v_up = up.split((layout.nope_dim, layout.value_dim))
        factors = {"kv_down_proj.weight": down, "v_up_proj.weight": v_up}
        return {**factors, "k_up_proj.weight": k_up} if layout.factors_key else factors
    factors, downs = {}, []
    for name, weight, used in (("k_up_proj", k_nope, layout.factors_key), ("v_up_proj", v, layout.factors_value)):
        if used:
            factors[f"{name}.weight"], down = factorise(weight, c, singular_values)
            downs.append(down)
    return {**factors, "kv_down_proj.weight": torch.cat(downs)}


def _relative_errors(
    k: torch.Tensor, v: torch.Tensor, k_nope: torch.Tensor, factors: dict[str, torch.Tensor], layout: LatentLayout
) -> dict[str, float]:
    """||W - up down|| / ||W|| over all rows of K (rotated ones are exact) and of V."""
    c = layout.kv_lora_rank or 0
    errors = {"key_error": 0.0, "value_error": 0.0}
    if layout.factors_key:
        product = factors["k_up_proj.weight"] @ factors["kv_down_proj.weight"][:c]
        errors["key_error"] = ((k_nope - product).norm() / k.to(torch.float64).norm()).item()
    if layout.factors_value:
        product = factors["v_up_proj.weight"] @ factors["kv_down_proj.weight"][layout.kv_down_dim - c :]
        errors["value_error"] = ((v - product).norm() / v.to(torch.float64).norm()).item()
    return errors


def convert_model(source: Path, target: Path, settings: ConvertSettings) -> dict[str, Any]:
    """Convert a Hugging Face folder into another, one layer in memory at a time; returns the report that it wrote.

    Raises UserError before anything is written for a model or settings that cannot be converted.
    """
    original = read_architecture(source)
    if original.mla is not None:
        raise UserError(f"{source}: is converted already")
    mla = MHA2MLAConfig(settings.partial_rope, settings.low_rank).resolve(original.num_layers, *original.heads)
    converted = dataclasses.replace(original, model_type=MLA_MODEL_TYPE, mla=mla)
    scores = None
    if mla.partial_rope.strategy == "2-norm":
        scores = load_scores(
            Path(str(mla.partial_rope.scores)), original.num_layers, original.num_key_value_heads, original.head_dim
        )
    reader = HFReader(source, original)
    report: dict[str, Any] = {"source": str(source), "mha2mla": dataclasses.asdict(mla), "layers": []}
    with new_folder(target, settings.overwrite) as folder:
        writer = HFWriter(folder, parse_size(settings.max_shard_size, "max_shard_size"))
        for name, tensor in _converted_tensors(reader, original, converted, scores, settings, report["layers"]):
            if settings.dtype != "auto" and tensor.is_floating_point():
                tensor = tensor.to(DTYPES[settings.dtype])
            writer.add(name, tensor)
        writer.close()
        _summarise(report, original)
        write_config(folder, converted_config(read_config(source), converted, settings.dtype))
        copy_companions(source, folder)
        (folder / "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def converted_config(config: dict[str, Any], converted: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of the converted model: the original's, in Llama's terms, plus the conversion."""
    assert converted.mla is not None
    config = {key: value for key, value in config.items() if key not in ("auto_map", "sliding_window", "torch_dtype")}
    config.update(
        architectures=["MHA2MLALlamaForCausalLM"],
        model_type=MLA_MODEL_TYPE,
        auto_map={
            "AutoConfig": "configuration_mha2mla.MHA2MLALlamaConfig",
            "AutoModel": "modeling_mha2mla.MHA2MLALlamaModel",
            "AutoModelForCausalLM": "modeling_mha2mla.MHA2MLALlamaForCausalLM",
        },
        num_key_value_heads=converted.num_key_value_heads,
        head_dim=converted.head_dim,
        rms_norm_eps=converted.rms_norm_eps,
        rope_parameters=converted.rope_parameters,
        attention_bias=converted.qkv_bias,
        attention_output_bias=converted.attention_output_bias,
        mlp_bias=converted.mlp_bias,
        mha2mla=dataclasses.asdict(converted.mla),
    )
    if dtype != "auto":
        config["dtype"] = dtype
    return config


def _converted_tensors(
    reader: HFReader,
    original: Architecture,
    converted: Architecture,
    scores: torch.Tensor | None,
    settings: ConvertSettings,
    layer_reports: list[dict[str, Any]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the converted model in its own type; fills `layer_reports` on the way."""
    assert converted.mla is not None
    use_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_gpu else "cpu")
    attention = {
        f"model.layers.{layer}.self_attn.{name}": layer
        for layer in range(original.num_layers)
        for name in original.attention_shapes(layer)
    }
    progress = Progress("convert", original.num_layers, "layers")
    done = set()
    for name in reader.names:
        layer = attention.get(name)
        if layer is None:
            yield name, reader[name]
            continue
        if layer in done:
            continue
        done.add(layer)
        layout, prefix = converted.layout(layer), f"model.layers.{layer}.self_attn."
        weights = {key: reader[prefix + key] for key in original.attention_shapes(layer)}
        dtype = weights["k_proj.weight"].dtype
        pairs = kept_pairs(
            converted.mla.partial_rope,
            layout.qk_rope_head_dim,
            layout.num_key_value_heads,
            layout.head_dim,
            None if scores is None else scores[layer],
        )
        moved = {key: tensor.to(device) for key, tensor in weights.items()}
        tensors, errors = convert_attention(moved, pairs, layout, converted.mla.low_rank.singular_values)
        for key in converted.attention_shapes(layer):
            tensor = tensors.pop(key).cpu()
            # With dtype=float32 the factors keep more digits than a bfloat16 source has; auto rounds to the source.
            yield prefix + key, tensor.to(dtype) if settings.dtype == "auto" and tensor.is_floating_point() else tensor
        assert not tensors, f"converted but not written: {list(tensors)}"
        before = 2 * layout.value_dim
        layer_reports.append(
            {
                "layer": layer,
                "qk_rope_head_dim": layout.qk_rope_head_dim,
                "kv_lora_rank": layout.kv_lora_rank,
                "rope_pairs": pairs.tolist(),
                **errors,
                "cache_elements_before": before,
                "cache_elements_after": layout.cache_elements,
            }
        )
        progress.advance()
    progress.close()


def _summarise(report: dict[str, Any], original: Architecture) -> None:
    layers = report["layers"]
    before = sum(layer["cache_elements_before"] for layer in layers)
    after = sum(layer["cache_elements_after"] for layer in layers)
    report["cache_elements_per_token"] = {"before": before, "after": after, "saved": round(1 - after / before, 6)}
    report["dropped"] = (
        ["k_proj.bias on unrotated dims: adds one number to all scores of a query, which softmax ignores"]
        if original.qkv_bias
        else []
    )
