"""Models of the MHA2MLA authors' own code -> our exported format: the same function, other names and row orders.

Their code trains with transformers or with nanotron. A nanotron checkpoint of an ordinary Llama becomes an ordinary
Hugging Face folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from mha2mla_megatron.architecture import Architecture, parse_architecture, read_config
from mha2mla_megatron.checkpoint.folders import copy_companions, resolve_folder
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.checkpoint.nanotron import (
    MODEL_CONFIG,
    WEIGHTS,
    NanotronReader,
    nanotron_step,
    read_nanotron_config,
)
from mha2mla_megatron.checkpoint.resume import identity, resumable_folder
from mha2mla_megatron.convert import converted_config
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.families import is_converted
from mha2mla_megatron.files import require_file
from mha2mla_megatron.partial_rope import head_row_order, kept_pairs, load_scores, ordered_heads
from mha2mla_megatron.project_config import ProjectConfig, ProjectNames, parse_project_config
from mha2mla_megatron.ranks import require_one_process

PROJECT_KEYS = ("RoPE", "SVD", "AE", "mha2mla")
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")


@dataclass(frozen=True)
class ImportSettings:
    """Settings of tools/import_mha2mla.py."""

    qk_tensor: str | None = None
    """2-norm: the .pth file that the model's qk_tensor_path means. None: the file of that name beside config.json."""

    rope_config: str | None = None
    """The YAML file of partial-RoPE settings, for a checkpoint of partial RoPE alone whose config.json has none."""

    tokenizer: str | None = None
    """The folder or hub id of a model whose tokenizer goes along: nanotron keeps none. None: what SRC has."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size, "max_shard_size")


@dataclass(frozen=True)
class _ProjectArchitecture(Architecture):
    """The converted model with the attention tensors that their folder holds."""

    names: ProjectNames

    def attention_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        layout, names, h = self.layout(layer), self.names, self.hidden_size
        c = layout.kv_lora_rank or h
        downs = {
            "joint": (names.joint_down,), "split": (names.k_down, names.v_down), "key": (names.k_down,),
            "value": (names.v_down,), "none": (),
        }  # fmt: skip
        shapes = {
            "q_proj": (self.num_attention_heads * self.head_dim, h),
            names.k_rope: (layout.rope_dim, h),
            names.k_up: (layout.nope_dim, h if layout.method == "value" else c),
            names.v_up: (layout.value_dim, h if layout.method == "key" else c),
            "o_proj": (h, self.num_attention_heads * self.head_dim),
            **dict.fromkeys(downs[layout.method], (c, h)),
        }
        latents = downs[layout.method]
        biased = [
            name
            for name in shapes
            if (self.attention_output_bias if name == "o_proj" else self.qkv_bias and name not in latents)
        ]
        weights = {f"{name}.weight": shape for name, shape in shapes.items()}
        return weights | {f"{name}.bias": shapes[name][:1] for name in biased}


def import_model(source: Path, target: Path, settings: ImportSettings) -> Architecture:
    """Write the model of `source` in our format, every number as it is stored; returns its architecture.

    What nanotron saved of a model that is not converted is written as an ordinary Hugging Face folder.

    Raises UserError before anything is written for what is missing, damaged or cannot be expressed.
    """
    require_one_process("import_mha2mla.py")
    step = nanotron_step(source)
    where = source / "config.json" if step is None else step / MODEL_CONFIG
    config = read_config(source) if step is None else read_nanotron_config(step)
    config = _with_rope_config(config, where, settings.rope_config)
    if is_converted(config.get("model_type")):
        raise UserError(f"{where}: model_type={config['model_type']}: is in our format already")
    kept = {key: value for key, value in config.items() if key not in PROJECT_KEYS}
    original = parse_architecture(kept, str(where))
    if original.model_type not in ("llama", "qwen2") or original.window_layers:
        raise UserError(
            f"{where}: model_type={original.model_type}: only their llama and qwen2 without windows are read"
        )
    read = partial(HFReader, source) if step is None else partial(NanotronReader, step)
    if step is not None and not any(config.get(key) for key in PROJECT_KEYS):
        if settings.qk_tensor is not None:
            raise UserError(f"qk_tensor: {where} has no RoPE: an ordinary model, of which all pairs are rotated")
        model, reader = original, read(original)
        tensor = reader.__getitem__
    else:
        project = parse_project_config(config, str(where), original.num_key_value_heads, original.head_dim)
        if project.names is not None and project.names.query_by_head and original.qkv_bias:
            raise UserError(f"{where}: attention_bias=true: latents with a bias have no place in our layout")
        model = original.converted(original.resolve(project.mla))
        pairs = _pairs(where, model, settings.qk_tensor)
        theirs = original if project.names is None else _ProjectArchitecture(**vars(model), names=project.names)
        reader = read(theirs)
        tensor = _converted_tensors(reader, theirs, model, project, pairs)
        kept = converted_config(kept, model, "auto")
    if step is not None:
        kept["dtype"] = str(reader.dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    companions = where.parent if settings.tokenizer is None else resolve_folder(settings.tokenizer)

    shapes = model.tensor_shapes()
    tensors = {name: torch.empty(shape, dtype=_dtype(name, reader), device="meta") for name, shape in shapes.items()}
    inputs = [where.parent, *(Path(file) for file in (settings.qk_tensor, settings.rope_config) if file is not None)]
    inputs += (where.parent / WEIGHTS).rglob("*.safetensors")  # nanotron's
    with resumable_folder(target, settings.overwrite, identity("import", settings, inputs)) as folder:
        writer = HFWriter(folder, tensors, parse_size(settings.max_shard_size, "max_shard_size"))
        for name in folder.parts_to_do("import", {name: planned.nbytes for name, planned in tensors.items()}):
            writer.add(name, tensor(name).to(tensors[name].dtype))
            folder.finish(name)
        writer.close()
        write_config(folder.path, kept)
        copy_companions(companions, folder.path)
    return model


def _converted_tensors(
    reader: HFReader | NanotronReader,
    theirs: Architecture,
    converted: Architecture,
    project: ProjectConfig,
    pairs: list[torch.Tensor],
) -> Callable[[str], torch.Tensor]:
    """Gives each tensor of our model by its name, from theirs."""

    @lru_cache(maxsize=1)
    def attention(layer: int) -> dict[str, torch.Tensor]:
        weights = {name: reader[f"model.layers.{layer}.self_attn.{name}"] for name in theirs.attention_shapes(layer)}
        return _attention(weights, converted, project, layer, pairs[layer])

    def tensor(name: str) -> torch.Tensor:
        match = _ATTENTION.fullmatch(name)
        return reader[name] if match is None else attention(int(match[1]))[match[2]]

    return tensor


def _dtype(name: str, reader: HFReader | NanotronReader) -> torch.dtype:
    """The type that our tensor gets: its own, or for attention weights the widest that the layer has."""
    if name.endswith(".rope_pairs"):
        return torch.int64
    if (match := _ATTENTION.fullmatch(name)) is None:
        return reader.dtypes[name]
    layer = f"model.layers.{match[1]}.self_attn."
    return reduce(torch.promote_types, (dtype for key, dtype in reader.dtypes.items() if key.startswith(layer)))


def _with_rope_config(config: dict[str, Any], where: Path, rope_config: str | None) -> dict[str, Any]:
    """The config of the file `where`, with the settings of the file `rope_config`."""
    if rope_config is None:
        return config
    if any(config.get(key) for key in PROJECT_KEYS):
        raise UserError(f"rope_config: {where} has settings of its own; leave it out")
    require_file(Path(rope_config), "rope_config")
    try:
        values = yaml.safe_load(Path(rope_config).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"rope_config: {rope_config}: cannot be read as YAML ({first_line(error)})") from None
    values = values.get("RoPE", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise UserError(f"rope_config: {rope_config}: holds a {type(values).__name__}, not settings")
    return {**config, "RoPE": values}


def _pairs(where: Path, converted: Architecture, qk_tensor: str | None) -> list[torch.Tensor]:
    """The rotated pairs of each layer: int64 [G, r/2]. where: the file of the model's config."""
    assert converted.mla is not None
    rope, groups, d = converted.mla.partial_rope, converted.num_key_value_heads, converted.head_dim
    scores: list[torch.Tensor | None] = [None] * converted.num_layers
    if rope.strategy == "2-norm":
        stored = str(rope.scores)
        file = where.parent / PurePosixPath(stored).name if qk_tensor is None else Path(qk_tensor)
        if qk_tensor is None and not file.is_file():
            raise UserError(
                f"{where}: qk_tensor_path: {stored} says which pairs are rotated, and {file} does not "
                "exist; give that file as qk_tensor=FILE (the authors' repository has theirs in utils/)"
            )
        loaded = load_scores(file, converted.num_layers, groups, d, key="qk_tensor")
        _refuse_ties(loaded, rope.qk_rope_head_dim // 2, file)
        scores = list(loaded)
    elif qk_tensor is not None:
        raise UserError(f"qk_tensor: the pairs of this model are chosen by '{rope.strategy}', without scores")
    return [kept_pairs(rope, converted.layout(i).qk_rope_head_dim, groups, d, part) for i, part in enumerate(scores)]


def _refuse_ties(scores: torch.Tensor, kept: int, file: Path) -> None:
    """Which of two equal pairs their code kept depends on their machine. scores: [L, G, d/2]."""
    ordered = scores.sort(dim=-1, descending=True).values
    if 0 < kept < scores.shape[-1] and bool((ordered[..., kept - 1] == ordered[..., kept]).any()):
        raise UserError(f"qk_tensor: {file}: of two pairs with the same score, one would be kept and one not")


def _attention(
    weights: dict[str, torch.Tensor], converted: Architecture, project: ProjectConfig, layer: int, pairs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Our attention tensors of one layer from theirs (names under `self_attn.`, weights and biases alike)."""
    layout, names = converted.layout(layer), project.names
    r, order = layout.qk_rope_head_dim, head_row_order(pairs, layout.head_dim)

    def queries(name: str) -> torch.Tensor:
        if names is None or names.query_by_head:
            return ordered_heads(weights[name], order).flatten(0, 2)
        parts = weights[name].split([n * layout.num_attention_heads for n in (r, layout.qk_nope_head_dim)])
        return torch.cat([part.unflatten(0, (layout.num_attention_heads, -1)) for part in parts], 1).flatten(0, 1)

    tensors = {"rope_pairs": pairs}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in weights:
            tensors[f"q_proj.{kind}"] = queries(f"q_proj.{kind}")
            if names is None:
                keys = ordered_heads(weights[f"k_proj.{kind}"], order)[:, 0]
                k_rope, k_rest = keys[:, :r].flatten(0, 1), keys[:, r:].flatten(0, 1)
                values = weights[f"v_proj.{kind}"]
            else:
                k_rope, k_rest, values = (weights[f"{n}.{kind}"] for n in (names.k_rope, names.k_up, names.v_up))
            tensors[f"k_rope_proj.{kind}"] = k_rope
            # A bias here adds one number to all scores of a query, which softmax ignores: ours has none.
            tensors[f"{'k_up_proj' if layout.factors_key else 'k_nope_proj'}.{kind}"] = k_rest
            tensors[f"{'v_up_proj' if layout.factors_value else 'v_proj'}.{kind}"] = values
        if f"o_proj.{kind}" in weights:
            tensors[f"o_proj.{kind}"] = weights[f"o_proj.{kind}"]
    if names is not None and layout.method == "joint":
        tensors["kv_down_proj.weight"] = weights[f"{names.joint_down}.weight"]
    elif names is not None and layout.method != "none":
        used = [n for n, u in ((names.k_down, layout.factors_key), (names.v_down, layout.factors_value)) if u]
        if used:
            tensors["kv_down_proj.weight"] = torch.cat([weights[f"{name}.weight"] for name in used])
    return tensors
