"""Predictions on disk as they are made. Every process writes a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mha2mla_megatron.evaluation.journal import append_lines, read_lines


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
        for row in read_lines(
            file, lambda row: Prediction(str(row["task"]), int(row["index"]), str(row["pred"])), "a prediction"
        ):
            found[row.task, row.index] = row.text
    return found


def append(file: Path, predictions: Sequence[Prediction]) -> None:
    """Write the predictions to the disk, all in one piece. Raises UserError where that fails."""
    append_lines(file, [{"task": p.task, "index": p.index, "pred": p.text} for p in predictions])
