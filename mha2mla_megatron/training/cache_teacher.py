"""Runs a teacher over the samples of a run and keeps its most probable tokens (data/teacher_cache.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from numpy.lib import format as npy

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.data.dataset import build_dataset, check_data, read_batches
from mha2mla_megatron.data.sample_indices import own_indices
from mha2mla_megatron.data.teacher_cache import (
    KEY,
    MANIFEST,
    Source,
    TeacherCache,
    predictions_crc32,
    tokens_crc32,
)
from mha2mla_megatron.errors import FoundAlone, UserError, require_at_least
from mha2mla_megatron.files import make_writable, new_files, replace_text, sampled_sha256
from mha2mla_megatron.model.implementation import choose_implementation
from mha2mla_megatron.model.parallel import check_layout, initialize_parallel, launched_world_size
from mha2mla_megatron.model.provider import build_on_device, transformer_config
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import require_keys
from mha2mla_megatron.together import on_every_rank, on_first_rank
from mha2mla_megatron.training.cached_teacher import needed_sources, samples_depend_on
from mha2mla_megatron.training.checkpoint import load_weights
from mha2mla_megatron.training.checks import check_reset, check_samples
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.run_data import end_of_document
from mha2mla_megatron.training.step import document_mask, training_dtype
from mha2mla_megatron.training.top_k_divergence import TopK, top_k


@dataclass(frozen=True)
class CacheTeacherSettings(FinetuneSettings):
    """Settings of tools/cache_teacher.py: those of the run that will learn from it, so that its YAML file is one of
    these too. The folder is distillation.cache."""

    teacher: str | None = None
    """Megatron checkpoint of the teacher, made by tools/convert_hf_to_megatron.py."""

    top_k: int = 32
    """Tokens kept of each prediction, the most probable ones."""

    samples_per_file: int = 256
    """What a file holds, and at most what each process loses where it is interrupted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("top_k", self.top_k, 1)
        require_at_least("samples_per_file", self.samples_per_file, 1)


@dataclass(frozen=True)
class _File:
    """A file that is still to be made: of which source, and of which samples of its epoch."""

    source: Source
    path: Path
    samples: range


def cache_teacher(settings: CacheTeacherSettings) -> None:
    """Write what distillation.cache is to hold for a run of these settings, but for the files that are there already.

    Raises UserError for bad settings, files or layouts before anything is written, and for a folder that holds the
    predictions of another teacher or for other settings.
    """
    require_keys(settings, "teacher", "data.train", "distillation.cache")
    folder = Path(str(settings.distillation.cache))
    try:
        side, weights = locate_checkpoint(Path(str(settings.teacher)))
        architecture = read_architecture(side)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    _check_run(settings, architecture)
    eod = end_of_document(settings, side)
    end = eod if settings.data.reset_attention_mask else None
    check_data("data.train", settings.data.train, architecture.vocab_size, settings.data.shares, end)
    if settings.top_k > architecture.vocab_size:
        raise UserError(f"top_k: {settings.top_k} is more than the teacher's vocabulary of {architecture.vocab_size}")
    sources = needed_sources(settings)
    device = initialize_parallel(settings.parallel, settings.seed)
    dtype = training_dtype(settings, device)
    about = {
        "format": 1,
        "run": samples_depend_on(settings, architecture.vocab_size, eod),
        "teacher": str(settings.teacher),
        "teacher_sha256": _weights_digest(weights),
        "dtype": str(dtype).removeprefix("torch."),
        "top_k": settings.top_k,
        "samples_per_file": settings.samples_per_file,
        "sources": {source.digest: source.prefix for source in sources},
    }
    cannot = f"{KEY}: {folder}: cannot be written"
    on_first_rank(lambda: _check_folder(folder, about), cannot)
    cache = TeacherCache(folder, about, read=False)
    # Of the same files for all: the first one that is ready must not be missing for one process alone.
    found = on_every_rank(lambda: _missing(cache, sources) if torch.distributed.get_rank() == 0 else [], None)[0]
    config = transformer_config(architecture, settings.parallel, dtype)
    model = build_on_device(architecture, config, settings.implementation, device)
    model.requires_grad_(False).eval()
    try:
        load_weights([model], weights, architecture)
    except UserError as error:
        raise UserError(f"teacher: {error}") from None
    on_first_rank(lambda: _begin(folder, about), cannot)
    indices = Path(settings.data.cache) if settings.data.cache else folder / "indices"
    _Writer(settings, cache, model, device, eod, architecture.vocab_size, indices).write(sources, found)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        tokens = sum(source.needed for source in sources) * settings.data.sequence_length
        per_token = cache.record.itemsize / settings.data.sequence_length
        print(f"{folder}: {settings.top_k} most probable tokens for each of {tokens}, {per_token:.1f} bytes a token")


