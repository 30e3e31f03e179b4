"""tools/evaluate_lighteval.py: the prompts of each task by hand; lighteval itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.cloze import TASKS, Cloze
from tests.conftest import PROSE, ROOT, children, make_llama, make_pair, make_tokenizer, refused, run_tool

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


PIQA_ROW = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}


def local(folder: Path, rows: list[dict[str, Any]], task: str = "piqa_cf", split: str | None = None) -> Path:
    """split: None for the one that is evaluated."""
    file = folder / TASKS[task].folder / f"{split or TASKS[task].split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
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
    train = "piqa: holds no train.jsonl[.gz], which piqa_cf takes its examples from (num_fewshot)"
    good = local(tmp_path / "good", [PIQA_ROW])
    assert train in refused("evaluate_lighteval", model, out, "tasks=[piqa_cf]", f"data={good}", "num_fewshot=1")
    local(good, [{"goal": "a", "sol1": "b", "label": 0}], split="train")
    assert "train.jsonl, line 1: no 'sol2' field" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa_cf]", f"data={good}", "num_fewshot=1"
    )
    local(good, [PIQA_ROW] * 2, split="train")
    assert "piqa: train holds 2 rows; num_fewshot=3 takes 3 of them" in refused(
        "evaluate_lighteval", model, out, "tasks=[piqa_cf]", f"data={good}", "num_fewshot=3"
    )
    assert "max_length: 129 tokens are more than its max_position_embeddings 128" in refused(
        "evaluate_lighteval", model, out, "max_length=129"
    )
    for word in ("max_length=1", "num_fewshot=-1", "processes=0"):
        assert f"{word.partition('=')[0]}: {word.partition('=')[2]} is too small" in refused(
            "evaluate_lighteval", model, out, word
        )
    assert "tasks is a list, given as tasks=[piqa_cf]" in refused("evaluate_lighteval", model, out, "tasks=piqa_cf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert "lighteval is not installed: pip install" in refused("evaluate_lighteval", model, out, "tasks=[piqa_cf]")
    assert not out.exists()


RECORDER = """
import json, os, sys, yaml
rank = os.environ.get("RANK", "0")
with open(sys.argv[2]) as file:
    found = yaml.safe_load(file)["model_parameters"]
with open(f"seen{rank}.json", "w") as file:
    environment = {key: os.environ.get(key) for key in ("PYTHONHASHSEED", "MHA2MLA_EVAL_DATA", "WORLD_SIZE")}
    json.dump({"words": sys.argv[1:], "model": found, "environment": environment}, file)
