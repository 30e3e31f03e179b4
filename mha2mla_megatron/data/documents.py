"""Documents in text and JSON-lines files, read as a stream; what is wrong with one is said by file and line or byte.

Reading and decoding are apart: `DocumentReader` cuts files into blocks of whole documents, which costs next to nothing,
and `Block.documents` takes a block apart, which the worker processes do.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mha2mla_megatron.errors import UserError

SEPARATORS = ("none", "newline", "blank_line")
_JSON_LINES = "json_lines"

BLOCK_BYTES = 256 << 10
"""A block is closed by the first end of a document after this many bytes."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """The text of one document and where it begins."""

    text: str
    file: str
    line: int
    """1-based."""


class Block(NamedTuple):
    """Whole documents as they stand in a file."""

    data: bytes
    """UTF-8."""

    file: str

    line: int
    """1-based number of the first line."""

    offset: int
    """Bytes before the block in the file (in the uncompressed file, of a .gz)."""

    layout: str
    """How documents are told apart: one of SEPARATORS, or "json_lines"."""

    def documents(self, text_key: str = "text") -> Iterator[Document]:
        """The documents, blank ones included; `text_key` names the field that holds the text, in JSON.

        Raises UserError, naming file and byte or line, for what is not UTF-8, not JSON or has no text.
        """
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: not valid UTF-8 at byte {self.offset + error.start}") from None
        if self.layout == "none":
            yield Document(text, self.file, self.line)
            return
        lines = enumerate(text.removesuffix("\n").split("\n"), start=self.line)
        if self.layout == "blank_line":
            for blank, group in itertools.groupby(lines, key=lambda line: not line[1] or line[1].isspace()):
                if not blank:
                    paragraph = list(group)
                    document = "\n".join(line for _, line in paragraph)
                    yield Document(document.removesuffix("\r"), self.file, paragraph[0][0])
        elif self.layout == "newline":
            for number, line in lines:
                yield Document(line.removesuffix("\r"), self.file, number)
        else:
            for number, line in lines:
                if line and not line.isspace():
                    yield Document(_field(line, text_key, f"{self.file}, line {number}"), self.file, number)


class DocumentReader:
    """Iterates over the blocks of files, in order.

    A name that ends in .jsonl is JSON lines, a document each; anything else is plain text; .gz after either is
    unpacked. separator, for plain text: `none` (the file is one document), `newline` (each line is one) or
    `blank_line` (lines up to an empty or blank one are one); a document does not include the line end before its
    separator. Memory: one block, that is BLOCK_BYTES and a document.

    size, position: bytes of all files, and how many are read, both as they are on disk.
    """

    def __init__(self, files: Sequence[Path], separator: str = "none") -> None:
        """Raises UserError for what cannot be a file of documents, before anything is read."""
        assert separator in SEPARATORS
        self.files, self.separator = files, separator
        self.sizes = [_file_size(file) for file in files]
        self.size = sum(self.sizes)
        self.position = 0

    def __iter__(self) -> Iterator[Block]:
        self.position = before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            layout = _JSON_LINES if file.name.removesuffix(".gz").endswith(".jsonl") else self.separator
            line, offset = 1, 0
            try:
                with open(file, "rb") as raw:
                    stream: BinaryIO = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw  # type: ignore[assignment]
                    while data := _read_block(stream, layout):
                        self.position = before + raw.tell()
                        mark = len(_BYTE_ORDER_MARK) if offset == 0 and data.startswith(_BYTE_ORDER_MARK) else 0
                        yield Block(data[mark:], str(file), line, offset + mark, layout)
                        line += data.count(b"\n")
                        offset += len(data)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UserError(f"{file}: damaged gzip data ({error})") from None
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
            before += size
            self.position = before


def read_text(file: Path) -> str:
    """The whole text of a file: a text file as it is, or the `text` fields of JSON lines, joined by newlines."""
    return "\n".join(document.text for block in DocumentReader([file]) for document in block.documents())


def _read_block(stream: BinaryIO, layout: str) -> bytes:
    """The next bytes up to an end of a document; b"" at the end of the file."""
    if layout == "none":
        return stream.read()
    parts = [stream.read(BLOCK_BYTES), stream.readline()]
    if layout == "blank_line":
        # What was read may end anywhere, even between the two line ends before a blank line: go on to the next one.
        while parts[-1]:
            parts.append(stream.readline())
            if parts[-1].isspace():
                break
    return b"".join(parts)


def _field(line: str, key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a '{key}' field")
    if key not in row:
        raise UserError(f"{where}: no '{key}' field; it has: {', '.join(map(repr, row)) or 'none'}")
    text = row[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: '{key}' is a {type(text).__name__}, not a string")
    if "\\u" in line:  # only an escape can bring in half of a surrogate pair
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: '{key}' has an unpaired surrogate at character {error.start}") from None
    return text


def _file_size(file: Path) -> int:
    if file.is_dir():
        raise UserError(f"{file}: a folder, not a file")
    if not file.exists():
        raise UserError(f"{file}: no such file")
    if file.name.removesuffix(".gz").endswith(".json"):
        raise UserError(f"{file}: plain text or JSON lines are needed; name a file of JSON lines .jsonl")
    return file.stat().st_size
