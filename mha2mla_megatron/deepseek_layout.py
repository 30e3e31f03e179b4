"""A converted model in DeepSeek-V2's layout: other names and shapes, the same function.

DeepSeek's attention has one rotated key head of width R for all query heads, interleaved (pair i is dims 2i and
2i + 1), one latent with an RMSNorm behind it, the scale (n + R)^-1/2, and one layout for all layers.

Shape letters: h hidden size, H query heads, G key/value heads, d head dim, r rotary dims kept per head, R = G r, or r
where all heads share one rotated key, c latent width, n unrotated dims of a query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import Architecture, read_architecture, read_config
from mha2mla_megatron.checkpoint.folders import copy_companions
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.checkpoint.resume import identity, resumable_folder
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.frequencies import inverse_frequencies
from mha2mla_megatron.ranks import require_one_process

NORM_SHARE = 2.0**-24
"""How far below the norm's epsilon a latent's mean square stays: a change of 2^-25 of the latent, under float32's."""


@dataclass(frozen=True)
class DeepseekSettings:
    """Settings of tools/export_deepseek.py."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size, "max_shard_size")


@dataclass(frozen=True)
class DeepseekAttention:
    """One layer, any float type: a latent c = down x, and per query head its unrotated and its rotated part."""

    q_nope: torch.Tensor
    """[H, n, h]."""
    q_rope: torch.Tensor
    """[H, R, h], interleaved."""
    k_rope: torch.Tensor
    """[R, h], interleaved."""
    down: torch.Tensor
    """[c, h]."""
    k_up: torch.Tensor
    """[H, n, c]."""
    v_up: torch.Tensor
    """[H, d, c]."""

    def tensors(self, norm: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
        """The tensors under `self_attn.` but for o_proj, float64. norm [h], eps: of the layer's input norm.

        DeepSeek's scale is (n + R)^-1/2, ours d^-1/2: the queries make up for it. Its RMSNorm of the latent is
        l / sqrt(mean(l^2) + eps): where mean(l^2) is far below eps that is a constant factor, so `down` is scaled by a
        power of 2 until it is, for any input, and the factor is taken back behind the norm. An input x has the norms'
        weights times a vector of length sqrt(h) at most, which bounds mean(l^2).
        """
        n, d, (c, h) = self.q_nope.shape[1], self.v_up.shape[1], self.down.shape
        down, norm = self.down.double(), norm.double()
        bound = torch.linalg.matrix_norm(down * norm, 2).item() ** 2 * h / c
        scale = 2.0 ** math.floor(math.log2(math.sqrt(eps * NORM_SHARE / bound))) if bound > 0 else 1.0
        weight = 2.0 ** round(math.log2(math.sqrt(eps) / scale))
        queries = torch.cat((self.q_nope.double(), self.q_rope.double()), 1) * math.sqrt((n + self.q_rope.shape[1]) / d)
        ups = torch.cat((self.k_up.double(), self.v_up.double()), 1) / (scale * weight / math.sqrt(eps))
        return {
            "q_proj.weight": queries.flatten(0, 1),
            "kv_a_proj_with_mqa.weight": torch.cat((down * scale, self.k_rope.double())),
            "kv_a_layernorm.weight": torch.full((c,), weight, dtype=torch.float64),
            "kv_b_proj.weight": ups.flatten(0, 1),
        }


def export_deepseek(source: Path, target: Path, settings: DeepseekSettings) -> dict[str, Any]:
    """Write the converted model of `source` as a DeepSeek-V2 model; returns its config.

    A query head's r rotated dims stand in its key/value head's block of the shared head, zeros in the others; where all
    heads share one rotated key already, there is one block. The blocks' frequencies repeat, which no ordinary table
    does: it is written as `longrope`, whose factors are free.

    Raises UserError before anything is written for a model that this layout cannot express.
    """
    require_one_process("export_deepseek.py")
    model = read_architecture(source)
    _require_plain(model, str(source))
    if model.mla is None:
        raise UserError(f"{source}: model_type={model.model_type}: is not converted; tools/convert_mha_to_mla.py does")
    layouts = [model.layout(layer) for layer in range(model.num_layers)]
    layout = layouts[0]
    if layout.method != "joint":
        raise UserError(f"{source}: low_rank.method={layout.method}: DeepSeek's layout has one latent; valid: joint")
    if any(other != layout for other in layouts):
        raise UserError(
            f"{source}: r or c differ by layer, DeepSeek's layout has one of each: convert with "
            "allocation.per_layer=false, or give them as one number"
        )
    if layout.qk_rope_head_dim == 0 or layout.qk_nope_head_dim == 0:
        raise UserError(f"{source}: qk_rope_head_dim={layout.qk_rope_head_dim}: all or nothing is rotated")
    reader = HFReader(source, model)
    pairs = reader["model.layers.0.self_attn.rope_pairs"]
    for layer in range(1, model.num_layers):
        if not torch.equal(pairs, reader[f"model.layers.{layer}.self_attn.rope_pairs"]):
            raise UserError(
                f"{source}: the pairs that are rotated differ between layers 0 and {layer}, DeepSeek's layout has one "
                "rotary table: convert with partial_rope.strategy=uniform, high, low or ends"
            )
    groups, r = layout.num_key_value_heads, layout.qk_rope_head_dim
    blocks = layout.rope_heads

    def attention(layer: int) -> DeepseekAttention:
        weights = {
            name: reader[f"model.layers.{layer}.self_attn.{name}.weight"]
            for name in ("q_proj", "k_rope_proj", "kv_down_proj", "k_up_proj", "v_up_proj")
        }
        q = weights["q_proj"].unflatten(0, (-1, layout.qk_head_dim))  # [H, r + n, h]
        per_group = len(q) // groups
        q_rope = q.new_zeros(len(q), blocks, r, q.shape[-1])
        heads = torch.arange(len(q))
        q_rope[heads, heads // (len(q) // blocks)] = _interleaved(q[:, :r])
        # Keys may read the first columns of the latent alone.
        unread = layout.value_rank - layout.key_rank
        weights["k_up_proj"] = torch.nn.functional.pad(weights["k_up_proj"], (0, unread))
        ups = [weights[name].unflatten(0, (groups, -1)) for name in ("k_up_proj", "v_up_proj")]
        k_up, v_up = (up.repeat_interleave(per_group, 0) for up in ups)
        k_rope = _interleaved(weights["k_rope_proj"].unflatten(0, (blocks, r))).flatten(0, 1)
        return DeepseekAttention(q[:, r:], q_rope.flatten(1, 2), k_rope, weights["kv_down_proj"], k_up, v_up)

    frequencies = inverse_frequencies(model)[pairs].flatten()
    return _write_deepseek(source, target, settings, model, reader, attention, _rope_parameters(model, frequencies))


def _require_plain(model: Architecture, source: str) -> None:
    """Raise UserError, naming the key, for what DeepSeek's layout has no place for."""
    for key, found in {
        "num_local_experts": model.experts is not None,
        "attention_bias": model.qkv_bias,
        "attention_output_bias": model.attention_output_bias,
        "mlp_bias": model.mlp_bias,
        "qk_norm": model.qk_norm,
        "no_rope_layers": bool(model.no_rope_layers),
        "sliding_window": bool(model.window_layers),
    }.items():
        if found:
            raise UserError(f"{source}: {key}: DeepSeek's layout has no place for it")


