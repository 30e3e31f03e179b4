"""Token files of nanotron's trainer, written by datatrove: documents that are tokens already.

NAME.ds             tokens one after the other, little-endian, 2 bytes each, or 4 with a larger vocabulary
NAME.ds.index       where each document ends, in tokens from the start of the file: uint64 (may be missing)
NAME.ds.metadata    lines of text: tokenizer|bytes of a token, number of tokens, the same for reading (may be missing)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from mha2mla_megatron.data.tokenizer import DocumentEncoder, EncodedBatch
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import require_file

SUFFIX = ".ds"

TOKENS = 1 << 22
"""Read at a time where no index says what a document is."""

DOCUMENTS = 1 << 12
"""Read at a time otherwise."""

LONGEST = (1 << 31) - 1
"""Tokens of a document: .idx files have 4 bytes for its length."""


def is_nanoset(name: str) -> bool:
    return Path(name).suffix == SUFFIX


class NanosetReader:
    """The documents of several files, in order. size: bytes of all. described: what there is to say of each."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UserError for a file that is missing, or that has a mask of the loss beside it."""
        self.names = names
        self.files = [Path(name) for name in names]
        for file in self.files:
            require_file(file)
            if _beside(file, "loss").exists():
                raise UserError(
                    f"{_beside(file, 'loss')}: a mask of the loss is not supported; without it all tokens are used"
                )
        sizes = [file.stat().st_size for file in self.files]
        self.size = sum(sizes)
        self.described = [{"file": str(f), "bytes": size} for f, size in zip(self.files, sizes, strict=True)]

    def batches(self, encoder: DocumentEncoder) -> Generator[tuple[EncodedBatch, int]]:
        """(tokens, bytes read for them) of a few documents at a time; the encoder's suffix ends those that do not.

        Raises UserError for a damaged file, and for a token outside the encoder's vocabulary.
        """
        for file in self.files:
            yield from _batches(file, encoder)


def _batches(file: Path, encoder: DocumentEncoder) -> Iterator[tuple[EncodedBatch, int]]:
    index = _read_index(file)
    width = _token_bytes(file, index, encoder.vocab_size)
    if index is None and not encoder.suffix:
        raise UserError(f"{file}: without {file.name}.index documents end at the eos token: needs append_eod=true")
    if file.stat().st_size == 0:  # of which there is no map
        return
    tokens = numpy.memmap(file, dtype=f"<u{width}", mode="r")
    start = 0
    for ends in _indexed(index) if index is not None else _found(tokens, encoder.suffix[0]):
        yield _encoded(file, tokens, start, ends, encoder), (int(ends[-1]) - start) * width
        start = int(ends[-1])


def _token_bytes(file: Path, index: numpy.ndarray | None, vocab_size: int) -> int:
    """Bytes of a token: what the metadata says, or what the index makes of the file, or what the vocabulary takes.

    Raises UserError for a file that has another size than these say.
    """
    size, metadata = file.stat().st_size, _read_metadata(file)
    counts = {} if index is None else {"index": int(index[-1]) if len(index) else 0}
    width = 2 if vocab_size <= 1 << 16 else 4
    if metadata is not None:
        width, counts["metadata"] = metadata
    elif counts.get("index"):
        width = 4 if size == 4 * counts["index"] else 2
    for source, tokens in counts.items():
        if tokens * width != size:
            raise UserError(
                f"{file}: {size} bytes; {_beside(file, source)} says {tokens} tokens, of {width} bytes each"
            )
    if size % width:
        raise UserError(f"{file}: {size} bytes are no whole number of tokens of {width} bytes")
    return width


def _encoded(file: Path, tokens: Any, start: int, ends: numpy.ndarray, encoder: DocumentEncoder) -> EncodedBatch:
    """The documents from token `start` on that end at `ends`, int64 [n]."""
    piece = numpy.array(tokens[start : ends[-1]])
    if len(outside := numpy.flatnonzero(piece >= encoder.vocab_size)):
        raise UserError(
            f"{file}: token {start + outside[0]} is id {piece[outside[0]]}, beyond the vocabulary of "
            f"{encoder.vocab_size}"
        )
    lengths = numpy.diff(ends, prepend=start)
    blank = int((lengths == 0).sum())
    lengths = lengths[lengths > 0]
    if len(lengths) and lengths.max() >= LONGEST:
        raise UserError(f"{file}: a document of {lengths.max()} tokens; at most {LONGEST} are possible")
    if encoder.suffix and len(lengths):
        ends = lengths.cumsum()
        open_ended = piece[ends - 1] != encoder.suffix[0]
        piece = numpy.insert(piece, ends[open_ended], encoder.suffix[0])
        lengths = lengths + open_ended
    return EncodedBatch(piece.astype(encoder.dtype), lengths.tolist(), blank)


def _indexed(index: numpy.ndarray) -> Iterator[numpy.ndarray]:
    for first in range(0, len(index), DOCUMENTS):
        yield index[first : first + DOCUMENTS]


def _found(tokens: Any, eos: int) -> Iterator[numpy.ndarray]:
    """Ends of documents, each after an eos token; the last one ends with the file."""
    last = 0
    for first in range(0, len(tokens), TOKENS):
        ends = numpy.flatnonzero(tokens[first : first + TOKENS] == eos) + first + 1
        if len(ends):
            last = int(ends[-1])
            yield ends
    if last < len(tokens):
        yield numpy.array([len(tokens)])


def _read_index(file: Path) -> numpy.ndarray | None:
    """Ends of the documents, int64 [n]; None where there is no such file."""
    index = _beside(file, "index")
    if not index.exists():
        return None
    data = index.read_bytes()
    ends = numpy.frombuffer(data[: len(data) // 8 * 8], dtype="<u8").astype(numpy.int64)
    if len(data) % 8 or (len(ends) and (ends[0] < 0 or (numpy.diff(ends) < 0).any())):
        raise UserError(f"{index}: damaged: no list of growing uint64 numbers")
    return ends


def _read_metadata(file: Path) -> tuple[int, int] | None:
    """(bytes of a token, number of tokens); None where there is no such file."""
    metadata = _beside(file, "metadata")
    if not metadata.exists():
        return None
    try:
        name, count = metadata.read_text(encoding="utf-8").splitlines()[:2]
        width, tokens = int(name.rpartition("|")[2]), int(count)
    except ValueError:
        raise UserError(f"{metadata}: damaged: not the lines tokenizer|2 (or 4) and number of tokens") from None
    if width not in (2, 4):
        raise UserError(f"{metadata}: tokens of {width} bytes; valid: 2, 4")
    return width, tokens


def _beside(file: Path, what: str) -> Path:
    return file.with_name(f"{file.name}.{what}")
