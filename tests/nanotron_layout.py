"""The layout of nanotron's checkpoints of Llama, written apart from the reader, with plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

KEYS = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "rms_norm_eps", "tie_word_embeddings", "use_cache", "vocab_size", "attention_bias",
)  # fmt: skip
"""Of model_config.json, as in config.json."""
STEP = 10


def write_nanotron(
    source: Path, target: Path, tp: int = 1, pp: int = 1, interleaved: bool = False, **keys: Any
) -> Path:
    """A Hugging Face folder as nanotron saves that model at its tenth step; returns the run's folder, `target`.

    keys: more of model_config.json. Attention is fused where the folder has k_proj, as for all but their MLA.
    """
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    layers, h = config["num_hidden_layers"], config["hidden_size"]
    step = target / str(STEP)
    values = {key: config.get(key) for key in KEYS} | {"pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0}
    values |= {"is_llama_config": True, "rope_interleaved": interleaved, **keys}
    write(step / "model_config.json", json.dumps(values))
    write(step / "checkpoint_metadata.json", json.dumps({"version": "1.4", "tp": tp, "dp": 1, "metas": {}}))
    write(step / "config.yaml", json.dumps({"model": {"init_method": {"std": 0.02}}}))
    write(step / "optimizer" / "optimizer_config.json", "{}")
    write(step / "random" / "tp-0-of-1_dp-0-of-1_pp-0-of-1.pt", "")
    write(target / "latest.txt", str(STEP))

    def save(name: str, stage: int, parts: list[torch.Tensor], dim: int | None) -> None:
        save_parameter(step / "model" / Path(*name.split(".")), parts, dim, tp, f"pp-rank-{stage}-of-{pp}")

    def pop(name: str) -> torch.Tensor:
        return tensors.pop(f"{name}.weight")

    save("model.token_position_embeddings.pp_block.token_embedding", 0, [pop("model.embed_tokens")], 0)
    save("model.final_layer_norm.pp_block", pp - 1, [pop("model.norm")], None)
    if not config["tie_word_embeddings"]:
        save("model.lm_head.pp_block", pp - 1, [pop("lm_head")], 0)
    for layer in range(layers):
        hf, block, stage = f"model.layers.{layer}", f"model.decoder.{layer}.pp_block", layer * pp // layers
        for norm in ("input_layernorm", "post_attention_layernorm"):
            save(f"{block}.{norm}", stage, [pop(f"{hf}.{norm}")], None)
        save(f"{block}.mlp.gate_up_proj", stage, [pop(f"{hf}.mlp.{name}_proj") for name in ("gate", "up")], 0)
        save(f"{block}.mlp.down_proj", stage, [pop(f"{hf}.mlp.down_proj")], 1)
        save(f"{block}.attn.o_proj", stage, [pop(f"{hf}.self_attn.o_proj")], 1)
        if f"{hf}.self_attn.k_proj.weight" in tensors:
            q, k, v = (pop(f"{hf}.self_attn.{name}_proj") for name in "qkv")
            if interleaved:
                q, k = (neighbours(rows, h // config["num_attention_heads"]) for rows in (q, k))
            save(f"{block}.attn.qkv_proj", stage, [q, k, v], 0)
        for name in [name for name in tensors if name.startswith(f"{hf}.")]:
            module = name.removeprefix(f"{hf}.self_attn.").removesuffix(".weight")
            save(f"{block}.attn.{module}", stage, [tensors.pop(name)], 0)
    assert not tensors
    return target


def neighbours(rows: torch.Tensor, d: int) -> torch.Tensor:
    """Rows whose rotary pairs are (j, j + d/2) in each head, so that they are (2j, 2j + 1)."""
    moved = torch.empty_like(rows)
    for head in range(0, len(rows), d):
        for j in range(d // 2):
            moved[head + 2 * j], moved[head + 2 * j + 1] = rows[head + j], rows[head + j + d // 2]
    return moved


def save_parameter(folder: Path, parts: list[torch.Tensor], dim: int | None, tp: int, stage: str) -> None:
    """A weight that is made of `parts`, each split into `tp` along `dim`; None: all ranks have the same."""
    folder.mkdir(parents=True)
    if dim is None:
        save_file({"data": parts[0].clone()}, folder / "model_weight.safetensors", metadata={})
        return
    shape = list(torch.cat(parts).shape)
    if len(parts) > 1:
        shape[0] = numpy.int64(shape[0])  # as there, where it shows: (np.int64(128), 64)
    for rank in range(tp):
        pieces, pairs, local, begin = [], [], 0, 0
        for part in parts:
            size = part.shape[dim] // tp
            pieces.append(part.narrow(dim, rank * size, size))
            own = f"{local},{local + size},None" if len(parts) > 1 else "None,None,None"
            start = begin + rank * size
            words = [["None,None,None"] * 2 for _ in shape]
            words[dim] = [own, f"{start},{start + size},None"]
            pairs.append("#".join("|".join(side) for side in zip(*words, strict=True)))
            local, begin = local + size, begin + part.shape[dim]
        metadata = {
            "version": "1.4", "local_global_slices_pairs": ";".join(pairs), "unsharded_shape": str(tuple(shape))
        }  # fmt: skip
        file = folder / f"model_weight_{stage}_tp-rank-{rank}-of-{tp}.safetensors"
        save_file({"data": torch.cat(pieces, dim).contiguous()}, file, metadata=metadata)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
