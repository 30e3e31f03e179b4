"""What documents are read from: text files, tables in parquet, and data sets of the `datasets` library."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from mha2mla_megatron.data.documents import BLOCK_BYTES, COMPRESSIONS, JSON_LINES, Block, DocumentReader, too_long
from mha2mla_megatron.errors import UserError, first_line

ROWS = 1000
"""Rows of a table read at a time."""


class Inputs:
    """The blocks of all inputs, in order.

    A name is a file, or a folder or hub id (owner/name) of a data set. size: bytes of all files, infinite where there
    is a data set. position: bytes read; those of a data set's texts. described: what there is to say of each input.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        separator: str,
        max_document: int,
        column: str,
        subset: str | None,
        split: str,
        streaming: bool,
    ) -> None:
        """Raises UserError for an input that is missing or cannot be one, before anything is read."""
        self.names, self.position = names, 0
        self.readers: list[Any] = []
        for kind, group in groupby(names, _kind):
            if kind == "text":
                self.readers.append(DocumentReader([Path(name) for name in group], separator, max_document))
            elif kind == "parquet":
                self.readers += [ParquetReader(Path(name), column, max_document) for name in group]
            else:
                self.readers += [DatasetReader(name, column, max_document, subset, split, streaming) for name in group]
        self.size = sum(reader.size for reader in self.readers)

    def __iter__(self) -> Iterator[Block]:
        before = 0
        for reader in self.readers:
            for block in reader:
                self.position = before + reader.position
                yield block
            before += reader.position
            self.position = before

    @property
    def described(self) -> list[dict[str, Any]]:
        return [entry for reader in self.readers for entry in _describe(reader)]


class ParquetReader:
    """One string column of a parquet file, a document each row."""

    def __init__(self, file: Path, column: str, max_document: int) -> None:
        import pyarrow.parquet

        self.file, self.column, self.max_document = file, column, max_document
        self.size, self.position = file.stat().st_size, 0
        try:
            self.table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as parquet ({first_line(error)})") from None
        _require_column(column, self.table.schema_arrow.names, str(file))

    def __iter__(self) -> Iterator[Block]:
        import pyarrow

        row, rows = 1, self.table.metadata.num_rows
        try:
            for batch in self.table.iter_batches(ROWS, columns=[self.column]):
                self.position = self.size * (row - 1 + len(batch)) // rows
                yield from column_blocks(batch.column(0), self.column, str(self.file), row, self.max_document)
                row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.file}: damaged parquet data ({first_line(error)})") from None
        self.position = self.size


class DatasetReader:
    """One string column of a split of a data set, from the hub or a local folder; read as it comes, or downloaded."""

    size = math.inf

    def __init__(
        self, name: str, column: str, max_document: int, subset: str | None, split: str, streaming: bool
    ) -> None:
        from datasets import disable_progress_bars, load_dataset

        self.name, self.column, self.max_document, self.position = name, column, max_document, 0
        self.about = {"dataset": name, "subset": subset, "split": split}
        self.rows = 0
        disable_progress_bars()
        try:
            self.dataset: Any = load_dataset(name, subset, split=split, streaming=streaming)
        except Exception as error:  # the library raises a dozen kinds, plain ValueError among them
            of = f" (subset {subset}, split {split})"
            raise UserError(f"{name}{of}: cannot be read as a data set ({first_line(error)})") from None
        if self.dataset.column_names is not None:  # a stream may not know them before its first row
            _require_column(column, self.dataset.column_names, name)
            self.dataset = self.dataset.select_columns([column])

    def __iter__(self) -> Iterator[Block]:
        self.rows = self.position = 0
        batches = iter(self.dataset.with_format("arrow").iter(batch_size=ROWS))
        while True:
            try:
                table = next(batches, None)
            except Exception as error:  # as above, and what a broken connection or file brings
                raise UserError(f"{self.name}: after row {self.rows}: cannot be read ({first_line(error)})") from None
            if table is None:
                return
            _require_column(self.column, table.column_names, self.name)
            for chunk in table.column(self.column).chunks:
                for block in column_blocks(chunk, self.column, self.name, self.rows + 1, self.max_document):
                    self.position += len(block.data)
                    yield block
                self.rows += len(chunk)


def column_blocks(cells: Any, column: str, file: str, row: int, max_document: int) -> Iterator[Block]:
    """Blocks of a pyarrow string array whose first cell is in the 1-based `row`; the text is not taken apart.

    Raises UserError for a column of another type, an empty cell and a document that is too long.
    """
    import pyarrow
    from pyarrow import types

    if types.is_null(cells.type) and len(cells):
        raise UserError(f"{file}, row {row}: '{column}' is null, not a string")
    if not any(is_text(cells.type) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
        raise UserError(f"{file}: '{column}' is of type {cells.type}, not a string")
    if cells.null_count:
        first = numpy.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))[0]
        raise UserError(f"{file}, row {row + first}: '{column}' is null, not a string")
    cells = cells.cast(pyarrow.large_string())
    _, ends, text = cells.buffers()
    offsets = numpy.frombuffer(ends, dtype=numpy.int64)[cells.offset : cells.offset + len(cells) + 1]
    data = memoryview(text or b"")
    lengths = numpy.diff(offsets)
    if len(lengths) and lengths.max() > max_document:
        raise UserError(f"{file}, row {row + int(lengths.argmax())}: {too_long(max_document)}")
    start = 0
    while start < len(cells):
        full = int(numpy.searchsorted(offsets, offsets[start] + BLOCK_BYTES))
        end = min(max(full, start + 1), len(cells))
        yield Block.of_column(
            bytes(data[offsets[start] : offsets[end]]), lengths[start:end].tolist(), file, row + start
        )
        start = end


def _kind(name: str) -> str:
    """How an input is read: text, parquet or dataset."""
    path = Path(name)
    if path.is_dir() or (not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _looks_like_a_file(path)):
        return "dataset"
    return "parquet" if path.suffix.lower() == ".parquet" and path.exists() else "text"


def _looks_like_a_file(path: Path) -> bool:
    return path.suffix.lower() in (".txt", ".json", ".parquet", *JSON_LINES, *COMPRESSIONS)


def _require_column(column: str, names: Sequence[str], where: str) -> None:
    if column not in names:
        raise UserError(f"{where}: no '{column}' column; it has: {', '.join(map(repr, names)) or 'none'} (text_key)")


def _describe(reader: Any) -> list[dict[str, Any]]:
    if isinstance(reader, DocumentReader):
        return [{"file": str(f), "bytes": size} for f, size in zip(reader.files, reader.sizes, strict=True)]
    if isinstance(reader, ParquetReader):
        return [{"file": str(reader.file), "bytes": reader.size}]
    return [{**reader.about, "rows_read": reader.rows}]
