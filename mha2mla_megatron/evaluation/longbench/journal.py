"""Predictions on disk as they are made. Every process writes a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mha2mla_megatron.evaluation.journal import append_lines, read_lines
from mha2mla_megatron.evaluation.longbench.generate import Answer


class Prediction(NamedTuple):
    """What the model says to one sample."""

    task: str

    index: int
    """The sample's place in its file, from 0."""

    answer: Answer


def read_journals(folder: Path) -> dict[tuple[str, int], Answer]:
    """(task, index) -> answer, of all files in the folder. Raises UserError, naming the line, for damaged ones."""

    def parse(row: dict[str, Any]) -> Prediction:
        answer = Answer(
            str(row["pred"]), float(row["cache_bytes"]), int(row["cached_tokens"]), int(row["decoded_tokens"]),
            float(row["decode_seconds"]),
        )  # fmt: skip
        return Prediction(str(row["task"]), int(row["index"]), answer)

    lines = (line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file, parse, "a prediction"))
    return {(line.task, line.index): line.answer for line in lines}


def append(file: Path, predictions: Sequence[Prediction]) -> None:
    """Write the predictions to the disk, all in one piece. Raises UserError where that fails."""
    rows = (
        {"task": task, "index": index, "pred": answer.text, "cache_bytes": answer.cache_bytes,
         "cached_tokens": answer.cached_tokens, "decoded_tokens": answer.decoded_tokens,
         "decode_seconds": answer.decode_seconds}
        for task, index, answer in predictions
    )  # fmt: skip
    append_lines(file, list(rows))
