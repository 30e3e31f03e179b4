"""LongBench's metrics beside those of its authors' script: the same predictions, sample by sample.

    git clone https://github.com/THUDM/LongBench
    pip install jieba fuzzywuzzy rouge
    python tools/benchmarks/longbench_metrics.py LongBench/LongBench OUT

OUT: what evaluate_longbench.py wrote. The authors' `eval.py` and `metrics.py` run as they are; none of it is part of
this repository. Their number is what their `scorer` gives, ours the mean of our scores; "equal" says that every sample
has the very same score. The exit code is 1 if one has not. With python-Levenshtein, which the authors do not ask for,
fuzzywuzzy compares lines of code in another way.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, run_tool
from mha2mla_megatron.evaluation.longbench.scores import score
from mha2mla_megatron.evaluation.longbench.tasks import TASKS, LongBenchTask
from mha2mla_megatron.evaluation.rows import read_rows, require_text, require_texts
from mha2mla_megatron.evaluation.table import format_markdown

USAGE = "longbench_metrics.py OFFICIAL OUT"


@dataclass(frozen=True)
class Compared:
    """The predictions of one task under both; scores from 0 to 100."""

    task: str

    official: float
    """By their `scorer`, which rounds it to two places."""

    pairs: list[tuple[float, float]]
    """(theirs, ours) of each sample."""

    @property
    def apart(self) -> list[float]:
        """The differences that are there."""
        return [abs(theirs - ours) for theirs, ours in self.pairs if theirs != ours]


def main(argv: list[str]) -> None:
    (official, target), _, _ = split_words(argv, USAGE, 2, 2)
    files = sorted(Path(target, "predictions").glob("*.jsonl"))
    tasks = [(TASKS[file.stem], file) for file in files if file.stem in TASKS]
    if not tasks:
        raise UserError(f"{target}: holds no predictions/TASK.jsonl of evaluate_longbench.py")
    script = _load(Path(official))
    found = [_compare(script, task, file) for task, file in tasks]
    rows = [
        (
            one.task,
            str(len(one.pairs)),
            f"{one.official:.2f}",
            f"{sum(ours for _, ours in one.pairs) / len(one.pairs):.2f}",
            f"{len(one.apart)} apart, by up to {max(one.apart):.3g}" if one.apart else "yes",
        )
        for one in found
    ]
    print(format_markdown(("task", "samples", "official", "ours", "equal"), rows))
    if any(one.apart for one in found):
        sys.exit(1)


def _compare(script: ModuleType, task: LongBenchTask, file: Path) -> Compared:
    metric: Callable[..., float] = script.dataset2metric[task.name]
    predictions, answers, classes, pairs = [], [], None, []
    for where, row in read_rows(file):
        text, right, classes = (
            require_text(row, "pred", where),
            require_texts(row, "answers", where),
            row["all_classes"],
        )
        predictions.append(text)
        answers.append(right)
        seen = text.lstrip("\n").split("\n")[0] if task.one_line else text
        theirs = 100 * max(0.0, *(metric(seen, answer, all_classes=classes) for answer in right))
        pairs.append((theirs, score(task, text, right, classes or (), where)))
    return Compared(task.name, float(script.scorer(task.name, predictions, answers, classes)), pairs)


def _load(folder: Path) -> Any:
    """Their eval.py as a module; `metrics`, which it imports, is the file beside it."""
    file = folder / "eval.py"
    if not file.is_file() or not (folder / "metrics.py").is_file():
        raise UserError(f"{folder}: holds no eval.py with metrics.py; give the folder LongBench of THUDM/LongBench")
    spec = importlib.util.spec_from_file_location("official_longbench", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{file}: {error}; pip install jieba fuzzywuzzy rouge") from None
    finally:
        sys.path.remove(str(folder))
    if not hasattr(module, "dataset2metric") or not hasattr(module, "scorer"):
        raise UserError(f"{file}: has no dataset2metric and scorer; it is not the script of LongBench v1")
    return module


if __name__ == "__main__":
    run_tool(main)
