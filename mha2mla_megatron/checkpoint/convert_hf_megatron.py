"""HF folder <-> Megatron checkpoint: nothing but names and layouts, the same code for original and converted models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mha2mla_megatron.architecture import read_architecture, read_config
from mha2mla_megatron.checkpoint.folders import copy_companions, new_folder
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.checkpoint.manifest import check_manifest, seal_step
from mha2mla_megatron.checkpoint.mapping import megatron_shapes, parameter_map
from mha2mla_megatron.checkpoint.megatron import (
    HF_FOLDER,
    TorchDistReader,
    check_coverage,
    iteration_folder,
    locate_checkpoint,
    save_global_tensors,
    write_latest,
)
from mha2mla_megatron.model.parallel import ParallelConfig
from mha2mla_megatron.progress import Progress


@dataclass(frozen=True)
class ToMegatronSettings:
    """Settings of tools/convert_hf_to_megatron.py."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""


@dataclass(frozen=True)
class ToHFSettings:
    """Settings of tools/convert_megatron_to_hf.py."""

    iteration: int | None = None
    """The saved step to export. None: the latest."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size, "max_shard_size")


def hf_to_megatron(source: Path, target: Path, settings: ToMegatronSettings) -> None:
    """Write the model of a Hugging Face folder as step 0 of a new Megatron checkpoint."""
    architecture = read_architecture(source)
    reader = HFReader(source, architecture)
    rows = parameter_map(architecture)
    with new_folder(target, settings.overwrite) as folder:
        progress = Progress("HF -> Megatron", len(rows), "tensors")
        tensors = {}
        for row in rows:
            tensors[row.megatron] = row.layout.pack([reader[name] for name in row.hf], architecture).contiguous()
            progress.advance()
        step = iteration_folder(folder, 0)
        step.mkdir()
        save_global_tensors(tensors, step)
        seal_step(step, 0, ParallelConfig().sizes(1))
        progress.close()
        write_hf_side(source, folder)
        write_latest(folder, 0)


def write_hf_side(source: Path, root: Path) -> None:
    """Put the model's config.json and tokenizer into the `hf` folder of a checkpoint root."""
    side = root / HF_FOLDER
    side.mkdir(parents=True, exist_ok=True)
    write_config(side, read_config(source))
    copy_companions(source, side)


def megatron_to_hf(source: Path, target: Path, settings: ToHFSettings) -> None:
    """Export one step of a Megatron checkpoint, saved at any parallel layout, as a Hugging Face folder.

    Raises UserError naming a missing, surplus or mis-shaped tensor.
    """
    side, step = locate_checkpoint(source, settings.iteration)
    architecture = read_architecture(side)
    check_manifest(step)
    reader = TorchDistReader(step)
    check_coverage(reader.shapes(), megatron_shapes(architecture), step)
    with new_folder(target, settings.overwrite) as folder:
        writer = HFWriter(folder, parse_size(settings.max_shard_size, "max_shard_size"))
        rows = parameter_map(architecture)
        progress = Progress("Megatron -> HF", len(rows), "tensors")
        for row in rows:
            tensor = reader[row.megatron]
            for name, part in zip(row.hf, row.layout.unpack(tensor, architecture), strict=True):
                writer.add(name, part)
            progress.advance()
        writer.close()
        progress.close()
        config = read_config(side)
        write_config(folder, config)
        copy_companions(side, folder)
