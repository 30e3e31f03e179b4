"""Training samples from .bin/.idx token files, through Megatron's own datasets."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType

from mha2mla_megatron.data.blend import Blend, blend_weights, interleave
from mha2mla_megatron.data.repeated_epochs import RepeatedEpochs
from mha2mla_megatron.errors import FoundAlone, UserError
from mha2mla_megatron.files import file_sha256, require_file

if TYPE_CHECKING:
    from mha2mla_megatron.data.teacher_cache import TeacherCache


class _TokenIds:
    """What GPTDataset asks of a tokenizer.

    documents: the digest of the lengths of the documents. It is among what the files of the sample indices are named
    after, where Megatron has only the path of the token files: a corpus that is made anew under its old name must not
    be read by the old one's indices.
    """

    def __init__(self, eod: int, vocab_size: int, documents: str) -> None:
        self.eod, self.vocab_size = eod, vocab_size
        self.pad = -1  # no token stands for padding, so none is masked by accident
        self.unique_identifiers = {"class": "TokenIds", "eod": eod, "documents": documents}


PARTS = ("train", "valid", "test")
"""The parts that `data.split` cuts each source into, in the order of its documents."""


def build_dataset(
    blend: str | dict[str, float],
    sequence_length: int,
    num_samples: int,
    seed: int,
    eod_mask_loss: bool,
    eod: int,
    vocab_size: int,
    cache: Path,
    split: Sequence[float] = (1.0, 0.0, 0.0),
    part: int = 0,
    reset_attention_mask: bool = False,
    predictions: TeacherCache | None = None,
) -> torch.utils.data.Dataset:
    """`num_samples` shuffled samples of packed documents, over as many epochs of each source as it takes.

    cache: where the indices are kept, by `own_indices`. split, part: the shares of PARTS, and which of them is read.
    predictions: a teacher's, for whose sake each epoch has the samples of the first one.

    A sample is a dict of int64 tokens, labels and position_ids [sequence_length], a float32 loss_mask and the number
    of its source; with reset_attention_mask also `document`, int64 [sequence_length], which of its documents each token
    is of, and position_ids begin again in each; with predictions that are read what `CachedSource` gives.
    """
    weights = blend_weights("data", blend)
    sources = interleave(list(weights.values()), num_samples)
    counts = numpy.bincount(sources, minlength=len(weights))
    datasets: list[Any] = []
    for prefix, count in zip(weights, counts.tolist(), strict=True):
        if predictions is not None:
            count = samples_of_epoch(prefix, sequence_length, split, part)
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([prefix], None),
            split=",".join(map(str, split)),
            tokenizer=_TokenIds(eod, vocab_size, documents_digest(prefix)),  # type: ignore[arg-type]
            reset_position_ids=reset_attention_mask,
            reset_attention_mask=reset_attention_mask,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=False,
            path_to_cache=str(cache),
        )
        assert config.split_matrix is not None
        # The other parts would be indexed too.
        config.split_matrix = [found if i == part else None for i, found in enumerate(config.split_matrix)]  # type: ignore[misc]
        sizes = [count if i == part else 0 for i in range(len(PARTS))]
        dataset: Any = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[part]
        assert dataset is not None  # it was asked for on every rank
        if predictions is not None:
            assert len(dataset) == count  # Megatron counts the same
            dataset = RepeatedEpochs(dataset, count, seed, predictions.of_source(prefix))
        datasets.append(dataset)
    found: Any = Blend(datasets, sources)
    return _WithDocuments(found, eod) if reset_attention_mask else found


class _WithDocuments(torch.utils.data.Dataset):
    """Samples that say which of their documents each token is of; a document's last token is its end token."""

    def __init__(self, dataset: Any, eod: int) -> None:
        self.dataset, self.eod = dataset, eod

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        ends = (sample["tokens"] == self.eod).long()
        return {**sample, "document": ends.cumsum(0) - ends}


