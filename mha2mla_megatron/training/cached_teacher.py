"""A teacher whose predictions were made before the run, by tools/cache_teacher.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.data.blend import blend_weights
from mha2mla_megatron.data.dataset import samples_of_epoch
from mha2mla_megatron.data.teacher_cache import KEY, Source, TeacherCache, source_digest
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.distillation import Teacher
from mha2mla_megatron.training.top_k_divergence import TopK


class CachedTeacher(Teacher):
    """Takes no memory and runs no model: the samples come with its predictions, on the last pipeline stage."""

    def split_output(self, output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, TopK | None]:
        if "teacher_ids" not in batch:
            return output, None
        return output, TopK(batch["teacher_ids"], batch["teacher_log_probs"])


def samples_depend_on(settings: FinetuneSettings, vocab_size: int, eod: int) -> dict[str, Any]:
    """What decides, beside the token files, what a sample is and what a teacher says of it, by the settings' names."""
    data = settings.data
    return {
        "data.sequence_length": data.sequence_length,
        "data.split": list(data.shares),
        "data.reset_attention_mask": data.reset_attention_mask,
        **({"the token that ends documents": eod} if data.reset_attention_mask else {}),
        "seed": settings.seed,
        "distillation.temperature": settings.distillation.temperature,
        "the vocabulary": vocab_size,
    }


def needed_sources(settings: FinetuneSettings) -> list[Source]:
    """The sources of data.train. Raises UserError for one that is shorter than a sample."""
    data, total = settings.data, settings.steps * settings.global_batch_size
    found = []
    for prefix, weight in blend_weights("data.train", data.train).items():
        epoch = samples_of_epoch(prefix, data.sequence_length, data.shares)
        if epoch == 0:
            raise UserError(
                f"data.train: {prefix}: its training part is shorter than a sample, whose data.sequence_length is "
                f"{data.sequence_length}; {KEY} needs one or more"
            )
        # A blend takes less than one sample more than this weight says.
        found.append(Source(prefix, source_digest(prefix), epoch, min(math.ceil(weight * total), epoch)))
    return found


def find_cache(settings: FinetuneSettings, vocab_size: int, eod: int) -> TeacherCache:
    """The cache of distillation.cache; reads none of its predictions.

    eod: the token that ends documents, as of the run. Raises UserError for a cache that is missing or damaged, of other
    settings or token files, or that holds less than the run needs.
    """
    try:
        cache = TeacherCache.open(Path(str(settings.distillation.cache)))
        for line in cache.differences(samples_depend_on(settings, vocab_size, eod), cache.about["run"]):
            raise UserError(line)
        for source in needed_sources(settings):
            _check_source(cache, source)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    return cache


def _check_source(cache: TeacherCache, source: Source) -> None:
    if not (cache.folder / source.digest).is_dir():
        raise UserError(
            f"{cache.folder}: was made of other token files than {source.prefix}; it has those of "
            f"{json.dumps(cache.about.get('sources', []))}"
        )
    files = cache.files(source)
    complaints = {file: cache.complaint(file, samples) for file, samples in files}
    if missing := [file for file, complaint in complaints.items() if complaint == "missing"]:
        there = source.needed - sum(len(range(r.start, min(r.stop, source.needed))) for f, r in files if f in missing)
        raise UserError(
            f"{cache.folder}: holds {there} of the {source.needed} samples of {source.prefix} that the "
            f"run needs ({missing[0]} is missing); tools/cache_teacher.py goes on with it"
        )
    for file, complaint in complaints.items():
        if complaint is not None:
            raise UserError(f"{file}: {complaint}; tools/cache_teacher.py makes it again")
