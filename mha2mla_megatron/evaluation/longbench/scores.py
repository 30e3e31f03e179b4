"""Scores of predictions, and the averages of LongBench's tables."""

from __future__ import annotations

from collections.abc import Sequence

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.longbench.metrics import METRICS
from mha2mla_megatron.evaluation.longbench.tasks import GROUPS, TASKS, LongBenchTask


def score(task: LongBenchTask, prediction: str, answers: Sequence[str], classes: Sequence[str], where: str) -> float:
    """The best score, from 0 to 100, of a prediction against any of the right answers.

    Raises UserError, naming `where`, for an answer that is not of the task.
    """
    if task.one_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    more = (classes,) if task.metric == "classification" else ()
    try:
        return 100 * max(metric(prediction, answer, *more) for answer in answers)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _equal_parts(tasks: Sequence[str]) -> dict[str, float]:
    return {task: 1 / len(tasks) for task in tasks}


def _averages() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for language in ("en", "zh"):
        total: dict[str, float] = {}
        for group in GROUPS:
            tasks = [name for name, task in TASKS.items() if task.group == group and language in task.languages]
            found[f"{group} ({language})"] = _equal_parts(tasks)
            total |= {name: weight / len(GROUPS) for name, weight in _equal_parts(tasks).items()}
        found[f"Average of groups ({language})"] = total
        tasks = [name for name, task in TASKS.items() if language in task.languages]
        found[f"Average of {len(tasks)} tasks ({language})"] = _equal_parts(tasks)
    found[f"Average of all {len(TASKS)} tasks"] = _equal_parts(list(TASKS))
    return found


AVERAGES = _averages()
"""Name -> each task's weight. Those of groups, and of all groups in a language, are what the benchmark's tables show;
the plain means of tasks are what most papers about caches quote."""