def sample_batches(
    dataset: torch.utils.data.Dataset,
    first_sample: int,
    total_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    workers: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro batches in order, from `first_sample` on: tensors [micro_batch_size, s].

    The samples of one step do not depend on how many ranks share it.
    """
    stride = micro_batch_size * data_size
    starts = range(first_sample + data_rank * micro_batch_size, total_samples, stride)
    return read_batches(dataset, [range(start, start + micro_batch_size) for start in starts], workers)


def read_batches(
    dataset: torch.utils.data.Dataset, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The samples of these numbers, of each batch in tensors [b, s], read ahead by so many processes."""
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    return _in_one_line(iter(loader))


def _in_one_line(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Take the traceback, which torch puts there, out of the message of an error that a worker met.

    The workers are let go with it: they leave a SIGTERM to the trainer, so that Python would wait for them at its end.
    """
    try:
        yield from batches
    except FoundAlone as error:
        error.__traceback__ = None  # torch's frames and this error hold each other, and the workers
        del batches
        raise FoundAlone(str(error).strip().splitlines()[-1].split(f"{FoundAlone.__name__}: ")[-1]) from None


class Padded(torch.utils.data.Dataset):
    """The first `count` samples of a dataset, then the first one again, without a loss, up to `size` samples."""

    def __init__(self, dataset: Any, count: int, size: int) -> None:
        self.dataset, self.count, self.size = dataset, count, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.count:
            return self.dataset[index]
        sample = self.dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}


def documents_digest(prefix: str) -> str:
    """Of the lengths of the documents of a source, which with the seed decide what each of its samples is made of."""
    return file_sha256(Path(f"{prefix}.idx"))[:16]


def check_data(
    key: str,
    blend: str | dict[str, float],
    vocab_size: int,
    split: Sequence[float] = (1.0, 0.0, 0.0),
    eod: int | None = None,
) -> None:
    """Check the token files of the setting `key` without Megatron, before anything is written.

    split: shares of PARTS, of which each source must hold documents. eod: the token that must end documents, where
    something depends on it.

    Raises UserError for a file that is missing, damaged or of another making than the others of its prefix, and for
    tokens of a larger vocabulary. What a file was made with stands in the .json beside it; where there is none, every
    token is looked at.
    """
    for prefix in map(Path, blend_weights(key, blend)):
        data, index, provenance = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json"))
        for file in (data, index):
            require_file(file, key, "make it with tools/preprocess_data.py")
        dtype, lengths = _read_index(key, index)
        documents, count = len(lengths), int(lengths.sum(dtype=numpy.int64))
        if data.stat().st_size != count * dtype.itemsize:
            raise UserError(f"{key}: {data}: {data.stat().st_size} bytes, {index} says {count * dtype.itemsize}")
        if count == 0:
            raise UserError(f"{key}: {data}: holds no token")
        _check_parts(key, prefix, documents, split)
        ids = 1 << 8 * dtype.itemsize
        if provenance.is_file():
            try:
                about = json.loads(provenance.read_text())
                tokens_of, ends = int(about.get("vocab_size", 0)), about.get("eod_id", eod)
                made = about.get("documents", documents), about.get("tokens", count)
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{key}: {provenance}: cannot be read ({error})") from None
            if made != (documents, count):
                raise UserError(
                    f"{key}: {provenance}: says {made[0]} documents, {made[1]} tokens, {index} has {documents} and "
                    f"{count}: they were not made together"
                )
            if tokens_of > vocab_size:
                raise UserError(f"{key}: {prefix}: made with a vocabulary of {tokens_of}, the model has {vocab_size}")
            if tokens_of > ids:
                raise UserError(f"{key}: {data}: holds {dtype} tokens, {provenance} says a vocabulary of {tokens_of}")
            if eod is not None and ends != eod:
                raise UserError(f"{key}: {prefix}: its documents end with token {ends}, the model's eos token is {eod}")
        elif vocab_size > ids:
            raise UserError(
                f"{key}: {data}: holds {dtype} tokens, too narrow for the model's vocabulary of {vocab_size}; no "
                f"{provenance.name} says what they were made with"
            )
        else:
            for token in _extremes(data, dtype):
                if not 0 <= token < vocab_size:
                    raise UserError(f"{key}: {data}: holds token {token}, the model's vocabulary is {vocab_size}")
            others = _other_ends(data, dtype, lengths, eod) if eod is not None else []
            if others:
                raise UserError(
                    f"{key}: {prefix}: documents end with token {others[0]}, the model's eos token is {eod}"
                )


def _check_parts(key: str, prefix: Path, documents: int, split: Sequence[float]) -> None:
    """Refuse a part without documents, which Megatron would count epochs of for ever."""
    for part, share, found in zip(PARTS, split, _parts(documents, split), strict=True):
        if share > 0 and not found:
            raise UserError(f"{key}: {prefix}: data.split leaves none of its {documents} documents for the {part} part")


def _parts(documents: int, split: Sequence[float]) -> list[range]:
    """The documents of each of PARTS. Megatron's rounding."""
    ends, end = [0], 0.0
    for share in split:
        end += share / sum(split)
        ends.append(round(end * documents))
    return [range(*pair) for pair in pairwise(ends)]


def samples_of_epoch(prefix: str, sequence_length: int, split: Sequence[float], part: int = 0) -> int:
    """How many whole samples one epoch of a part of a source has; each takes one token more than it predicts from."""
    _, lengths = _read_index("data.train", Path(f"{prefix}.idx"))
    documents = _parts(len(lengths), split)[part]
    tokens = int(lengths[documents.start : documents.stop].sum(dtype=numpy.int64))
    return max(0, (tokens - 1) // sequence_length)


def _read_index(key: str, file: Path) -> tuple[numpy.dtype, numpy.ndarray]:
    """(type of the tokens, tokens of each document, int32) from Megatron's .idx file, version 1.

    9 bytes of magic, version (8), code of the type (1), numbers of sequences s (8) and of documents m (8), s lengths
    (4 each), s offsets (8 each), m documents (8 each).
    """
    with file.open("rb") as stream:
        head = stream.read(34)
        magic, code = head[:9], int.from_bytes(head[17:18])
        version, sequences, documents = (int.from_bytes(head[i : i + 8], "little") for i in (9, 18, 26))
        size = 34 + 12 * sequences + 8 * documents
        known = {member.value for member in DType}
        if magic != b"MMIDIDX\0\0" or version != 1 or code not in known or file.stat().st_size != size:
            raise UserError(f"{key}: {file}: damaged, or not an index that tools/preprocess_data.py made")
        lengths = numpy.frombuffer(stream.read(4 * sequences), dtype=numpy.int32)
    dtype = numpy.dtype(DType.dtype_from_code(code))
    if dtype.kind not in "iu":
        raise UserError(f"{key}: {file}: holds numbers of type {dtype}, no tokens")
    if sequences == 0:
        raise UserError(f"{key}: {file}: holds no document")
    return dtype, lengths


def _extremes(file: Path, dtype: numpy.dtype) -> tuple[int, int]:
    """The smallest and the largest token of a .bin file; the file is read piece by piece."""
    tokens, piece = numpy.memmap(file, dtype=dtype, mode="r"), 1 << 24
    parts = (tokens[start : start + piece] for start in range(0, len(tokens), piece))
    lowest, highest = zip(*((int(part.min()), int(part.max())) for part in parts), strict=True)
    return min(lowest), max(highest)


def end_of_first_document(blend: Any) -> int | None:
    """The last token of the first source's first document; None where `check_data` would refuse it."""
    try:
        prefix = next(iter(blend_weights("data.train", blend)))
        dtype, lengths = _read_index("data.train", Path(f"{prefix}.idx"))
        first = int(lengths[lengths > 0][0])
        return int(numpy.fromfile(f"{prefix}.bin", dtype=dtype, count=1, offset=(first - 1) * dtype.itemsize)[0])
    except (UserError, OSError, IndexError):
        return None


def _other_ends(file: Path, dtype: numpy.dtype, lengths: numpy.ndarray, eod: int) -> list[int]:
    """The last tokens of documents that do not end with `eod`."""
    ends = lengths[lengths > 0].cumsum(dtype=numpy.int64) - 1
    last = numpy.memmap(file, dtype=dtype, mode="r")[ends]
    return last[last != eod].tolist()


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A signal sent to the whole job must not take the readers away from the step that is still to be saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
