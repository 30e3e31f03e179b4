"""A teacher's predictions on disk: of each token of a sample the most probable next ones, with their log-probabilities.

    FOLDER/teacher_cache.json       what the samples and the predictions depend on
    FOLDER/SOURCE/00000000.npy      the first samples_per_file samples of one epoch of a source, then 00000001.npy, ...

A file is there only when it is complete. SOURCE is a digest of the token files, so that they may move. The samples are
those of a run: cut from one epoch of the documents as the run shuffles them. A token stands at another place of other
samples as soon as the documents before it are others, and a teacher then sees another context. So a run with a cache
cuts every epoch as the first one and shuffles whole samples (repeated_epochs.py), and what it reads is exact.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from mha2mla_megatron.errors import FoundAlone, UserError
from mha2mla_megatron.files import file_sha256, read_json_object, sampled_sha256

MANIFEST = "teacher_cache.json"

KEY = "distillation.cache"


def record(top_k: int, sequence_length: int, vocab_size: int) -> numpy.dtype:
    """One sample in a file: checksums of its tokens and of the rest; of each token top_k ids, the most probable first,
    their log-probabilities and the logarithm of what is left, float16.

    A token takes 4 top_k + 2 bytes, 6 top_k + 2 with a vocabulary of more than 65536.
    """
    ids = "<u2" if vocab_size <= 1 << 16 else "<i4"
    return numpy.dtype(
        [
            ("tokens_crc32", "<u4"),
            ("crc32", "<u4"),
            ("ids", ids, (sequence_length, top_k)),
            ("log_probs", "<f2", (sequence_length, top_k + 1)),
        ]
    )


def tokens_crc32(tokens: torch.Tensor) -> int:
    """Of int64 tokens [s]."""
    return zlib.crc32(tokens.numpy().astype("<i8"))


def predictions_crc32(sample: Any) -> int:
    """Of the ids and log-probabilities of a `record`."""
    return zlib.crc32(numpy.ascontiguousarray(sample["log_probs"]), zlib.crc32(numpy.ascontiguousarray(sample["ids"])))


def source_digest(prefix: str) -> str:
    """Names a pair of token files, wherever it is: its lengths of documents, and samples of its tokens."""
    found = file_sha256(Path(f"{prefix}.idx")) + sampled_sha256(Path(f"{prefix}.bin"))
    return hashlib.sha256(found.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """One of a blend's pairs of token files.

    epoch: samples of an epoch; needed: of these, how many a run reads, or the cache is to hold.
    """

    prefix: str
    digest: str
    epoch: int
    needed: int


class TeacherCache:
    """An opened cache. about: what its manifest holds.

    read: whether samples come with predictions; the pipeline stages that have no loss take the samples alone.
    """

    def __init__(self, folder: Path, about: dict[str, Any], read: bool = True) -> None:
        self.folder, self.about, self.read = folder, about, read
        self.samples_per_file = int(about["samples_per_file"])
        run = about["run"]
        self.record = record(int(about["top_k"]), int(run["data.sequence_length"]), int(run["the vocabulary"]))

    @classmethod
    def open(cls, folder: Path) -> TeacherCache:
        """Raises UserError for a folder that is none, or whose manifest is damaged."""
        about = read_json_object(
            folder / MANIFEST, f"{folder}: no cache of a teacher (no {MANIFEST}); make it with tools/cache_teacher.py"
        )
        try:
            if about["format"] != 1:
                raise UserError(f"{folder / MANIFEST}: format {about['format']}; valid: 1")
            return cls(folder, about)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / MANIFEST}: damaged ({type(error).__name__}: {error})") from None

    def differences(self, wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
        """A line for each value that the cache was made with and that is `wanted` otherwise."""
        return [
            f"{self.folder}: was made with {name} {found.get(name)}, this is {value}"
            for name, value in wanted.items()
            if found.get(name) != value
        ]

    def files(self, source: Source) -> list[tuple[Path, range]]:
        """Each file of the samples that the source needs, and what it holds: whole files, but at an epoch's end."""
        per_file = self.samples_per_file
        return [
            (self._file(source.digest, first // per_file), range(first, min(first + per_file, source.epoch)))
            for first in range(0, source.needed, per_file)
        ]

    def complaint(self, file: Path, samples: range) -> str | None:
        """What is wrong with a file of these samples, but for the bytes of its numbers; None where nothing is."""
        try:
            found = numpy.load(file, mmap_mode="r")
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError, EOFError) as error:
            return f"damaged ({type(error).__name__})"
        if found.dtype != self.record or found.shape != (len(samples),):
            return f"damaged (holds other than {len(samples)} samples of this cache)"
        return None

    def of_source(self, prefix: str) -> CachedSource | None:
        """What the samples of these token files are read with; None where no predictions are read."""
        return CachedSource(self, source_digest(prefix)) if self.read else None

    def _file(self, digest: str, number: int) -> Path:
        return self.folder / digest / f"{number:08}.npy"


class CachedSource:
    """Predictions of the samples of one source. Files stay on disk: only what is read of one is in memory."""

    def __init__(self, cache: TeacherCache, digest: str) -> None:
        self.cache, self.digest = cache, digest

    def of_sample(self, number: int, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """For the epoch's sample of this number, int64 tokens [s]: teacher_ids int32 [s, k] and teacher_log_probs
        float16 [s, k + 1], of which the last one is the logarithm of what is left.

        Raises FoundAlone for predictions that are missing, damaged or of other tokens.
        """
        index, place = divmod(number, self.cache.samples_per_file)
        file = self.cache._file(self.digest, index)
        try:
            found = numpy.load(file, mmap_mode="r")
            sample = found[place] if found.dtype == self.cache.record else None
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise FoundAlone(f"{KEY}: {file}: cannot be read ({type(error).__name__}: {error})") from None
        if sample is None or int(sample["crc32"]) != predictions_crc32(sample):
            raise FoundAlone(f"{KEY}: {file}: damaged at sample {number}; delete it and run tools/cache_teacher.py")
        if int(sample["tokens_crc32"]) != tokens_crc32(tokens):
            raise FoundAlone(f"{KEY}: {file}: sample {number} is of other tokens than the run's")
        return {
            "teacher_ids": torch.from_numpy(sample["ids"].astype(numpy.int32)),
            "teacher_log_probs": torch.from_numpy(numpy.array(sample["log_probs"])),
        }
