"""Predictions on disk as they are made: JSON lines that are appended and flushed, so that a rerun goes on from there.

Every process writes a file of its own. A last line without its end, left by a process that was killed in the middle of
it, does not count and is cut off when the file is written to again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mha2mla_megatron.errors import UserError


class Prediction(NamedTuple):
    """What the model says to one sample."""

    task: str

    index: int
    """The sample's place in its file, from 0."""

    text: str


def read_journals(folder: Path) -> dict[tuple[str, int], str]:
    """(task, index) -> prediction, of all files in the folder. Raises UserError, naming the line, for damaged ones."""
    found = {}
    for file in sorted(folder.glob("*.jsonl")):
        *lines, _ = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                found[str(row["task"]), int(row["index"])] = str(row["pred"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{file}, line {number}: not a prediction; remove the line to have it made again"
                ) from None
    return found


def append(file: Path, predictions: Sequence[Prediction]) -> None:
    """Write the predictions to the disk, all in one piece. Raises UserError where that fails."""
    rows = ({"task": p.task, "index": p.index, "pred": p.text} for p in predictions)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def cut_torn_line(file: Path) -> None:
    """Remove what stands after the last line end, if the file is there."""
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
