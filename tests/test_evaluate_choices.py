"""tools/evaluate_choices.py: the scores of one choice at a time through plain transformers."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.evaluation.choice_questions import read_questions
from mha2mla_megatron.evaluation.choices import Pair, log_likelihoods
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"

HELLASWAG: list[dict[str, Any]] = [
    {
        "activity_label": label,
        "ctx_a": a,
        "ctx_b": b,
        "ctx": f"{a} {b}",
        "endings": [ends[(row + shift) % 4] for shift in range(4)],
        "label": str(row % 4) if row % 2 else row % 4,
    }
    for row, (label, a, b, ends) in enumerate(
        (label, a, b, ["counted the bridges  twice.", "said less.", "held a row [step] of small lamps.", "fell in May"])
        for label in ("Rain", "Maps and makers")
        for a in (PROSE[0], "The tide [header] A good map [title] The last train [step]")
        for b in ("she", "", "the Lamps")
    )
]
PIQA: list[dict[str, Any]] = [
    {"goal": goal, "sol1": first, "sol2": second, "label": row % 2}
    for row, (goal, first, second) in enumerate(
        (goal, first, second)
        for goal in ("How to count bridges?", PROSE[2], "a lamp ")
        for first, second in (("over the canal", "over nothing. "), ("x", "in the morning every branch"))
    )
]

CHOICES: list[dict[str, Any]] = [
    {"question": question, "choices": choices, "gold": row % 3}
    for row, (question, choices) in enumerate(
        (question, choices)
        for question in ("What falls on the orchard?", PROSE[3], "A good map says ")
        for choices in (
            ["rain", "a row of lamps", "nothing at all. "],
            ["seven", "five over the canal", "the last train"],
        )
    )
]
WINOGRANDE: list[dict[str, Any]] = [
    {"sentence": sentence, "option1": "the harbour", "option2": "a lamp", "answer": str(row % 2 + 1)}
    for row, sentence in enumerate(
        ("The wind left _ open to the rain.", "She counted _, for it was lit.", "Nobody knew _ 's figures. ", "_ fell.")
    )
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "original"))


def write(file: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def reference(
    folder: Path, questions: list[tuple[str | list[str], list[str], int]], bos: bool = False
) -> tuple[float, float]:
    """(acc, acc_norm), one choice at a time, each after the context or after one of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    right = torch.zeros(2)
    for contexts, choices, gold in questions:
        sums = []
        each = [contexts] * len(choices) if isinstance(contexts, str) else contexts
        for context, choice in zip(each, choices, strict=True):
            ids = [1] * bos + tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
            start = len(ids)
            ids += tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"][start - bos :]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        per_character = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right += torch.tensor([sums.index(max(sums)) == gold, per_character.index(max(per_character)) == gold])
    return right[0].item() / len(questions), right[1].item() / len(questions)


def evaluate(tmp_path: Path, *words: object) -> tuple[dict[str, Any], str]:
    done = run_tool("evaluate_choices", *words, f"output={tmp_path / 'out.json'}")
    return json.loads((tmp_path / "out.json").read_text()), done.stdout


def test_hellaswag_prompts(tmp_path: Path) -> None:
    task, questions = read_questions(write(tmp_path / "h.jsonl", HELLASWAG))
    assert task == "hellaswag" and [question.gold for question in questions] == [row % 4 for row in range(12)]
    assert questions[0].contexts == 4 * [f"Rain: {PROSE[0].strip()} She"]
    assert questions[4].contexts[0] == "Rain: The tide A good map. The last train "  # brackets leave their spaces
    assert questions[5].contexts[0] == "Rain: The tide A good map. The last train The lamps"
    assert questions[0].choices == [
        "counted the bridges twice.", "said less.", "held a row of small lamps.", "fell in May"
    ]  # fmt: skip


def test_hellaswag_scores(tmp_path: Path, model: Path) -> None:
    """The original and a converted model; batches of one, of a few and of all."""
    run_tool("convert_mha_to_mla", model, tmp_path / "mla", "low_rank.kv_lora_rank=12", "partial_rope.strategy=uniform")
    file = write(tmp_path / "h.jsonl", HELLASWAG)
    questions = [(q.contexts[0], q.choices, q.gold) for q in read_questions(file)[1]]
    tables = []
    for batch in (1, 150, 100_000):
        report, table = evaluate(tmp_path, model, tmp_path / "mla", file, f"batch_tokens={batch}")
        tables.append(table)
        for folder, result in zip((model, tmp_path / "mla"), report["results"], strict=True):
            assert (result["acc"], result["acc_norm"]) == pytest.approx(reference(folder, questions))
    assert len(set(tables)) == 1
    original, mla = report["results"]
    assert report["task"] == original["task"] == "hellaswag" and report["rows"] == mla["rows"] == 12
    assert original["acc_standard_error"] == pytest.approx((original["acc"] * (1 - original["acc"]) / 11) ** 0.5)
    assert original["cache_bytes_per_token"] == 768 and mla["cache_bytes_per_token"] == 3 * (2 * 2 + 12) * 4
    assert tables[0].split("\n")[0].split()[:4] == ["model", "task", "rows", "acc"]


