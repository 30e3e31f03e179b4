"""Documents in text and JSON-lines files, read as a stream; what is wrong with one is said by file and line or byte."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mha2mla_megatron.errors import UserError

SEPARATORS = ("none", "newline", "blank_line")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_SIZE = 1 << 20


class Document(NamedTuple):
    """One document, not decoded yet: decoding and JSON parsing are left to the workers."""

    data: bytes
    """UTF-8 text, or a line of JSON."""

    file: str

    line: int
    """1-based number of its first line."""

    offset: int
    """Bytes before it in the file (in the uncompressed file, of a .gz)."""

    is_json: bool

    def text(self, text_key: str) -> str:
        """The document's text; `text_key` is the field that holds it, in JSON. Raises UserError if there is none."""
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: not valid UTF-8 at byte {self.offset + error.start}") from None
        return self._field(text, text_key) if self.is_json else text

    def _field(self, line: str, key: str) -> str:
        where = f"{self.file}, line {self.line}"
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


class DocumentReader:
    """Iterates over the documents of files, in order.

    A name that ends in .jsonl is JSON lines, a document each; anything else is plain text; .gz after either is
    unpacked. separator, for plain text: `none` (the file is one document), `newline` (each line is one) or
    `blank_line` (lines up to an empty or blank one are one); a document does not include the line end before its
    separator. Memory: one document, plus a read buffer.

    size, position: bytes of all files, and how many are read, both as they are on disk.
    """

    def __init__(self, files: Sequence[Path], separator: str = "none") -> None:
        """Raises UserError for what cannot be a file of documents, before anything is read."""
        assert separator in SEPARATORS
        self.files, self.separator = files, separator
        self.sizes = [_file_size(file) for file in files]
        self.size = sum(self.sizes)
        self.position = 0

    def __iter__(self) -> Iterator[Document]:
        before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            try:
                with open(file, "rb", buffering=_READ_SIZE) as raw:
                    stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
                    for document in self._documents(file, stream):  # type: ignore[arg-type]
                        self.position = before + raw.tell()
                        yield document
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UserError(f"{file}: damaged gzip data ({error})") from None
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
            before += size
            self.position = before

    def _documents(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        name = str(file)
        if _is_json_lines(file):
            for number, offset, line in _lines(stream):
                if not line.isspace():
                    yield Document(line, name, number, offset, True)
        elif self.separator == "none":
            data = stream.read()
            mark = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
            yield Document(data[mark:], name, 1, mark, False)
        elif self.separator == "newline":
            for number, offset, line in _lines(stream):
                yield Document(_without_line_end(line), name, number, offset, False)
        else:
            yield from _paragraphs(name, stream)


def read_text(file: Path) -> str:
    """The whole text of a file: a text file as it is, or the `text` fields of JSON lines, joined by newlines."""
    return "\n".join(document.text("text") for document in DocumentReader([file]))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(1-based number, byte offset, line with its end) without a byte order mark at the start."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
        yield number, offset + mark, line[mark:]
        offset += len(line)


def _paragraphs(name: str, stream: BinaryIO) -> Iterator[Document]:
    lines: list[bytes] = []
    first_number = first_offset = 0
    for number, offset, line in _lines(stream):
        if not line or line.isspace():
            if lines:
                yield Document(_without_line_end(b"".join(lines)), name, first_number, first_offset, False)
                lines = []
            continue
        if not lines:
            first_number, first_offset = number, offset
        lines.append(line)
    if lines:
        yield Document(_without_line_end(b"".join(lines)), name, first_number, first_offset, False)


def _without_line_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _is_json_lines(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(".jsonl")


def _file_size(file: Path) -> int:
    if file.is_dir():
        raise UserError(f"{file}: a folder, not a file")
    if not file.exists():
        raise UserError(f"{file}: no such file")
    if file.name.removesuffix(".gz").endswith(".json"):
        raise UserError(f"{file}: plain text or JSON lines are needed; name a file of JSON lines .jsonl")
    return file.stat().st_size
