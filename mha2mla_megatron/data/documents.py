"""Documents in text and JSON-lines files, read as a stream; what is wrong with one is said by file and line or byte.

Reading and decoding are apart: `DocumentReader` cuts files into blocks of whole documents, which costs next to nothing,
and `Block.documents` takes a block apart, which the worker processes do.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import require_file

SEPARATORS = ("none", "newline", "blank_line")
COMPRESSIONS = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
_JSON_LINES = "json_lines"
_COLUMN = "column"

BLOCK_BYTES = 256 << 10
"""A block is closed by the first end of a document after this many bytes."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """The text of one document and where it begins."""

    text: str
    file: str
    line: int
    """1-based."""

    unit: str = "line"
    """What `line` counts: line, or row of a table."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}, {self.unit} {self.line}"


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
    """How documents are told apart: one of SEPARATORS, "json_lines", or "column": by their lengths."""

    lengths: tuple[int, ...] = ()
    """Bytes of each document, of a column; `line` is then the number of its first row."""

    @classmethod
    def of_column(cls, data: bytes, lengths: Sequence[int], file: str, row: int) -> Block:
        """Cells of a table's column, the first one in the 1-based `row`."""
        return cls(data, file, row, 0, _COLUMN, tuple(lengths))

    def documents(self, text_key: str = "text") -> Iterator[Document]:
        """The documents, blank ones included; `text_key` names the field that holds the text, in JSON.

        Raises UserError, naming file and byte or line, for what is not UTF-8, not JSON or has no text.
        """
        if self.layout == _COLUMN:
            yield from self._cells()
            return
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

    def _cells(self) -> Iterator[Document]:
        start = 0
        for row, length in enumerate(self.lengths, start=self.line):
            try:
                text = self.data[start : start + length].decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.file}, row {row}: not valid UTF-8 at byte {error.start}") from None
            yield Document(text, self.file, row, "row")
            start += length


class DocumentReader:
    """Iterates over the blocks of files, in order.

    A name that ends in .jsonl or .ndjson, in small or capital letters, is JSON lines, a document each; anything else is
    plain text; .gz and .zst after either are unpacked. separator, for plain text: `none` (the file is one document),
    `newline` (each line is one) or `blank_line` (lines up to an empty or blank one are one); a document does not
    include the line end before its separator. Memory: one block, that is BLOCK_BYTES and a document.

    size, position: bytes of all files, and how many are read, both as they are on disk. max_document: bytes of a
    document as it stands in its file; a longer one is refused.
    """

    def __init__(self, files: Sequence[Path], separator: str = "none", max_document: int | None = None) -> None:
        """Raises UserError for what cannot be a file of documents, before anything is read."""
        assert separator in SEPARATORS
        self.files, self.separator, self.max_document = files, separator, max_document
        self.sizes = [_file_size(file) for file in files]
        self.size = sum(self.sizes)
        self.position = 0

    def __iter__(self) -> Iterator[Block]:
        self.position = before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            layout = _JSON_LINES if _unpacked(file).endswith(JSON_LINES) else self.separator
            line, offset = 1, 0
            try:
                with open(file, "rb") as raw:
                    stream = _unpack(raw, file.suffix.lower())
                    while data := self._read_block(stream, layout, file, line):
                        self.position = before + raw.tell()
                        mark = len(_BYTE_ORDER_MARK) if offset == 0 and data.startswith(_BYTE_ORDER_MARK) else 0
                        yield Block(data[mark:], str(file), line, offset + mark, layout)
                        line += data.count(b"\n")
                        offset += len(data)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UserError(f"{file}: damaged gzip data ({error})") from None
            except OSError as error:
                if error.errno is None:  # pyarrow's, of its zstd
                    raise UserError(f"{file}: damaged zstd data ({error})") from None
                raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
            before += size
            self.position = before

    def _read_block(self, stream: BinaryIO, layout: str, file: Path, line: int) -> bytes:
        """The next bytes up to an end of a document, from this line on; b"" at the end of the file."""
        limit = -1 if self.max_document is None else self.max_document + 1
        if layout == "none":
            data = stream.read(limit)
            self._check_length(len(data), file, line)
            return data
        parts = [stream.read(BLOCK_BYTES), stream.readline(limit)]
        # What was read may end anywhere, even between the two line ends before a blank line: go on to the next one.
        while layout == "blank_line" and parts[-1] and not (len(parts) > 2 and parts[-1].isspace()):
            self._check_length(sum(map(len, parts[1:])), file, line + sum(part.count(b"\n") for part in parts[:-1]))
            parts.append(stream.readline(limit))
        self._check_length(len(parts[-1]), file, line + sum(part.count(b"\n") for part in parts[:-1]))
        return b"".join(parts)

    def _check_length(self, length: int, file: Path, line: int) -> None:
        if self.max_document is not None and length > self.max_document:
            raise UserError(f"{file}, line {line}: {too_long(self.max_document)}")


def too_long(limit: int) -> str:
    """What is said of a document of more than `limit` bytes."""
    return (
        f"a document of more than {limit / 1e6:g} MB; tokenising takes ~120 bytes of memory for each of its bytes: cut "
        "it (document_separator, for plain text) or give a larger max_document_mb"
    )


def read_text(file: Path) -> str:
    """The whole text of a file: a text file as it is, or the `text` fields of JSON lines, joined by newlines."""
    return "\n".join(document.text for block in DocumentReader([file]) for document in block.documents())


def _unpacked(file: Path) -> str:
    """The file's name in small letters, without the ending of a compressed one."""
    name = Path(file.name.lower())
    return name.stem if name.suffix in COMPRESSIONS else name.name


def _unpack(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow  # Python has no zstd of its own before 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # type: ignore[arg-type]
    return raw


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
    require_file(file)
    if _unpacked(file).endswith(".parquet"):
        raise UserError(
            f"{file}: parquet is read by tools/preprocess_data.py alone; plain text or JSON lines are needed"
        )
    if _unpacked(file).endswith(".json"):
        raise UserError(f"{file}: plain text or JSON lines are needed; name a file of JSON lines .jsonl")
    return file.stat().st_size
