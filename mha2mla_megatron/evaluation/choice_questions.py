"""Questions of multiple choice, as lm-evaluation-harness asks them, from rows of the benchmarks' own fields.

HellaSwag    "{activity_label}: {ctx_a} {ctx_b, capitalised}" and each of `endings`, cleaned of WikiHow's brackets
PIQA         "Question: {goal}\\nAnswer:" and `sol1`, `sol2`
ARC          "Question: {question}\\nAnswer:" and the texts of `choices`
OpenBookQA   the question and the texts of `choices`
WinoGrande   the sentence up to its gap with `option1` or `option2` in it, and for both what follows the gap
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.rows import (
    read_rows,
    require_choice,
    require_choices,
    require_text,
    require_texts,
)

Fields = dict[str, Any]


class Question(NamedTuple):
    """One row."""

    contexts: list[str]
    """What stands before each choice: mostly the same."""

    choices: list[str]
    """Without the space before them."""

    gold: int
    """The right one's number, from 0."""

    where: str
    """File and line, for messages."""


def read_questions(file: Path, task: str | None = None, max_rows: int | None = None) -> tuple[str, list[Question]]:
    """The task and the first `max_rows` rows. task: None for the one that the fields of the first row tell.

    Raises UserError, naming file and line, for a row that is not of the task, and where the fields do not tell it.
    """
    questions = []
    for where, row in read_rows(file, max_rows):
        task = task or _detect(row, where)
        question = Question(*TASKS[task].ask(row, where), where)
        if len(question.choices) < 2:
            raise UserError(f"{where}: one choice only")
        if not all(choice.strip() for choice in question.choices):
            raise UserError(f"{where}: a choice without text")
        questions.append(question)
    if task is None or not questions:
        raise UserError(f"{file}: holds no rows")
    return task, questions


class ChoiceTask(NamedTuple):
    """A benchmark."""

    ask: Callable[[Fields, str], tuple[list[str], list[str], int]]
    """Row and its place, for messages -> contexts, choices, the right one's number. Raises UserError for bad ones."""

    fields: tuple[str, ...]
    """Those that tell its rows."""


def _hellaswag(row: Fields, where: str) -> tuple[list[str], list[str], int]:
    label, a, b = (require_text(row, field, where) for field in ("activity_label", "ctx_a", "ctx_b"))
    endings = [_clean(ending) for ending in require_texts(row, "endings", where)]
    context = _clean(f"{label}: {a} {b.capitalize()}")
    return [context] * len(endings), endings, require_choice(row, "label", len(endings), where)


def _piqa(row: Fields, where: str) -> tuple[list[str], list[str], int]:
    goal, *choices = (require_text(row, field, where) for field in ("goal", "sol1", "sol2"))
    return [f"Question: {goal}\nAnswer:"] * 2, choices, require_choice(row, "label", 2, where)


def _arc(row: Fields, where: str) -> tuple[list[str], list[str], int]:
    context, (choices, gold) = require_text(row, "question", where), require_choices(row, where)
    return [f"Question: {context}\nAnswer:"] * len(choices), choices, gold


def _openbookqa(row: Fields, where: str) -> tuple[list[str], list[str], int]:
    context = require_text(row, "question_stem" if "question_stem" in row else "question", where)
    choices, gold = require_choices(row, where)
    return [context] * len(choices), choices, gold


def _winogrande(row: Fields, where: str) -> tuple[list[str], list[str], int]:
    sentence, *options = (require_text(row, field, where) for field in ("sentence", "option1", "option2"))
    before, gap, after = sentence.partition("_")
    if not gap:
        raise UserError(f"{where}: 'sentence' has no gap (_)")
    contexts = [f"{before}{option}" for option in options]
    return contexts, [after.strip()] * 2, require_choice(row, "answer", 2, where, first=1)


def _clean(text: str) -> str:
    """HellaSwag's text without what WikiHow's markup left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


TASKS = {
    "hellaswag": ChoiceTask(_hellaswag, ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": ChoiceTask(_piqa, ("goal", "sol1", "sol2", "label")),
    "arc_easy": ChoiceTask(_arc, ("question", "choices")),
    "arc_challenge": ChoiceTask(_arc, ("question", "choices")),
    "openbookqa": ChoiceTask(_openbookqa, ("question", "choices")),
    "winogrande": ChoiceTask(_winogrande, ("sentence", "option1", "option2", "answer")),
}


def _detect(row: Fields, where: str) -> str:
    possible = [name for name, task in TASKS.items() if all(field in row for field in task.fields)]
    if len(possible) == 1:
        return possible[0]
    if possible:
        raise UserError(f"{where}: may be of {', '.join(possible)}; say which with task=NAME")
    known = "; ".join(f"{name}: {', '.join(task.fields)}" for name, task in TASKS.items())
    raise UserError(f"{where}: the fields {', '.join(map(repr, row)) or '(none)'} are of no known task; known: {known}")
