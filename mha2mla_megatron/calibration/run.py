"""Calibration as a command: text in, one statistics file out; alone or under torchrun.

Under torchrun each rank takes every W-th sequence and the sums are added up; the result is that of one process up to
the order of additions.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.calibration.collect import Batch, collect, make_segments
from mha2mla_megatron.calibration.original import OriginalModel
from mha2mla_megatron.calibration.statistics import (
    LayerStatistics,
    StatisticsWriter,
    layer_shapes,
    model_fingerprint,
)
from mha2mla_megatron.checkpoint.causal_lm import pick_device, rank_device
from mha2mla_megatron.checkpoint.hf import HFReader, parse_size
from mha2mla_megatron.data.documents import DocumentReader
from mha2mla_megatron.data.tokenizer import load_tokenizer
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.files import new_files
from mha2mla_megatron.ranks import Ranks, launched_ranks, process_group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CPU_MEMORY = 1 << 30
"""Of the setting `memory`, in bytes, where there is no GPU whose free memory could be asked for."""


@dataclass(frozen=True)
class CalibrateSettings:
    """Settings of tools/calibrate.py."""

    samples: int = 16
    """Sequences that the statistics are made of. More cost time in proportion and gain little (docs/conversion.md)."""

    sequence_length: int = 1024
    """Tokens of a sequence."""

    stored_samples: int = 128
    """Sequences whose tokens are kept in the file, for healing and for the measurements of a cache budget. Fewer if the
    text has no more."""

    batch_size: int | None = None
    """Sequences in a forward and backward pass. Does not change the result. None: 8 on a GPU, 1 on a CPU."""

    dtype: str = "float32"
    """Type of the model: float32, or bfloat16, which halves weights and hidden states. Sums are float32."""

    memory: str = "auto"
    """As 16GB: for the layers that are held at a time, at least one, with their weights, sums and activations. auto:
    half of the GPU's free memory, 1 GiB on a CPU. Does not change the result."""

    device: str = "auto"
    """auto (the GPU if there is one, under torchrun the rank's), cpu, cuda, cuda:1, ..."""

    seed: int = 0
    """Of the labels that the model samples."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    def __post_init__(self) -> None:
        for key, value, minimum in (
            ("samples", self.samples, 1),
            ("sequence_length", self.sequence_length, 8),
            ("stored_samples", self.stored_samples, 1),
            ("batch_size", self.batch_size, 1),
        ):
            if value is not None:
                require_at_least(key, value, minimum)
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        if self.memory != "auto":
            parse_size(self.memory, "memory")
        pick_device(self.device)

    def sequences_at_once(self, device: torch.device) -> int:
        """What `batch_size` comes to there."""
        return self.batch_size or (8 if device.type == "cuda" else 1)


def calibrate(source: Path, text: Path, target: Path, settings: CalibrateSettings) -> dict[str, Any] | None:
    """Run the model over the text and write the statistics; returns their provenance on rank 0, None on the others.

    Raises UserError for bad input before the model is run, and for activations that are not finite.
    """
    architecture = read_architecture(source)
    if architecture.mla is not None:
        raise UserError(f"{source}: is converted already; statistics are of the original model")
    if settings.sequence_length > architecture.max_position_embeddings:
        raise UserError(
            f"sequence_length: {settings.sequence_length} is more than the model's max_position_embeddings "
            f"{architecture.max_position_embeddings}"
        )
    device = rank_device(settings.device)
    reader = HFReader(source, architecture)
    sequences = read_sequences(source, text, settings)
    largest = int(sequences.max())
    if largest >= architecture.vocab_size:
        raise UserError(
            f"{source}: token id {largest} of the text is beyond the model's vocabulary {architecture.vocab_size}"
        )
    provenance = {
        "tokens": min(settings.samples, len(sequences)) * settings.sequence_length,
        "model": {"source": str(source), "fingerprint": model_fingerprint(reader, architecture)},
        "text": str(text),
        "text_tokens_sha256": hashlib.sha256(sequences.to(torch.int32).numpy().tobytes()).hexdigest(),
        "stored_sequences": min(settings.stored_samples, len(sequences)),
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    if provenance["tokens"] < architecture.hidden_size and launched_ranks().rank == 0:
        print(
            f"warning: {provenance['tokens']} tokens give second moments of rank below the hidden size "
            f"{architecture.hidden_size}; the rest is damped. Raise samples or sequence_length"
        )
    model = OriginalModel(reader, architecture, device, DTYPES[settings.dtype])
    write_statistics(model, sequences, target, settings, provenance)
    return provenance if launched_ranks().rank == 0 else None


def write_statistics(
    model: OriginalModel,
    sequences: torch.Tensor,
    target: Path,
    settings: CalibrateSettings,
    provenance: dict[str, Any],
) -> None:
    """Run the model over the first `samples` of the sequences [n, S]; rank 0 writes the sums and the last
    `stored_sequences`, which the provenance has the number of.

    Raises UserError for activations that are not finite.
    """
    architecture = model.architecture
    with process_group("nccl" if model.device.type == "cuda" else "gloo") as ranks:
        layers = layer_sums(model, sequences, settings, ranks)
        failed = f"{target}: cannot be written"
        if ranks.rank != 0:
            for _ in layers:
                ranks.every(lambda: None, failed)  # rank 0 writes
            return
        with new_files([target], settings.overwrite) as (scratch,):
            stored = sequences[-int(provenance["stored_sequences"]) :]
            writer = StatisticsWriter(scratch, architecture.num_layers, layer_shapes(architecture), stored, provenance)
            for layer, sums in layers:
                ranks.every(functools.partial(_add, writer, layer, sums), failed)


def read_sequences(source: Path, text: Path, settings: CalibrateSettings) -> torch.Tensor:
    """The first tokens of the text, documents joined by newlines, as int64 [n, S]; n is what is needed, or there is.

    Raises UserError for a text of fewer than one sequence.
    """
    tokenizer = load_tokenizer(source)
    wanted = max(settings.samples, settings.stored_samples) * settings.sequence_length
    ids: list[int] = []
    for block in DocumentReader([text]):
        for document in block.documents():
            # No tokenizer makes less than a token of this many characters of prose, so what is cut off is not missed.
            piece = document.text[: 16 * (wanted - len(ids))] + "\n"
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
            if len(ids) >= wanted:
                break
        if len(ids) >= wanted:
            break
    length = settings.sequence_length
    count = min(len(ids), wanted) // length
    if count == 0:
        raise UserError(f"{text}: {len(ids)} tokens, fewer than one sequence of {length}")
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def make_batches(sequences: torch.Tensor, settings: CalibrateSettings, batch_size: int, ranks: Ranks) -> list[Batch]:
    """This rank's part of the first `samples` sequences."""
    mine = range(ranks.rank, min(settings.samples, len(sequences)), ranks.world)
    return [
        Batch(sequences[list(part)], [settings.seed * 1_000_003 + index for index in part])
        for part in (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    ]


def layer_sums(
    model: OriginalModel, sequences: torch.Tensor, settings: CalibrateSettings, ranks: Ranks
) -> Iterator[tuple[int, LayerStatistics]]:
    """Every layer's sums over the first `samples` sequences, this rank's part run here and all parts added up."""
    batch_size = settings.sequences_at_once(model.device)
    batches = make_batches(sequences, settings, batch_size, ranks)
    batch_tokens = batch_size * settings.sequence_length
    memory = _memory(settings.memory, model.device)
    for layer, sums in collect(model, batches, make_segments(model.architecture, model.dtype, batch_tokens, memory)):
        if ranks.world > 1:
            for tensor in sums.tensors().values():
                torch.distributed.all_reduce(tensor)
        yield layer, sums


def _memory(setting: str, device: torch.device) -> int:
    """The setting `memory` in bytes."""
    if setting != "auto":
        return parse_size(setting, "memory")
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_MEMORY


def _add(writer: StatisticsWriter, layer: int, sums: LayerStatistics) -> None:
    for name, tensor in sums.tensors().items():
        if not tensor.isfinite().all():
            raise UserError(f"calibration: {name} of layer {layer} is not finite: the model's activations overflow")
    writer.add(layer, sums)
