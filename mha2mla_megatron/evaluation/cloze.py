"""Prompts of the benchmarks that the MHA2MLA paper reports, in the cloze formulation in which SmolLM was evaluated.

A row becomes a query and the continuations that are compared by likelihood; no letters, no examples. Rows have the
fields of the hub's data sets, or, for those with nested ones, flat ones: `choices` a list of texts with `gold` (the
right one's number), `question`, `answers`.

Source: text/evaluation/tasks.py of github.com/huggingface/smollm and the prompts of lighteval 0.6 that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.rows import require_choice, require_choices, require_text, require_texts

Fields = dict[str, Any]


class Cloze(NamedTuple):
    """One row as it is asked."""

    query: str

    choices: list[str]
    """With the space before them, where there is one. For TriviaQA the right answers, all of them."""

    gold: int


class ClozeTask(NamedTuple):
    """A benchmark: where its rows are and how one is asked."""

    ask: Callable[[Fields, str], Cloze]
    """Row and its place, for messages. Raises UserError naming the field that is missing."""

    repo: str
    subset: str | None
    split: str

    folder: str
    """Below a folder of local data."""

    examples: str = "train"
    """The hub's split that few-shot examples come from; of local data it is `train` always, for the datasets library
    takes a file called dev for a part of `validation`."""

    generates: bool = False
    """Whether an answer is generated and compared, instead of choices by likelihood."""


def _hellaswag(row: Fields, where: str) -> Cloze:
    label, a, b = (require_text(row, field, where) for field in ("activity_label", "ctx_a", "ctx_b"))
    # The query ends with a space and the endings begin with one: so it was for SmolLM.
    query = _without_brackets(f"{label}: {a} {b.capitalize()} ")
    endings = [f" {_without_brackets(ending)}" for ending in require_texts(row, "endings", where)]
    return Cloze(query, endings, require_choice(row, "label", len(endings), where))


def _piqa(row: Fields, where: str) -> Cloze:
    goal, first, second = (require_text(row, field, where) for field in ("goal", "sol1", "sol2"))
    return Cloze(f"Question: {goal}\nAnswer:", [f" {first}", f" {second}"], require_choice(row, "label", 2, where))


def _arc(row: Fields, where: str) -> Cloze:
    return Cloze(f"Question: {require_text(row, 'question', where)}\nAnswer:", *_choices(row, where))


def _openbookqa(row: Fields, where: str) -> Cloze:
    question = require_text(row, "question_stem" if "question_stem" in row else "question", where)
    return Cloze(question, *_choices(row, where))


def _commonsense_qa(row: Fields, where: str) -> Cloze:
    return Cloze(require_text(row, "question", where), *_choices(row, where))


def _winogrande(row: Fields, where: str) -> Cloze:
    before, gap, after = require_text(row, "sentence", where).partition("_")
    if not gap:
        raise UserError(f"{where}: 'sentence' has no gap (_)")
    options = (require_text(row, field, where) for field in ("option1", "option2"))
    choices = [f"{option} {after.strip()}" for option in options]
    return Cloze(before, choices, require_choice(row, "answer", len(choices), where, first=1))


def _mmlu(row: Fields, where: str) -> Cloze:
    subject = require_text(row, "subject", where).replace("_", " ")
    query = f"The following are questions about {subject}.\nQuestion: {require_text(row, 'question', where)}\nAnswer:"
    choices = [f" {text}" for text in require_texts(row, "choices", where)]
    return Cloze(query, choices, require_choice(row, "answer", len(choices), where))


def _triviaqa(row: Fields, where: str) -> Cloze:
    nested = row.get("answer")
    if isinstance(nested, dict):
        answers = require_texts(nested, "aliases", f"{where}: answer")
    else:
        answers = require_texts(row, "answers", where)
    kept: list[str] = []
    for answer in sorted(answers):  # as there: an alias that begins with another one does not count
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    return Cloze(f"Question: {require_text(row, 'question', where)}\nAnswer:", kept, 0)


def _choices(row: Fields, where: str) -> tuple[list[str], int]:
    texts, gold = require_choices(row, where)
    return [f" {text}" for text in texts], gold


def _without_brackets(text: str) -> str:
    """Without what WikiHow's markup left in it; spaces at the ends stay."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


TASKS = {
    "mmlu_cf": ClozeTask(_mmlu, "cais/mmlu", "all", "test", "mmlu", examples="dev"),
    "arc_easy_cf": ClozeTask(_arc, "allenai/ai2_arc", "ARC-Easy", "test", "arc_easy"),
    "arc_challenge_cf": ClozeTask(_arc, "allenai/ai2_arc", "ARC-Challenge", "test", "arc_challenge"),
    "piqa_cf": ClozeTask(_piqa, "ybisk/piqa", "plain_text", "validation", "piqa"),
    "hellaswag_cf": ClozeTask(_hellaswag, "Rowan/hellaswag", "default", "validation", "hellaswag"),
    "openbookqa_cf": ClozeTask(_openbookqa, "allenai/openbookqa", "main", "test", "openbookqa"),
    "winogrande_cf": ClozeTask(_winogrande, "allenai/winogrande", "winogrande_xl", "validation", "winogrande"),
    "commonsense_qa_cf": ClozeTask(_commonsense_qa, "tau/commonsense_qa", "default", "validation", "commonsense_qa"),
    "triviaqa_em": ClozeTask(
        _triviaqa, "mandarjoshi/trivia_qa", "rc.nocontext", "validation", "triviaqa", generates=True
    ),
}
