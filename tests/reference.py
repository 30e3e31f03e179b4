"""A few-line reference of a converted model: float64, one pair rotated at a time, dense U V^T, no cache."""

from __future__ import annotations

from typing import Any

import numpy
import torch


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The dense best rank-`rank` approximation, by a plain singular value decomposition."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def reference_logits(
    model: torch.nn.Module, tokens: torch.Tensor, pairs: list[list[list[int]]], method: str, ranks: list[Any]
) -> torch.Tensor:
    """Logits of `model` (transformers' Llama) after the conversion, computed from its original weights.

    pairs[layer][kv head] lists the pairs that are rotated; ranks[layer] is c, or (the keys', the values') of split.
    Returns float64 [b, s, vocabulary].
    """
    config, weights = model.config, {name: t.double() for name, t in model.state_dict().items()}
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rotary = model.model.rotary_emb
    frequencies, factor = rotary.inv_freq.double(), rotary.attention_scaling
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f"layers.{layer}." in k}
        n = _norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        q = _linear(n, w, "self_attn.q_proj").unflatten(-1, (heads, d))
        key_weight, value_weight = _low_rank(w, pairs[layer], method, ranks[layer], d)
        zero = torch.zeros(groups * d, dtype=torch.float64)
        k = (n @ key_weight.T + w.get("self_attn.k_proj.bias", zero)).unflatten(-1, (groups, d))
        v = (n @ value_weight.T + w.get("self_attn.v_proj.bias", zero)).unflatten(-1, (groups, d))
        out = torch.empty_like(q)
        for i in range(heads):
            g = i // (heads // groups)
            qi, kg = (
                _rotated(q[:, :, i], pairs[layer][g], frequencies),
                _rotated(k[:, :, g], pairs[layer][g], frequencies),
            )
            scores = factor**2 * qi @ kg.transpose(1, 2) / numpy.sqrt(d)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            out[:, :, i] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, g]
        x = x + _linear(out.flatten(2), w, "self_attn.o_proj")
        n = _norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = _linear(n, w, "mlp.gate_proj"), _linear(n, w, "mlp.up_proj")
        x = x + _linear(torch.nn.functional.silu(gate) * up, w, "mlp.down_proj")
    x = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _rotated(x: torch.Tensor, kept: list[int], frequencies: torch.Tensor) -> torch.Tensor:
    """x [b, s, d] with only the kept pairs (j, j + d/2) turned by position * frequency."""
    y, half = x.clone(), x.shape[-1] // 2
    position = torch.arange(x.shape[1], dtype=torch.float64)
    for j in kept:
        cos, sin = torch.cos(position * frequencies[j]), torch.sin(position * frequencies[j])
        y[..., j] = x[..., j] * cos - x[..., j + half] * sin
        y[..., j + half] = x[..., j + half] * cos + x[..., j] * sin
    return y


def _low_rank(
    w: dict[str, torch.Tensor], pairs: list[list[int]], method: str, rank: Any, d: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value weights with their factored rows replaced by the dense low-rank approximation."""
    key, value = w["self_attn.k_proj.weight"].clone(), w["self_attn.v_proj.weight"]
    key_rank, rank = rank if isinstance(rank, tuple) else (rank, rank)
    lost = [g * d + i for g, kept in enumerate(pairs) for i in range(d) if i % (d // 2) not in kept]
    if method == "joint":
        both = truncated(torch.cat((key[lost], value)), rank)
        key[lost], value = both[: len(lost)], both[len(lost) :]
    if method in ("split", "key") and lost:
        key[lost] = truncated(key[lost], key_rank)
    if method in ("split", "value"):
        value = truncated(value, rank)
    return key, value
