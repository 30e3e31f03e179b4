"""evaluate_choices.py beside lm-evaluation-harness and lighteval: the same rows, row by row, and the time each takes.

    pip install lm-eval -c constraints.txt '.[eval]'
    python tools/benchmarks/choices.py MODEL ROWS.jsonl[.gz] [rows=100] [key=value ...]

lm-eval runs its own task with nothing replaced but the data: its prompts are ours, so every row must come out right or
wrong as here; one that does not is named, and the exit code is 1. WinoGrande has no acc_norm there. lighteval runs the
task of that name with `_cf` (other spaces in prompts, WinoGrande in another form: the time is compared, not the rows).
Times are of whole evaluations, the model's loading included, imports not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mha2mla_megatron.checkpoint.causal_lm import pick_device
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of, run_tool
from mha2mla_megatron.evaluation.choice_questions import read_questions
from mha2mla_megatron.evaluation.choices import ChoicesSettings, evaluate_choices
from mha2mla_megatron.evaluation.cloze import TASKS as CLOZE_TASKS
from mha2mla_megatron.evaluation.lighteval_run import LightevalSettings, evaluate_lighteval
from mha2mla_megatron.evaluation.rows import read_rows, require_choices
from mha2mla_megatron.evaluation.table import format_markdown
from mha2mla_megatron.settings import load_settings

ITS_TASKS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Task -> its file among lm-eval's."""

USAGE = "choices.py MODEL ROWS.jsonl[.gz] [key=value ...]"


@dataclass(frozen=True)
class BenchmarkSettings:
    task: str | None = None
    """As for evaluate_choices.py."""

    rows: int = 100
    """The first so many rows."""

    batch_size: int = 32
    """Sequences in a forward pass of lm-eval; lighteval divides it by the choices of a row."""

    batch_tokens: int = 4096
    """Of evaluate_choices.py."""

    dtype: str = "float32"
    device: str = "auto"

    lighteval: bool = True
    """false: lm-eval only."""

    def __post_init__(self) -> None:
        if self.task is not None:
            require_one_of("task", self.task, tuple(ITS_TASKS))
        require_at_least("rows", self.rows, 1)
        require_at_least("batch_size", self.batch_size, 1)
        pick_device(self.device)


def main(argv: list[str]) -> None:
    (model, source), overrides, config = split_words(argv, USAGE, 2, 2, schema=BenchmarkSettings)
    settings = load_settings(BenchmarkSettings, overrides, config)
    for name in ("lm_eval", "lighteval")[: 1 + settings.lighteval]:
        _require(name)
    resolve_model(model)
    task, questions = read_questions(Path(source), settings.task, settings.rows)
    found = [row for _, row in read_rows(Path(source), settings.rows)]
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "data", task, f"{CLOZE_TASKS[f'{task}_cf'].split}.jsonl")
        rows.parent.mkdir(parents=True)
        _write(rows, found)
        own = ChoicesSettings(
            task=task, batch_tokens=settings.batch_tokens, dtype=settings.dtype, device=settings.device
        )
        (ours,), seconds = _timed(lambda: evaluate_choices([model], rows, own))
        lines = [("evaluate_choices", ours.acc, ours.acc_norm, seconds)]
        theirs, seconds = _timed(lambda: _lm_eval(model, task, found, Path(scratch), settings))
        its = {key: [bool(row[key]) for row in theirs] for key in ("acc", "acc_norm") if key in theirs[0]}
        means = {key: sum(right) / len(right) for key, right in its.items()}
        lines.append((_version("lm_eval"), means["acc"], means.get("acc_norm"), seconds))
        if settings.lighteval:
            lines.append((_version("lighteval"), *_lighteval(model, task, Path(scratch), settings)))
    table = [
        (
            name,
            f"{acc:.4f}",
            "-" if norm is None else f"{norm:.4f}",
            f"{taken:.1f}",
            f"{len(questions) / taken:.3f}",
            f"{taken / lines[0][3]:.2f}",
        )
        for name, acc, norm, taken in lines
    ]
    print(format_markdown(("", "acc", "acc_norm", "seconds", "rows/s", "time to ours"), table))
    ours_by_key = {"acc": ours.right, "acc_norm": ours.right_norm}
    apart = [
        f"row {number + 1}: {key} {mine} here, {other} in lm-eval"
        for key, there in its.items()
        for number, (mine, other) in enumerate(zip(ours_by_key[key], there, strict=True))
        if mine != other
    ]
    print("\n".join(apart) or f"{len(questions)} rows of {task}: {' and '.join(its)} of each as in lm-eval")
    if apart:
        sys.exit(1)


def _lm_eval(
    model: str, task: str, rows: list[dict[str, Any]], scratch: Path, settings: BenchmarkSettings
) -> list[dict[str, Any]]:
    """lm-eval's samples in the order of the rows."""
    import lm_eval  # type: ignore[import-not-found]

    name, its_own = f"{task}_rows", Path(lm_eval.__file__).parent / "tasks" / ITS_TASKS[task]
    data, file = scratch / "lm_eval.jsonl", scratch / f"{name}.yaml"
    _write(data, [_as_on_the_hub(row, f"row {number + 1}") for number, row in enumerate(rows)])
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"validation": str(data)}}}
    file.write_text(
        yaml.safe_dump({"include": str(its_own), "task": name, **source, "training_split": None, "test_split": None})
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": settings.dtype, "trust_remote_code": True},
        tasks=[str(file)],
        batch_size=settings.batch_size,
        device=str(pick_device(settings.device)),
        bootstrap_iters=0,
        log_samples=True,
    )
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def _as_on_the_hub(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with `choices` and `gold` in the fields of ARC and OpenBookQA that lm-eval asks for; others as they are."""
    if "choices" not in row:
        return row
    texts, gold = require_choices(row, where)
    labels = [chr(ord("A") + number) for number in range(len(texts))]
    question = row["question_stem"] if "question_stem" in row else row["question"]
    nested = {"choices": {"text": texts, "label": labels}, "answerKey": labels[gold]}
    return {"question": question, "question_stem": question, **nested}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _lighteval(model: str, task: str, scratch: Path, settings: BenchmarkSettings) -> tuple[float, float, float]:
    """(acc, acc_norm, seconds by its own clock, which starts when it is imported)."""
    own = LightevalSettings(
        tasks=[f"{task}_cf"], data=str(scratch / "data"), batch_size=settings.batch_size, dtype=settings.dtype
    )
    evaluate_lighteval(model, scratch / "lighteval", own)
    (file,) = (scratch / "lighteval").glob("results/**/*.json")
    found = json.loads(file.read_text())
    scores = found["results"][f"{task}_cf|0"]
    return scores["acc"], scores["acc_norm"], float(found["config_general"]["total_evaluation_time_secondes"])


def _timed[Result](work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module} is not installed; the head of this file says how")


def _version(module: str) -> str:
    return f"{module} {importlib.metadata.version(module)}"


if __name__ == "__main__":
    run_tool(main)
