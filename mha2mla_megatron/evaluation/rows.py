"""Rows of evaluation data: JSON lines, each an object, with what is wrong said by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mha2mla_megatron.data.documents import DocumentReader
from mha2mla_megatron.errors import UserError

Row = tuple[str, dict[str, Any]]
"""File and line, for messages; the object."""


def read_rows(file: Path, max_rows: int | None = None) -> Iterator[Row]:
    """The first `max_rows` rows of a .jsonl[.gz]. Raises UserError, naming the line, for what is not a JSON object."""
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"{file}: JSON lines are needed; the name must end in .jsonl or .jsonl.gz")
    count = 0
    for block in DocumentReader([file]):
        for row in parse_rows(block.data, str(file), block.line):
            if count == max_rows:
                return
            count += 1
            yield row


def parse_rows(data: bytes, name: str, first_line: int = 1) -> Iterator[Row]:
    """The rows of whole lines; empty ones are left out."""
    for number, line in enumerate(data.split(b"\n"), start=first_line):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _parse(line, where)


def require_field(row: dict[str, Any], field: str, where: str) -> Any:
    """The value of a field. Raises UserError, naming those that there are, where it is missing."""
    if field not in row:
        raise UserError(f"{where}: no '{field}' field; it has: {', '.join(map(repr, row)) or 'none'}")
    return row[field]


def require_text(row: dict[str, Any], field: str, where: str) -> str:
    """The string in a field. Raises UserError for another type."""
    value = require_field(row, field, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: '{field}' is a {type(value).__name__}, not a string")
    return value


def require_texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    """The strings in a field. Raises UserError for anything but a list of one or more."""
    value = require_field(row, field, where)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: '{field}' is not a list of one string or more")
    return value


def require_choices(row: dict[str, Any], where: str) -> tuple[list[str], int]:
    """The texts in `choices` and the right one's number, from 0.

    `choices` is the hub's {text, label} with one of the labels in `answerKey`, or a list of texts with the number in
    `gold`. Raises UserError for anything else.
    """
    choices = require_field(row, "choices", where)
    if not isinstance(choices, dict):
        texts = require_texts(row, "choices", where)
        return texts, require_choice(row, "gold", len(texts), where)
    texts, labels = (require_texts(choices, field, f"{where}: choices") for field in ("text", "label"))
    key = require_text(row, "answerKey", where).strip()
    if key not in labels[: len(texts)]:
        raise UserError(f"{where}: 'answerKey' is {key!r}, not one of {', '.join(labels[: len(texts)])}")
    return texts, labels.index(key)


def require_choice(row: dict[str, Any], field: str, choices: int, where: str, first: int = 0) -> int:
    """The right choice, from 0, of so many; the field counts from `first`. Raises UserError for another number."""
    value, last = require_field(row, field, where), first + choices - 1
    if not str(value).isdecimal() or not first <= int(value) <= last:
        raise UserError(f"{where}: '{field}' is {value!r}, not the number of a choice, {first} to {last}")
    return int(value) - first


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, half of a surrogate pair
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object")
    return row
