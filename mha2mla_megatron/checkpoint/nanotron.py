"""Checkpoints of nanotron's Llama (github.com/huggingface/nanotron), read as the Hugging Face folder of that model.

A step's folder holds model_config.json and, in `model`, a folder for each module, with a file for each of its
parameters and tensor-parallel ranks. A file holds one tensor, `data`, and says which slices of the whole parameter that
is. Queries, keys and values are one parameter, their rows in this order; gate and up projection are another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.hf import FLOATS
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import read_json_object

MODEL_CONFIG, LATEST, WEIGHTS = "model_config.json", "latest.txt", "model"
VERSIONS = ("1.2", "1.3", "1.4", "1.5")
"""What the files of weights say."""
OF_NANOTRON = ("is_llama_config", "rope_interleaved", "_attn_implementation", "z_loss_enabled", "z_loss_coefficient")
"""Keys of model_config.json that config.json has not; the others have the same names."""
MODULES = {
    "model.embed_tokens": "model.token_position_embeddings.pp_block.token_embedding",
    "model.norm": "model.final_layer_norm.pp_block",
    "lm_head": "model.lm_head.pp_block",
}
FUSED = {"mlp.gate_proj": "mlp.gate_up_proj", "mlp.up_proj": "mlp.gate_up_proj"}
FUSED_ATTENTION = {f"attn.{part}_proj": "attn.qkv_proj" for part in "qkv"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FILE = re.compile(r"model_(\w+?)(?:_pp-rank-(\d+)-of-\d+_tp-rank-(\d+)-of-(\d+))?\.safetensors")
_NUMBER = re.compile(r"(?<!\w)\d+")
"""In a printed shape, which NumPy 2 prints as (np.int64(96), 64)."""

Region = tuple[slice, ...]


def nanotron_step(folder: Path) -> Path | None:
    """The step's folder, `folder` or the one that its latest.txt names; None for what nanotron has not written."""
    if (folder / LATEST).is_file():
        step = (folder / LATEST).read_text(errors="replace").strip()
        if not step.isdecimal() or not (folder / step).is_dir():
            raise UserError(f"{folder / LATEST}: names step {step!r}, of which there is no folder beside it")
        folder = folder / step
    return folder if any((folder / name).exists() for name in (MODEL_CONFIG, "checkpoint_metadata.json")) else None


def read_nanotron_config(folder: Path) -> dict[str, Any]:
    """config.json of the model in a step's folder. Raises UserError for what is not a Llama that nanotron can train."""
    values = _model_config(folder)
    where = folder / MODEL_CONFIG
    if not values.get("is_llama_config"):
        raise UserError(f"{where}: is_llama_config is not true: of nanotron's models only Llama is read")
    if values.get("RoPE") and _interleaved(values):
        raise UserError(f"{where}: rope_interleaved is not false, which no model of partial RoPE can have")
    _refuse_mup(folder / "config.yaml")
    kept = {key: value for key, value in values.items() if key not in OF_NANOTRON}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **kept}


class NanotronReader:
    """The tensors of a step's folder under their Hugging Face names, read one at a time, as HFReader does.

    Raises UserError naming the parameter or file where the folder does not hold the architecture, each part of it once.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = folder
        self.interleaved = _interleaved(_model_config(folder))
        self.head_dim = architecture.head_dim
        self.parameters = {name: _Parameter(name, files) for name, files in _files(folder).items()}
        self.places: dict[str, tuple[str, int, int]] = {}
        shapes, expected = architecture.tensor_shapes(), dict[str, tuple[int, ...]]()
        fused_attention = "model.layers.0.self_attn.k_proj.weight" in shapes  # not with latents
        for name, shape in shapes.items():
            parameter = _parameter_of(name, fused_attention)
            start = expected[parameter][0] if parameter in expected else 0
            expected[parameter] = (start + shape[0], *shape[1:])
            self.places[name] = parameter, start, start + shape[0]
        for parameter, shape in expected.items():
            if parameter not in self.parameters:
                raise UserError(f"{folder / WEIGHTS}: parameter {parameter} is missing")
            if (found := self.parameters[parameter].shape) != shape:
                raise UserError(f"{folder / WEIGHTS}: {parameter} has shape {found}, {MODEL_CONFIG} says {shape}")
        if surplus := self.parameters.keys() - expected.keys():
            raise UserError(f"{folder / WEIGHTS}: surplus parameter {min(surplus)}: {MODEL_CONFIG} makes none")
        self.dtypes = {name: self.parameters[parameter].dtype for name, (parameter, _, _) in self.places.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        parameter, start, end = self.places[name]
        rows = self.parameters[parameter].read()[start:end]
        if self.interleaved and name.rpartition(".")[0].endswith(("self_attn.q_proj", "self_attn.k_proj")):
            # Pairs are (2j, 2j + 1) there and (j, j + d/2) here.
            rows = rows.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return rows


@dataclass(frozen=True)
class _Shard:
    """One file of a parameter. pairs: (slices of its tensor, where these are in the whole one)."""

    file: Path
    dtype: torch.dtype
    whole_shape: tuple[int, ...]
    pairs: tuple[tuple[Region, Region], ...]


class _Parameter:
    """A parameter and its files, which hold each part of it once."""

    def __init__(self, name: str, files: list[Path]) -> None:
        ranks = [match.groups()[1:] for file in files if (match := _FILE.fullmatch(file.name))]
        stage, _, size = ranks[0]
        expected = [(stage, str(rank), size) for rank in range(len(ranks))] if size else [(None, None, None)]
        if {*ranks} != {*expected} or len(ranks) != int(size or 1):
            found = ", ".join(file.name for file in files)
            raise UserError(f"{files[0].parent}: the files of {name} are not one of each tensor-parallel rank: {found}")
        self.shards = [_shard(file) for file in files]
        first = self.shards[0]
        self.shape, self.dtype = first.whole_shape, first.dtype
        for shard in self.shards:
            if (shard.whole_shape, shard.dtype) != (self.shape, self.dtype):
                raise UserError(
                    f"{shard.file}: of a parameter {shard.whole_shape} of {shard.dtype}, but {first.file.name} of one "
                    f"{self.shape} of {self.dtype}"
                )
        if not _tile([part for shard in self.shards for _, part in shard.pairs], self.shape):
            raise UserError(f"{files[0].parent}: the slices in the files of {name} are not each part of it once")

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for shard in self.shards:
            try:
                with safe_open(shard.file, framework="pt") as content:
                    data = content.get_tensor("data")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shard.file}: cannot be read ({error})") from None
            for local, part in shard.pairs:
                whole[part] = data[local]
        return whole


def _parameter_of(name: str, fused_attention: bool) -> str:
    """Nanotron's name of the parameter that holds a Hugging Face tensor."""
    module, _, kind = name.rpartition(".")
    if (match := _LAYER.fullmatch(module)) is None:
        return f"{MODULES[module]}.{kind}"
    part = match[2].replace("self_attn.", "attn.")
    part = (FUSED | (FUSED_ATTENTION if fused_attention else {})).get(part, part)
    return f"model.decoder.{match[1]}.pp_block.{part}.{kind}"