def _interleaved(rows: torch.Tensor) -> torch.Tensor:
    """[..., r, h] from half-split (first dims of all pairs, then second dims) to dims 2i and 2i + 1 for pair i."""
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def _rope_parameters(model: Architecture, frequencies: torch.Tensor) -> dict[str, Any]:
    """The config's rotary table: an ordinary one where the frequencies are t^(-2i/R) for some t, such as uniform pairs
    of one head (t is theta) or its r/2 fastest ones (t is theta^(r/d)), else longrope's factors.

    frequencies: float [R/2], of the shared head's pairs.
    """
    theta, width = float(model.rope_parameters["rope_theta"]), 2 * len(frequencies)

    def factors_of(theta: float) -> list[float]:
        return (1 / (frequencies.double() * theta ** (torch.arange(0, width, 2) / width).double())).tolist()

    # The last frequency says which t it would have to be.
    own = float(frequencies[-1]) ** (-width / (width - 2)) if width > 2 else theta
    for base in (theta, own):
        if all(abs(factor - 1) < 1e-6 for factor in factors_of(base)):
            return {"rope_type": "default", "rope_theta": base}
    factors = factors_of(theta)
    length = model.max_position_embeddings
    return {
        "rope_type": "longrope", "rope_theta": theta, "short_factor": factors, "long_factor": factors, "factor": 1.0,
        "attention_factor": 1.0, "original_max_position_embeddings": length,
    }  # fmt: skip


