"""tools/evaluate_lighteval.py: the prompts of each task by hand; lighteval itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.cloze import TASKS, Cloze
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

NESTED = {"text": ["ice", "fire"], "label": ["A", "B"]}
BY_HAND: list[tuple[str, dict[str, Any], Cloze]] = [
    (
        "mmlu_cf",
        {"subject": "high_school_physics", "question": "Hot?", "choices": ["ice", "fire"], "answer": 1},
        Cloze("The following are questions about high school physics.\nQuestion: Hot?\nAnswer:", [" ice", " fire"], 1),
    ),
    (
        "arc_easy_cf",
        {"question": "Hot?", "choices": NESTED, "answerKey": "B"},
        Cloze("Question: Hot?\nAnswer:", [" ice", " fire"], 1),
    ),
    (
        "arc_challenge_cf",
        {"question": "Hot?", "choices": ["ice", "fire"], "gold": 1},
        Cloze("Question: Hot?\nAnswer:", [" ice", " fire"], 1),
    ),
    (
        "piqa_cf",
        {"goal": "Heat it", "sol1": "ice", "sol2": "fire", "label": 1},
        Cloze("Question: Heat it\nAnswer:", [" ice", " fire"], 1),
    ),
    (
        "hellaswag_cf",
        {
            "activity_label": "Rain",
            "ctx_a": "It [step] rains.",
            "ctx_b": "she",
            "endings": ["a [x] b", "c"],
            "label": "1",
        },
        Cloze("Rain: It rains. She ", [" a b", " c"], 1),
    ),
    (
        "openbookqa_cf",
        {"question_stem": "Fire is", "choices": NESTED, "answerKey": "B"},
        Cloze("Fire is", [" ice", " fire"], 1),
    ),
    (
        "openbookqa_cf",
        {"question": "Fire is", "choices": ["ice", "fire"], "gold": 1},
        Cloze("Fire is", [" ice", " fire"], 1),
    ),
    (
        "winogrande_cf",
        {"sentence": "He took _ and left.", "option1": "ice", "option2": "fire", "answer": "2"},
        Cloze("He took ", ["ice and left.", "fire and left."], 1),
    ),
    (
        "commonsense_qa_cf",
        {"question": "Hot?", "choices": NESTED, "answerKey": "A"},
        Cloze("Hot?", [" ice", " fire"], 0),
    ),
    (
        "triviaqa_em",
        {"question": "Hot?", "answer": {"aliases": ["Fire", "Blaze", "Fire!"]}},
        Cloze("Question: Hot?\nAnswer:", ["Blaze", "Fire"], 0),  # "Fire!" begins with another one
    ),
]


@pytest.mark.parametrize(("task", "row", "expected"), BY_HAND)
def test_prompts_by_hand(task: str, row: dict[str, Any], expected: Cloze) -> None:
    assert TASKS[task].ask(row, "here") == expected
    for field in row:
        with pytest.raises(UserError, match=r"^here.*(no '|field)"):
            TASKS[task].ask({key: value for key, value in row.items() if key != field}, "here")


def local(folder: Path, rows: list[dict[str, Any]], task: str = "piqa_cf") -> Path:
    file = folder / TASKS[task].folder / f"{TASKS[task].split}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


OTHER_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("piqa_cf", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}, "'label' is 2, not the number of a choice, 0"),
    ("piqa_cf", {"goal": 7, "sol1": "b", "sol2": "c", "label": 1}, "'goal' is a int, not a string"),
    (
        "winogrande_cf",
        {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "0"},
        "'answer' is '0', not the number of a choice, 1 to 2",
    ),
    ("arc_challenge_cf", {"question": "a", "choices": [1, 2], "gold": 1}, "'choices' is not a list of one string"),
    ("arc_easy_cf", {"question": "a", "choices": NESTED, "answerKey": 2}, "'answerKey' is a int, not a string"),
    ("arc_easy_cf", {"question": "a", "choices": {**NESTED, "text": ["b"]}, "answerKey": "B"}, "'answerKey' is 'B'"),
    ("triviaqa_em", {"question": "a", "answer": {"aliases": []}}, "answer: 'aliases' is not a list"),
]
"""A task, a row of another form after a good one, and what is said of it."""


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    data = local(tmp_path / "data", [{"goal": "a", "sol1": "b", "label": 0}])
    assert "tasks: unknown value 'piqa'; valid: mmlu_cf, arc_easy_cf" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa]"
    )
    assert "validation.jsonl, line 1: no 'sol2' field; it has: 'goal', 'sol1', 'label'" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa_cf]", f"data={data}"
    )
    assert "arc_easy: holds no test.jsonl[.gz], which arc_easy_cf needs" in refused(
        "evaluate_lighteval", model, out, "tasks=[arc_easy_cf]", f"data={data}"
    )
    assert "'label' is '', not the number of a choice" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa_cf]",
        f"data={local(tmp_path / 'more', [{'goal': 'a', 'sol1': 'b', 'sol2': 'c', 'label': ''}])}",
    )  # fmt: skip
    row: dict[str, Any]
    for number, (task, row, message) in enumerate(OTHER_ROWS):
        good = next(good for name, good, _ in BY_HAND if name == task)
        folder = local(tmp_path / f"other{number}", [good, row], task)
        found = refused("evaluate_lighteval", model, out, f"tasks=[{task}]", f"data={folder}")
        assert f".jsonl, line 2: {message}" in found, found
    assert "validation.jsonl: holds no rows" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa_cf]", f"data={local(tmp_path / 'empty', [])}"
    )
    assert "tasks: an empty list" in refused("evaluate_lighteval", model, out, "tasks=[]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert "lighteval is not installed: pip install" in refused("evaluate_lighteval", model, out, "tasks=[piqa_cf]")
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lighteval") is None, reason="lighteval (extra .[eval]) is missing")
def test_lighteval_agrees_with_evaluate_choices(tmp_path: Path) -> None:
    """The same rows through lighteval, item by item: PIQA's prompt is the same in both."""
    model = make_tokenizer(make_llama(tmp_path / "model"), unk_token="<unk>", pad_token="<eos>")
    rows = [
        {"goal": PROSE[i], "sol1": PROSE[(i + 1) % 6][:20], "sol2": PROSE[(i + 2) % 6][:30], "label": i % 2}
        for i in range(6)
    ]
    data = local(tmp_path / "data", rows)
    run_tool("evaluate_lighteval", model, tmp_path / "out", "tasks=[piqa_cf]", f"data={data}", "batch_size=8")
    output = f"output={tmp_path / 'choices.json'}"
    run_tool("evaluate_choices", model, data / "piqa" / "validation.jsonl", output)
    import pyarrow.parquet

    (file,) = (tmp_path / "out" / "details").glob("**/*.parquet")
    found = {int(row["doc"]["id"]): row["metric"] for row in pyarrow.parquet.read_table(file).to_pylist()}
    (expected,) = json.loads((tmp_path / "choices.json").read_text())["results"]
    assert [found[row]["acc"] for row in range(6)] == expected["right"]
    assert [found[row]["acc_norm"] for row in range(6)] == expected["right_norm"]