def _files(folder: Path) -> dict[str, list[Path]]:
    """Parameter -> its files."""
    root, files = folder / WEIGHTS, dict[str, list[Path]]()
    for file in sorted(root.rglob("*.safetensors")):
        match = _FILE.fullmatch(file.name)
        if match is None:
            raise UserError(
                f"{file}: not a name of a file of Llama's weights; versions before 1.4 have names that nanotron's "
                "scripts/fix_checkpoint_bad_naming.py mends"
            )
        files.setdefault(".".join((*file.relative_to(root).parts[:-1], match[1])), []).append(file)
    if not files:
        raise UserError(f"{root}: no weights; those of a nanotron checkpoint are there, beside its optimizer's state")
    return files


def _shard(file: Path) -> _Shard:
    """What a file says of itself; reads no weights."""
    try:
        with safe_open(file, framework="pt") as content:
            metadata, data = content.metadata() or {}, content.get_slice("data")
            shape, dtype = tuple(data.get_shape()), data.get_dtype()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated, or not a safetensors file with a tensor 'data' ({error})") from None
    if dtype not in FLOATS:
        raise UserError(f"{file}: has dtype {dtype}; one of {', '.join(FLOATS)} is needed")
    if "_tp-rank-" not in file.name:  # such as norms, of which all ranks have the same
        return _Shard(file, FLOATS[dtype], shape, ((_all_of(shape), _all_of(shape)),))
    if (version := metadata.get("version")) not in VERSIONS:
        raise UserError(f"{file}: nanotron's checkpoint version {version}; those known: {', '.join(VERSIONS)}")
    try:
        whole_shape = tuple(int(size) for size in _NUMBER.findall(metadata["unsharded_shape"]))
        pairs = tuple(
            (_region(local, shape), _region(part, whole_shape))
            for local, _, part in (pair.partition("#") for pair in metadata["local_global_slices_pairs"].split(";"))
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: its metadata does not say of which slices it is ({first_line(error)})") from None
    if not _tile([local for local, _ in pairs], shape) or any(_size(local) != _size(part) for local, part in pairs):
        raise UserError(f"{file}: shape {shape} is not that of its slices of {whole_shape}")
    return _Shard(file, FLOATS[dtype], whole_shape, pairs)


def _region(text: str, shape: tuple[int, ...]) -> Region:
    """'0,8,None|None,None,None' -> the slices, with their ends in numbers. Raises ValueError."""
    slices = []
    for part, size in zip(text.split("|"), shape, strict=True):
        start, stop, step = (None if word == "None" else int(word) for word in part.split(","))
        start, stop = start or 0, size if stop is None else stop
        if step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"{part} of {size}")
        slices.append(slice(start, stop))
    return tuple(slices)


def _all_of(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, size) for size in shape)


def _size(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _tile(regions: list[Region], shape: tuple[int, ...]) -> bool:
    """Whether the regions are cuts of a tensor along one of its dimensions that leave out nothing."""
    whole = _all_of(shape)
    cut = {dim for region in regions for dim, part in enumerate(region) if part != whole[dim]}
    if len(cut) != 1:
        return not cut and len(regions) == 1
    (dim,) = cut
    edges = sorted((region[dim].start, region[dim].stop) for region in regions)
    ends = [0, *(stop for _, stop in edges)]
    return ends[-1] == shape[dim] and [start for start, _ in edges] == ends[:-1]


def _model_config(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / MODEL_CONFIG, f"{folder}: a nanotron checkpoint without {MODEL_CONFIG}")


def _interleaved(values: dict[str, Any]) -> bool:
    """Whether rotary pairs are neighbours, as they always were before the key came (September 2024)."""
    return bool(values.get("rope_interleaved", True))


def _refuse_mup(file: Path) -> None:
    """Models trained so divide scores by d, not its root, which no other file says. file: the run's, where there."""
    try:
        values = yaml.safe_load(file.read_text()) if file.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({first_line(error)})") from None
    for key in ("model", "init_method", "use_mup"):
        values = values.get(key) if isinstance(values, dict) else None
    if values:
        raise UserError(f"{file}: model.init_method.use_mup is true: its attention is not Llama's")