def test_log_likelihoods(model: Path) -> None:
    """Padded batches, in any order of lengths, give each pair its own number."""
    random = torch.Generator().manual_seed(3)
    lengths = [(9, 1), (30, 29), (17, 4), (30, 3), (2, 1), (9, 8)]
    pairs = [Pair(torch.randint(256, (n,), generator=random).tolist(), predicted) for n, predicted in lengths]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    expected = []
    for ids, predicted in pairs:
        with torch.no_grad():
            log_p = loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - predicted, len(ids))))
    for batch_tokens in (1, 60, 1000):
        assert log_likelihoods(loaded, pairs, batch_tokens).tolist() == pytest.approx(expected, rel=1e-5)


def test_piqa(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "p.jsonl.gz", PIQA)
    questions = [(f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]) for r in PIQA]
    (result,) = evaluate(tmp_path, model, file)[0]["results"]
    assert (result["acc"], result["acc_norm"]) == pytest.approx(reference(model, questions))
    (result,) = evaluate(tmp_path, model, file, "max_rows=3", "bos=true", "batch_tokens=200")[0]["results"]
    assert result["rows"] == 3 and result["task"] == "piqa"
    assert (result["acc"], result["acc_norm"]) == pytest.approx(reference(model, questions[:3], bos=True))
    (result,) = evaluate(tmp_path, model, file, "max_rows=1", "dtype=bfloat16", "device=cpu")[0]["results"]
    assert result["acc_standard_error"] is None and result["dtype"] == "bfloat16"


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "hub"])
def test_arc_and_openbookqa(tmp_path: Path, model: Path, nested: bool) -> None:
    """The hub's fields and flat ones; OpenBookQA's question stands alone."""
    rows = CHOICES
    if nested:
        labels = ["A", "B", "C"]
        rows = [
            {
                "question": r["question"],
                "choices": {"text": r["choices"], "label": labels},
                "answerKey": labels[r["gold"]],
            }
            for r in CHOICES
        ]
    file = write(tmp_path / "rows.jsonl", rows)
    for task, form in {"arc_easy": "Question: {}\nAnswer:", "openbookqa": "{}"}.items():
        (result,) = evaluate(tmp_path, model, file, f"task={task}")[0]["results"]
        questions = [(form.format(r["question"]), r["choices"], r["gold"]) for r in CHOICES]
        assert result["task"] == task
        assert (result["acc"], result["acc_norm"]) == pytest.approx(reference(model, questions))
    if nested:
        stems = write(tmp_path / "stems.jsonl", [{**r, "question_stem": r["question"]} for r in rows])
        assert evaluate(tmp_path, model, stems, "task=openbookqa")[0]["results"] == [result]


def test_winogrande(tmp_path: Path, model: Path) -> None:
    """What follows the gap, after each of the options."""
    (result,) = evaluate(tmp_path, model, write(tmp_path / "w.jsonl", WINOGRANDE))[0]["results"]
    questions = [
        (
            [r["sentence"][:gap] + r[key] for key in ("option1", "option2")],
            [r["sentence"][gap + 1 :].strip()] * 2,
            row % 2,
        )
        for row, r in enumerate(WINOGRANDE)
        for gap in [r["sentence"].index("_")]
    ]
    assert result["task"] == "winogrande" and result["acc"] == result["acc_norm"]
    assert (result["acc"], result["acc_norm"]) == pytest.approx(reference(model, questions))


