"""HF folder <-> Megatron checkpoint: nothing but names and layouts, the same code for original and converted models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mha2mla_megatron.architecture import read_architecture, read_config
from mha2mla_megatron.checkpoint.average import has_average
from mha2mla_megatron.checkpoint.folders import copy_companions
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.checkpoint.manifest import check_manifest
from mha2mla_megatron.checkpoint.mapping import megatron_shapes, parameter_map
from mha2mla_megatron.checkpoint.megatron import HF_FOLDER, check_coverage, locate_checkpoint
from mha2mla_megatron.checkpoint.megatron_writer import MegatronWriter
from mha2mla_megatron.checkpoint.merged import MergedReader
from mha2mla_megatron.checkpoint.resume import identity, resumable_folder
from mha2mla_megatron.errors import UserError, require_one_of
from mha2mla_megatron.frequencies import warn_of_untrainable_scaling
from mha2mla_megatron.ranks import process_group


@dataclass(frozen=True)
class ToMegatronSettings:
    """Settings of tools/convert_hf_to_megatron.py."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


@dataclass(frozen=True)
class ToHFSettings:
    """Settings of tools/convert_megatron_to_hf.py."""

    iteration: int | str | None = None
    """The saved step to export; best: the one that keep_best kept. None: the latest."""

    weights: str = "trained"
    """trained, or average: of a run with optimizer.ema_decay, the moving average of the weights that it trained."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        require_one_of("weights", self.weights, ("trained", "average"))
        parse_size(self.max_shard_size, "max_shard_size")


def hf_to_megatron(source: Path, target: Path, settings: ToMegatronSettings) -> None:
    """Write the model of a Hugging Face folder as step 0 of a new Megatron checkpoint."""
    architecture = read_architecture(source)
    reader = HFReader(source, architecture)
    rows, shapes = {row.megatron: row for row in parameter_map(architecture)}, architecture.tensor_shapes()
    tensors = {name: torch.empty(shape, dtype=reader.dtypes[name], device="meta") for name, shape in shapes.items()}
    what = identity("HF -> Megatron", settings, [source])
    with process_group() as ranks, resumable_folder(target, settings.overwrite, what, ranks) as partial:
        if ranks.rank == 0:
            warn_of_untrainable_scaling(architecture, source)
        writer = MegatronWriter(partial, tensors, architecture)
        sizes = {name: sum(tensors[part].nbytes for part in row.hf) for name, row in rows.items()}

        def write() -> None:
            for name in partial.parts_to_do("HF -> Megatron", sizes):
                for part in rows[name].hf:
                    writer.add(part, reader[part])
                partial.finish(name)

        def complete() -> None:
            writer.close()
            write_hf_side(source, partial.path)

        partial.together(write)
        partial.first(complete)


def write_hf_side(source: Path, root: Path) -> None:
    """Put the model's config.json and tokenizer into the `hf` folder of a checkpoint root."""
    side = root / HF_FOLDER
    side.mkdir(parents=True, exist_ok=True)
    write_config(side, read_config(source))
    copy_companions(source, side)


def megatron_to_hf(source: Path, target: Path, settings: ToHFSettings) -> None:
    """Export one step of a Megatron checkpoint, saved at any parallel layout, as a Hugging Face folder, with low-rank
    updates merged.

    Raises UserError naming a missing, surplus or mis-shaped tensor, and for an average that is not there.
    """
    side, step = locate_checkpoint(source, settings.iteration)
    architecture = read_architecture(side)
    check_manifest(step)
    reader = MergedReader(step, averaged=settings.weights == "average")
    check_coverage(reader.shapes(), megatron_shapes(architecture), step)
    if reader.averaged and not has_average(reader.shapes()):
        raise UserError(f"weights: {step} has no average; valid: trained, or a step of a run with optimizer.ema_decay")
    rows, shapes = {row.megatron: row for row in parameter_map(architecture)}, architecture.tensor_shapes()
    tensors = {
        name: torch.empty(shapes[name], dtype=reader.entries[row.megatron].properties.dtype, device="meta")
        for row in rows.values()
        for name in row.hf
    }
    what = identity("Megatron -> HF", settings, [side, step])
    with process_group() as ranks, resumable_folder(target, settings.overwrite, what, ranks) as partial:
        writer = HFWriter(partial, tensors, parse_size(settings.max_shard_size, "max_shard_size"))
        sizes = {name: sum(tensors[part].nbytes for part in row.hf) for name, row in rows.items()}

        def write() -> None:
            for name in partial.parts_to_do("Megatron -> HF", sizes):
                row = rows[name]
                for part, tensor in zip(row.hf, row.layout.unpack(reader[name], architecture), strict=True):
                    writer.add(part, tensor)
                partial.finish(name)

        def complete() -> None:
            writer.close()
            write_config(partial.path, read_config(side))
            copy_companions(side, partial.path)

        partial.together(write)
        partial.first(complete)
