"""What is in a Megatron checkpoint, and whether all of it can be read; needs neither a GPU nor Megatron."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.average import has_average
from mha2mla_megatron.checkpoint.manifest import MANIFEST, check_manifest
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.checkpoint.megatron import TorchDistReader, check_coverage, locate_checkpoint
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.config import describe_conversion
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.progress import Progress


@dataclass(frozen=True)
class InspectSettings:
    """Settings of tools/inspect_checkpoint.py."""

    iteration: int | str | None = None
    """The saved step of a checkpoint root; best: the one that keep_best kept. None: the latest."""

    verify: bool = True
    """Read every tensor: all its pieces are there, their checksums are right, their values are finite."""

    output: str | None = None
    """JSON file for everything that is found, with each tensor by itself."""

    overwrite: bool = False
    """Replace output if it exists."""


def inspect_checkpoint(path: Path, settings: InspectSettings) -> dict[str, Any]:
    """Describe one step of a checkpoint root, or a step folder, as plain JSON values; writes settings.output.

    Raises UserError for the first thing that is missing, damaged or not finite, naming tensor and file.
    """
    side, step_folder = locate_checkpoint(path, settings.iteration)
    manifest = check_manifest(step_folder)
    architecture = read_architecture(side)
    reader = TorchDistReader(step_folder)
    shapes = reader.shapes()
    check_coverage(shapes, megatron_shapes(architecture), step_folder)
    saved = reader.values()
    if settings.verify:
        _verify(reader)
    tensors = [_tensor(name, shape, reader.entries[name].properties.dtype) for name, shape in shapes.items()]
    found = {
        "folder": str(step_folder),
        "step": _step(step_folder, manifest, saved),
        "saved_steps": saved_steps(side.parent),
        "layout": None if manifest is None else manifest["layout"],
        "manifest": manifest is not None,
        "verified": settings.verify,
        "run": saved.get("run"),
        "schedule": saved.get("schedule"),
        "optimizer_state": any(name.startswith("optimizer.") for name in shapes),
        "average": has_average(shapes),
        "model": dataclasses.asdict(architecture),
        "tensors": tensors,
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "files": {file.name: file.stat().st_size for file in sorted(step_folder.iterdir())},
    }
    if settings.output is not None:
        with new_files([Path(settings.output)], settings.overwrite) as (file,):
            write_json(file, found)
    return found


def format_inspection(found: dict[str, Any]) -> str:
    """Lines about the step and a table of its tensors; those that differ only in numbers of layers and experts share a
    row."""
    steps, model, layout, run = (found[key] for key in ("saved_steps", "model", "layout", "run"))
    conversion = model["mla"]
    lines = [
        f"{found['folder']}: step {found['step']}" + (f" of {', '.join(map(str, steps))}" if len(steps) > 1 else ""),
        "saved at: " + (", ".join(f"{k} {n}" for k, n in layout.items()) if layout else f"not known (no {MANIFEST})"),
        f"model: {model['model_type']}, {model['num_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads, {model['num_key_value_heads']} key/value heads of {model['head_dim']}, "
        f"vocabulary {model['vocab_size']}",
        "conversion: " + ("none" if conversion is None else describe_conversion(conversion)),
        "optimizer state: " + ("yes" if found["optimizer_state"] else "no"),
        "average of the weights: " + ("yes" if found["average"] else "no"),
        # Of the gradient norms there are a hundred.
        *([f"run: {', '.join(f'{key} {run[key]}' for key in run if key != 'grad_norms')}"] if run else []),
        "verified: "
        + ("every tensor is complete, readable and finite" if found["verified"] else "the tensors were not read")
        + ("" if found["manifest"] else f"; there is no {MANIFEST} to compare the files with"),
    ]
    return "\n".join(lines) + "\n\n" + format_table(("tensor", "shape", "type", "tensors", "MiB"), _rows(found))


def _verify(reader: TorchDistReader) -> None:
    names = list(reader.shapes())
    for index in reader.storage:  # what is not a tensor, such as the schedule
        if index.fqn not in reader.shapes():
            reader.check_piece(index)
    progress = Progress("checking", len(names), "tensors")
    for name in names:
        for file, _, piece in reader.pieces(name):
            if piece.is_floating_point() and (wrong := int((~torch.isfinite(piece)).sum())):
                raise UserError(f"{file}: {name}: {wrong} of {piece.numel()} values are not finite")
        progress.advance()
    progress.close()


def _step(folder: Path, manifest: dict[str, Any] | None, saved: dict[str, Any]) -> int | None:
    """As its manifest, its own values or its folder's name say."""
    if manifest is not None:
        return manifest["step"]
    named = re.fullmatch(r"iter_(\d+)", folder.resolve().name)
    return saved.get("run", {}).get("step", int(named[1]) if named else None)


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    size = torch.Size(shape).numel() * dtype.itemsize
    return {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": size}


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for tensor in found["tensors"]:
        name = re.sub(r"\b(layers|local_experts)\.\d+", r"\1.*", tensor["name"])
        shape = str(tensor["shape"])
        if kind := re.match(r"(optimizer\.\w+\.\w+|average)\.", name):  # as many as the model has, several times over
            name, shape = f"{kind[0]}*", ""
        groups.setdefault((name, shape, tensor["dtype"]), []).append(tensor)
    rows = [
        (*key, str(len(group)), f"{sum(tensor['bytes'] for tensor in group) / 2**20:.2f}")
        for key, group in groups.items()
    ]
    return [*rows, ("all", "", "", str(len(found["tensors"])), f"{found['bytes'] / 2**20:.2f}")]