def _check_run(settings: CacheTeacherSettings, architecture: Architecture) -> None:
    parallel = settings.parallel
    for key in ("pipeline_model_parallel_size", "context_parallel_size"):
        if (found := getattr(parallel, key)) > 1:
            raise UserError(f"parallel.{key}: {found} is for the run; the teacher's predictions are made with 1 alone")
    world = launched_world_size()
    check_layout(architecture, parallel, world)
    # Each process has files of its own, whatever the run's batch.
    batch = settings.micro_batch_size * world // parallel.model_parallel_size
    check_samples(dataclasses.replace(settings, global_batch_size=batch), architecture, world)
    implementation = settings.implementation if settings.implementation != "auto" else choose_implementation("auto")
    check_reset(settings, architecture, implementation)


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Refuse what is no cache, and one of another teacher or other settings; its token files may be others."""
    if (folder / MANIFEST).exists():
        old = TeacherCache.open(folder)
        for line in old.differences(_made_with(about), _made_with(old.about)):
            raise UserError(f"{KEY}: {line}; give another folder, or delete this one")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{KEY}: {folder}: exists and is no cache of a teacher; give another folder")


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Make the cache, or add token files to the one that `_check_folder` has found."""
    make_writable(folder)
    if (folder / MANIFEST).exists():
        old = TeacherCache.open(folder).about
        about = {**old, "sources": {**old.get("sources", {}), **about["sources"]}}
    replace_text(folder / MANIFEST, json.dumps(about, indent=2) + "\n")


def _made_with(about: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all of a cache. The teacher may have moved."""
    return {**about["run"], **{key: value for key, value in about.items() if key not in ("run", "teacher", "sources")}}


def _weights_digest(step_folder: Path) -> str:
    found = [sampled_sha256(file) for file in sorted(step_folder.glob("*.distcp"))]
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _missing(cache: TeacherCache, sources: list[Source]) -> list[_File]:
    """The files that are not there, or that a machine which stopped left damaged."""
    wanted = [_File(source, *of) for source in sources for of in cache.files(source)]
    return [file for file in wanted if cache.complaint(file.path, file.samples) is not None]


class _Writer:
    """Runs the model over samples and writes their files; data-parallel processes have whole files each."""

    def __init__(
        self,
        settings: CacheTeacherSettings,
        cache: TeacherCache,
        model: torch.nn.Module,
        device: torch.device,
        eod: int,
        vocab_size: int,
        indices: Path,
    ) -> None:
        self.settings, self.cache, self.model, self.device = settings, cache, model, device
        self.eod, self.vocab_size, self.indices = eod, vocab_size, indices

    def write(self, sources: list[Source], missing: list[_File]) -> None:
        length = self.settings.data.sequence_length
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine, left = missing[rank::size], sum(len(file.samples) for file in missing) * length
        everything = sum(len(samples) for source in sources for _, samples in self.cache.files(source)) * length
        progress = Progress("teacher", everything / 1e6, "M tokens")
        progress.skip((everything - left) / 1e6)
        # What the first process has done stands for all of them.
        share = left / max(1, sum(len(file.samples) for file in mine) * length)
        for source in sources:
            files = [file for file in mine if file.source == source]
            # All processes take part: they share the making of the indices.
            with own_indices(self.indices):
                dataset = build_dataset(
                    source.prefix,
                    length,
                    source.epoch,
                    self.settings.seed,
                    False,
                    self.eod,
                    self.vocab_size,
                    self.indices,
                    self.settings.data.shares,
                    0,
                    self.settings.data.reset_attention_mask,
                    self.cache,
                )
            step = self.settings.micro_batch_size
            batches = [list(file.samples[i : i + step]) for file in files for i in range(0, len(file.samples), step)]
            found = read_batches(dataset, batches, self.settings.data.workers)
            for file in files:
                samples = numpy.zeros(len(file.samples), dtype=self.cache.record)
                for first in range(0, len(samples), step):
                    batch = next(found)
                    self._fill(samples[first : first + step], batch, file, first)
                    progress.advance(batch["tokens"].numel() * share / 1e6)
                if parallel_state.get_tensor_model_parallel_rank() == 0:
                    _save(file.path, samples)
        progress.close()

    def _fill(self, samples: numpy.ndarray, batch: dict[str, torch.Tensor], file: _File, first: int) -> None:
        """samples: those of the micro batch in the file, from its sample `first` on."""
        tokens, positions = batch["tokens"].to(self.device), batch["position_ids"].to(self.device)
        mask = None if "document" not in batch else document_mask(batch["document"].to(self.device))
        group: Any = parallel_state.get_tensor_model_parallel_group()
        with torch.no_grad():
            logits = self.model(tokens, positions, mask)
            found = top_k(
                logits.flatten(0, 1), self.settings.top_k, self.settings.distillation.temperature, group
            ).of_shape(tokens.shape)
        if not found.log_probs.isfinite().all():
            number = int((~found.log_probs.isfinite()).flatten(1).any(1).nonzero()[0])
            raise FoundAlone(
                f"teacher: {self.settings.teacher}: gives NaN for sample {file.samples[first + number]} of "
                f"{file.source.prefix}"
            )
        _to_records(found, batch["tokens"], samples)


def _to_records(found: TopK, tokens: torch.Tensor, samples: numpy.ndarray) -> None:
    samples["ids"], samples["log_probs"] = found.ids.cpu().numpy(), found.log_probs.cpu().numpy()
    for sample, row in zip(samples, tokens, strict=True):
        sample["tokens_crc32"], sample["crc32"] = tokens_crc32(row), predictions_crc32(sample)


def _save(file: Path, samples: numpy.ndarray) -> None:
    """Write a file that is there whole or not at all, also where the machine stops in between."""
    try:
        with new_files([file], overwrite=True) as (scratch,), scratch.open("wb") as stream:
            # numpy.save, where the disk is full, raises an error that does not say so.
            npy.write_array_header_1_0(stream, npy.header_data_from_array_1_0(samples))
            stream.write(samples.view(numpy.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    except UserError as error:
        raise FoundAlone(f"{KEY}: {error}") from None