sys.exit(int(found["batch_size"] == 3))
"""
"""In the place of lighteval: writes down what it is given; fails if the batch size is 3."""


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "lighteval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(package.parent)
    path = os.pathsep.join(filter(None, (str(package.parent), str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


several_processes = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: each process needs its own")


@several_processes
@pytest.mark.usefixtures("recorder")
def test_what_lighteval_is_told(tmp_path: Path) -> None:
    """Few-shot numbers, lengths, one file for each process; what the cache takes is written beside the results."""
    original, mla = make_pair(tmp_path)
    data = local(local(tmp_path / "data", [PIQA_ROW]), [PIQA_ROW], split="train")
    words = ["tasks=[piqa_cf]", f"data={data}"]

    def seen(out: Path, rank: int = 0) -> dict[str, Any]:
        return json.loads((out / f"seen{rank}.json").read_text())

    out = tmp_path / "one"
    run_tool("evaluate_lighteval", original, out, *words, "max_samples=7")
    found = seen(out)
    assert found["words"][:3] == ["accelerate", str(out / "model.yaml"), "piqa_cf|0"]
    assert found["words"][-2:] == ["--max-samples", "7"] and found["environment"]["MHA2MLA_EVAL_DATA"] == str(data)
    assert found["model"]["max_length"] == 128 and (out / found["model"]["model_name"]).samefile(original)

    # Answers are kept under model and rows: neither other examples nor another model find those.
    kept = [found["model"]["cache_dir"]]
    local(data, [PIQA_ROW] * 2, split="train")
    for model, more in ((mla, []), (original, []), (original, ["num_fewshot=1"])):
        run_tool("evaluate_lighteval", model, out, *words, *more)
        kept.append(seen(out)["model"]["cache_dir"])
    assert kept[0] == kept[2] and len(set(kept)) == 3

    long = make_llama(tmp_path / "long", max_position_embeddings=4096)
    run_tool("evaluate_lighteval", long, tmp_path / "long_out", *words, "num_fewshot=2", "dtype=bfloat16")
    found = seen(tmp_path / "long_out")
    assert found["model"]["max_length"] == 2048 and found["words"][2] == "piqa_cf|2"
    run_tool("evaluate_lighteval", long, tmp_path / "long_out", *words, "max_length=4096")
    assert seen(tmp_path / "long_out")["model"]["max_length"] == 4096

    two = tmp_path / "two"
    run_tool("evaluate_lighteval", mla, two, *words, "processes=2", "max_length=100")
    first, second = seen(two, 0), seen(two, 1)
    for rank, one in enumerate((first, second)):
        assert one["words"][1] == str(two / "processes" / f"{rank}.yaml") and one["model"]["max_length"] == 100
        assert one["environment"]["WORLD_SIZE"] == "2" and one["environment"]["PYTHONHASHSEED"] == "0"
    assert first["words"][2:] == second["words"][2:]
    assert first["words"][2] == "piqa_cf|0" and first["words"][-3:] == ["--output-dir", str(two), "--save-details"]
    assert first["model"]["cache_dir"] != second["model"]["cache_dir"]

    # float32 and bfloat16: 3 layers of 2 groups of keys and values of 16; of 8 rotated dims a group and 20 latents.
    costs = {out: 3 * 64 * 4, tmp_path / "long_out": 3 * 64 * 4, two: 3 * (2 * 8 + 20) * 4}
    for folder, cost in costs.items():
        assert json.loads((folder / "cost.json").read_text()) == {"cache_bytes_per_token": cost}
    run_tool("evaluate_lighteval", original, tmp_path / "half", *words, "dtype=bfloat16")
    assert json.loads((tmp_path / "half" / "cost.json").read_text()) == {"cache_bytes_per_token": 3 * 64 * 2}
    bad = tmp_path / "bad"
    assert "lighteval ended with exit code 1" in refused("evaluate_lighteval", original, bad, *words, "batch_size=3")
    assert not (bad / "cost.json").exists()


@pytest.mark.usefixtures("recorder")
def test_lighteval_ends_with_the_tool(tmp_path: Path) -> None:
    """A scheduler tells one process to end; the other must not keep the GPU."""
    (tmp_path / "packages" / "lighteval" / "__main__.py").write_text("import time; time.sleep(600)")
    data, model = local(tmp_path / "data", [PIQA_ROW]), make_llama(tmp_path / "model")
    command = [sys.executable, str(ROOT / "tools" / "evaluate_lighteval.py"), str(model), str(tmp_path / "out")]
    tool = subprocess.Popen([*command, "tasks=[piqa_cf]", f"data={data}"], cwd=ROOT)
    end = time.monotonic() + 60
    while not (found := children(tool.pid, "lighteval")):
        assert tool.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    tool.terminate()
    assert tool.wait(60) == -signal.SIGTERM
    assert not Path(f"/proc/{found[0]}").exists()


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


def rows_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, number of the row) -> what lighteval's details say of it."""
    import pyarrow.parquet

    return {
        (file.name.split("|")[0].removeprefix("details_"), row["doc"]["id"]): row
        for file in (out / "details").glob("**/*.parquet")
        for row in pyarrow.parquet.read_table(file).to_pylist()
    }


@pytest.mark.slow
@several_processes
@pytest.mark.skipif(importlib.util.find_spec("lighteval") is None, reason="lighteval (extra .[eval]) is missing")
def test_processes_share_the_questions(tmp_path: Path) -> None:
    """Two tasks of the same rows, so that many prompts are of one length: two processes give the scores of one, row by
    row, with two examples from the train split before each question."""
    model = make_tokenizer(make_llama(tmp_path / "model"), unk_token="<unk>", pad_token="<eos>")
    data, examples = tmp_path / "data", []
    for task in ("arc_easy_cf", "arc_challenge_cf"):
        rows = [{"question": PROSE[i % 6][: 20 + i % 3], "choices": ["ice", "fire"], "gold": i % 2} for i in range(9)]
        examples = [{"question": f"Example {i}", "choices": ["tea", "ash"], "gold": i % 2} for i in range(4)]
        local(local(data, rows, task), examples, task, split="train")
    words = ["tasks=[arc_easy_cf,arc_challenge_cf]", f"data={data}", "num_fewshot=2"]
    for count in (1, 2):
        run_tool("evaluate_lighteval", model, tmp_path / f"{count}", *words, f"processes={count}")
    one, two = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(one) == 18 and one.keys() == two.keys()
    for place, row in one.items():
        for each in (row, two[place]):
            shown = [sample["query"] for sample in each["doc"]["fewshot_samples"]]
            assert len(shown) == 2 and all(query.startswith("Question: Example") for query in shown)
        assert row["metric"] == two[place]["metric"]
        assert row["model_response"]["logprobs"] == pytest.approx(two[place]["model_response"]["logprobs"], rel=1e-5)