def _write_deepseek(
    source: Path,
    target: Path,
    settings: DeepseekSettings,
    model: Architecture,
    reader: HFReader,
    attention: Callable[[int], DeepseekAttention],
    rope: dict[str, Any],
) -> dict[str, Any]:
    """Write the folder: the attention that is given for each layer, all else as it is in `source`."""
    if torch.float16 in reader.dtypes.values():
        raise UserError(f"{source}: float16 weights: the scaled latents are below its range; valid: bfloat16, float32")
    prefix, first = "model.layers.{}.self_attn.", attention(0)
    _, n, h = first.q_nope.shape
    parts = {name: name for name in reader.names if ".self_attn." not in name or name.endswith("o_proj.weight")}
    dtype = reader.dtypes["model.layers.0.self_attn.o_proj.weight"]
    planned = {name: torch.empty(reader.shapes()[name], dtype=reader.dtypes[name], device="meta") for name in parts}
    # A tied head is written out: vLLM's class does not tie.
    planned["lm_head.weight"] = planned.get("lm_head.weight", planned["model.embed_tokens.weight"])
    c, width, d = len(first.down), len(first.k_rope), first.v_up.shape[1]
    shapes = {
        "q_proj.weight": (model.num_attention_heads * (n + width), h),
        "kv_a_proj_with_mqa.weight": (c + width, h),
        "kv_a_layernorm.weight": (c,),
        "kv_b_proj.weight": (model.num_attention_heads * (n + d), c),
    }
    for layer in range(model.num_layers):
        for name, shape in shapes.items():
            planned[prefix.format(layer) + name] = torch.empty(shape, dtype=dtype, device="meta")
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range")
    config = {key: value for key, value in read_config(source).items() if key in kept} | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": model.vocab_size,
        "hidden_size": h,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": c,
        "qk_nope_head_dim": n,
        "qk_rope_head_dim": width,
        "v_head_dim": d,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": rope,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    with resumable_folder(target, settings.overwrite, identity("deepseek", settings, [source])) as partial:
        writer = HFWriter(partial, planned, parse_size(settings.max_shard_size, "max_shard_size"))
        layers = {prefix.format(layer): layer for layer in range(model.num_layers)}
        sizes = {name: tensor.nbytes for name, tensor in planned.items() if name in parts or name == "lm_head.weight"}
        for part in partial.parts_to_do("export", sizes | dict.fromkeys(layers, sum(map(math.prod, shapes.values())))):
            if part in layers:
                norm = reader[f"model.layers.{layers[part]}.input_layernorm.weight"]
                for name, tensor in attention(layers[part]).tensors(norm, model.rms_norm_eps).items():
                    writer.add(part + name, tensor.to(dtype))
            else:
                writer.add(part, reader[part if part in parts else "model.embed_tokens.weight"])
            partial.finish(part)
        writer.close()
        write_config(partial.path, config)
        copy_companions(source, partial.path)
    return config
