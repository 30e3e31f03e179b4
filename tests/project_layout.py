"""The layout of the MHA2MLA authors' own checkpoints, written and run apart from the importer: plain loops, float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference import _linear, _norm, _rotated

FIRST = {"joint": {"kv_down_proj": ["W_down_k"]}, "split": {"kv_down_proj": ["W_down_k", "W_down_v"]}}
SECOND = {
    "joint": {"kv_down_proj": ["kv_proj.down_kv"]},
    "split": {"kv_down_proj": ["kv_proj.down_k", "kv_proj.down_v"]},
    "key": {"kv_down_proj": ["kv_proj.down_k"]},
    "value": {"kv_down_proj": ["kv_proj.down_v"]},
    "none": {},
}


def kept_dims(pairs: list[int], d: int) -> list[int]:
    """The rotated dims of a head, in ascending order."""
    return sorted(dim for j in pairs for dim in (j, j + d // 2))


def write_project_model(
    ours: Path, original: Path, target: Path, generation: str, method: str, keys: dict[str, Any]
) -> Path:
    """One of our converted models as their code would have saved it. generation: first, second or plain (no factors).

    keys: what their config.json says. Key biases that ours has not are made up: softmax ignores them.
    """
    shutil.copytree(original, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **keys}))
    heads, groups, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    chance, tensors = torch.Generator().manual_seed(7), {}
    ours_tensors = load_file(ours / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        w = {k.removeprefix(prefix): ours_tensors.pop(k) for k in list(ours_tensors) if k.startswith(prefix)}
        pairs = w.pop("rope_pairs").tolist()
        kept = [kept_dims(p, d) for p in pairs]
        rest = [[i for i in range(d) if i not in dims] for dims in kept]
        r, new = len(kept[0]), {}
        for kind in ("weight", "bias"):
            if f"o_proj.{kind}" in w:
                new[f"o_proj.{kind}"] = w[f"o_proj.{kind}"]
            if f"q_proj.{kind}" not in w:
                continue
            q = w[f"q_proj.{kind}"]
            if generation == "second":  # all heads' rotated rows, then all heads' others
                rows = [h * d + i for h in range(heads) for i in range(r)]
                new[f"q_proj.{kind}"] = q[rows + [i for i in range(heads * d) if i not in rows]]
            else:  # every row where the original model has it
                new[f"q_proj.{kind}"] = torch.empty_like(q)
                for h in range(heads):
                    g = h // (heads // groups)
                    for i, dim in enumerate(kept[g] + rest[g]):
                        new[f"q_proj.{kind}"][h * d + dim] = q[h * d + i]
            k_rope = w[f"k_rope_proj.{kind}"]
            k_rest = w.get(f"k_up_proj.{kind}", w.get(f"k_nope_proj.{kind}"))
            if k_rest is None:
                width = (groups * (d - r), *([w["kv_down_proj.weight"].shape[0]] if kind == "weight" else []))
                k_rest = torch.randn(width, generator=chance)
            value = w.get(f"v_up_proj.{kind}", w.get(f"v_proj.{kind}"))
            if generation == "plain":
                key = torch.empty(groups * d, *k_rope.shape[1:])
                for g in range(groups):
                    for i, dim in enumerate(kept[g]):
                        key[g * d + dim] = k_rope[g * r + i]
                    for i, dim in enumerate(rest[g]):
                        key[g * d + dim] = k_rest[g * (d - r) + i]
                new |= {f"k_proj.{kind}": key, f"v_proj.{kind}": value}
            elif generation == "first":
                new |= {f"W_k_r.{kind}": k_rope, f"W_up_k.{kind}": k_rest, f"W_up_v.{kind}": value}
            else:
                new |= {f"k_r_proj.{kind}": k_rope, f"kv_proj.up_k.{kind}": k_rest, f"kv_proj.up_v.{kind}": value}
        downs = {"first": FIRST, "second": SECOND, "plain": {"none": {}}}[generation][method]
        for name, theirs in downs.items():
            parts = w[f"{name}.weight"].chunk(len(theirs))
            new |= {f"{their}.weight": part for their, part in zip(theirs, parts, strict=True)}
        tensors |= {prefix + name: tensor.clone().contiguous() for name, tensor in new.items()}
    save_file({**ours_tensors, **tensors}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def project_logits(folder: Path, tokens: torch.Tensor, pairs: list[list[list[int]]], theta: float) -> torch.Tensor:
    """What their code computes: keys put together in the original model's order of dims, kept ones rotated."""
    config = json.loads((folder / "config.json").read_text())
    heads, groups, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    weights = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f"layers.{layer}." in k}
        w = {k.removeprefix("self_attn."): v for k, v in w.items()}
        n = _norm(x, w["input_layernorm.weight"], config["rms_norm_eps"])
        kept = [kept_dims(p, d) for p in pairs[layer]]
        rest = [[i for i in range(d) if i not in dims] for dims in kept]
        r = len(kept[0])
        q = _linear(n, w, "q_proj").unflatten(-1, (heads, d))
        if "k_r_proj.weight" in w:
            parts, flat = torch.empty_like(q), q.flatten(2)
            for h in range(heads):
                g = h // (heads // groups)
                parts[:, :, h, kept[g]] = flat[..., h * r : (h + 1) * r]
                parts[:, :, h, rest[g]] = flat[..., heads * r + h * (d - r) :][..., : d - r]
            q = parts
        if "k_proj.weight" in w:
            k, v = _linear(n, w, "k_proj").unflatten(-1, (groups, d)), _linear(n, w, "v_proj")
        else:
            k_name, v_name, r_name = ("W_up_k", "W_up_v", "W_k_r") if "W_k_r.weight" in w else (
                "kv_proj.up_k", "kv_proj.up_v", "k_r_proj")  # fmt: skip
            joint = "kv_proj.down_kv.weight" in w or ("W_down_k.weight" in w and "W_down_v.weight" not in w)
            k_down, v_down = ("W_down_k", "W_down_v") if "W_k_r.weight" in w else ("kv_proj.down_k", "kv_proj.down_v")
            if joint:
                k_down = v_down = "W_down_k" if "W_down_k.weight" in w else "kv_proj.down_kv"
            k_rest = _linear(_linear(n, w, k_down) if f"{k_down}.weight" in w else n, w, k_name)
            v = _linear(_linear(n, w, v_down) if f"{v_down}.weight" in w else n, w, v_name)
            k_rope, k = _linear(n, w, r_name), torch.empty(*n.shape[:2], groups, d, dtype=torch.float64)
            for g in range(groups):
                k[:, :, g, kept[g]] = k_rope[..., g * r : (g + 1) * r]
                k[:, :, g, rest[g]] = k_rest[..., g * (d - r) : (g + 1) * (d - r)]
        v, out = v.unflatten(-1, (groups, d)), torch.empty_like(q)
        for h in range(heads):
            g = h // (heads // groups)
            qi, kg = (_rotated(y, pairs[layer][g], frequencies) for y in (q[:, :, h], k[:, :, g]))
            scores = qi @ kg.transpose(1, 2) / d**0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            out[:, :, h] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, g]
        x = x + _linear(out.flatten(2), w, "o_proj")
        n = _norm(x, w["post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate, up = _linear(n, w, "mlp.gate_proj"), _linear(n, w, "mlp.up_proj")
        x = x + _linear(torch.nn.functional.silu(gate) * up, w, "mlp.down_proj")
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