def test_refusals(tmp_path: Path, model: Path) -> None:
    def line(rows: list[Any], *words: object, folder: Path = model) -> str:
        output = f"output={tmp_path / 'out.json'}"
        return refused("evaluate_choices", folder, write(tmp_path / "x.jsonl", rows), output, *words)

    assert "line 1: the fields 'text', 'id' are of no known task; known: hellaswag: activity_label, ctx_a" in line(
        [{"text": "a", "id": 3}]
    )
    assert "line 2: no 'sol2' field; it has: 'goal', 'sol1', 'label'" in line(
        [PIQA[0], {key: value for key, value in PIQA[1].items() if key != "sol2"}]
    )
    assert "line 1: 'label' is '2', not the number of a choice, 0 to 1" in line([{**PIQA[0], "label": "2"}])
    assert "'label' is '', not the number of a choice, 0 to 3" in line([{**HELLASWAG[0], "label": ""}])
    assert "'label' is True" in line([{**PIQA[0], "label": True}])
    assert "'goal' is a int, not a string" in line([{**PIQA[0], "goal": 3}])
    assert "'endings' is not a list of one string or more" in line([{**HELLASWAG[0], "endings": "abc"}])
    assert "line 1: one choice only" in line([{**HELLASWAG[0], "endings": ["a"], "label": 0}])
    assert "line 1: may be of arc_easy, arc_challenge, openbookqa; say which with task=NAME" in line(CHOICES)
    assert "line 1: no 'goal' field; it has: 'question', 'choices', 'gold'" in line(CHOICES, "task=piqa")
    assert "'gold' is 3, not the number of a choice, 0 to 2" in line([{**CHOICES[0], "gold": 3}], "task=arc_easy")
    assert "'sentence' has no gap (_)" in line([{**WINOGRANDE[0], "sentence": "a b"}])
    assert "a choice without text" in line([{**WINOGRANDE[0], "sentence": "a _"}])
    assert "'answer' is '3', not the number of a choice, 1 to 2" in line([{**WINOGRANDE[0], "answer": "3"}])
    assert "task: unknown value 'arc'; valid: hellaswag, piqa, arc_easy" in line(CHOICES, "task=arc")
    assert "a choice without text" in line([{**HELLASWAG[0], "endings": ["[step]", "b", "c", "d"]}])
    assert "line 1: a JSON list, not an object" in line([[1]])
    assert "holds no rows" in line([])
    assert "line 1: not valid JSON" in line([{**PIQA[0], "goal": "\ud800"}])
    assert "max_rows: 0 is too small" in line(PIQA, "max_rows=0")
    assert "tokens are more than the model's max_position_embeddings 128" in line([{**PIQA[0], "goal": PROSE[0] * 9}])
    narrow = make_tokenizer(make_llama(tmp_path / "narrow", vocab_size=100))
    assert "beyond the model's vocabulary 100" in line(PIQA, folder=narrow)
    (tmp_path / "bad.jsonl").write_text("{]\n")
    assert "bad.jsonl, line 1: not valid JSON" in refused("evaluate_choices", model, tmp_path / "bad.jsonl")
    assert "no such file" in refused("evaluate_choices", model, tmp_path / "none.jsonl")
    assert "the name must end in .jsonl" in refused("evaluate_choices", model, tmp_path / "none.txt")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the optional evaluation data (../shared/data/eval) is not there")
@pytest.mark.parametrize(
    ("task", "split", "rows"),
    [
        ("hellaswag", "validation", 10042), ("piqa", "validation", 1838), ("arc_easy", "test", 2376),
        ("arc_challenge", "test", 1172), ("openbookqa", "test", 500), ("winogrande", "validation", 1267),
    ],
)  # fmt: skip
def test_the_real_files_are_read(task: str, split: str, rows: int) -> None:
    told = None if task in ("hellaswag", "piqa", "winogrande") else task
    found, questions = read_questions(DATA / task / f"{split}.jsonl.gz", told)
    assert found == task and len(questions) == rows


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval (pip install lm-eval) is missing")
@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("hellaswag", HELLASWAG), ("piqa", PIQA), ("arc_easy", CHOICES), ("arc_challenge", CHOICES),
        ("openbookqa", CHOICES), ("winogrande", WINOGRANDE),
    ],
)  # fmt: skip
def test_rows_are_those_of_lm_evaluation_harness(
    tmp_path: Path, model: Path, task: str, rows: list[dict[str, Any]]
) -> None:
    done = run_tool(
        "benchmarks/choices", model, write(tmp_path / "rows.jsonl", rows), f"task={task}", "lighteval=false"
    )
    assert f"{len(rows)} rows of {task}: acc" in done.stdout and "of each as in lm-eval" in done.stdout


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_comparison_without_lm_evaluation_harness(tmp_path: Path, model: Path) -> None:
    assert "lm_eval is not installed" in refused("benchmarks/choices", model, write(tmp_path / "p.jsonl", PIQA))
