"""tools/evaluate_longbench.py: prompts and scores by hand, generation by a plain loop, runs that stop and go on."""

from __future__ import annotations

import gzip
import importlib.util
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.longbench.metrics import METRICS
from mha2mla_megatron.evaluation.longbench.samples import encode_prompt, read_tasks
from mha2mla_megatron.evaluation.longbench.scores import AVERAGES, score
from mha2mla_megatron.evaluation.longbench.tasks import TASKS
from mha2mla_megatron.evaluation.means import Mean, weighted
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "longbench_full_tasks"
needs_jieba = pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="jieba (extra .[eval]) is missing")


def row(number: int, answers: list[str], classes: list[str] | None = None) -> dict[str, Any]:
    return {
        "context": "".join(PROSE[(number + shift) % 6] for shift in range(3 + 2 * (number % 3))),
        "input": PROSE[number % 6][:30],
        "answers": answers,
        "all_classes": classes,
        "length": 7 * number,
        "_id": f"id{number}",
    }


ROWS = {
    "hotpotqa": [row(number, [PROSE[number % 6][:24], "lamps"]) for number in range(5)],
    "trec": [row(number, ["City" if number % 2 else "Date"], ["City", "Date", "Food"]) for number in range(2)],
    "samsum": [row(number, [PROSE[number]]) for number in range(1)],
    "passage_retrieval_en": [row(number, [f"Paragraph {number}"]) for number in range(1)],
}


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (task, found) in enumerate(rows.items()):
        text = "".join(json.dumps(one) + "\n" for one in found)
        if number % 2:
            (folder / f"{task}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{task}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    return make_tokenizer(
        make_llama(folder, max_position_embeddings=512), chat_template="{{ messages[0].content }}lamps"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "longbench", ROWS)


def prompt_ids(folder: Path, task: str, one: dict[str, Any], max_tokens: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TASKS[task].prompt.replace("{context}", one["context"]).replace("{input}", one["input"])
    ids = tokenizer(text)["input_ids"]
    if len(ids) > max_tokens:
        half = max_tokens // 2
        halves = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        ids = tokenizer("".join(halves))["input_ids"]
    return ids


def continuation(folder: Path, task: str, one: dict[str, Any], max_tokens: int) -> str:
    """One token at a time, without a cache."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ends = [2, tokenizer("\n")["input_ids"][-1]] if task == "samsum" else [2]
    ids = prompt_ids(folder, task, one, max_tokens)
    start = len(ids)
    while len(ids) - start < TASKS[task].max_new_tokens and (len(ids) == start or ids[-1] not in ends):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if task == "samsum" and len(ids) == start:
            logits[ends] = -torch.inf
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def predictions(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()]


def test_predictions_are_those_of_a_plain_loop(tmp_path: Path, model: Path, data: Path) -> None:
    """All samples, one at a time and in batches of three with padding; the fields that the authors' eval.py reads."""
    words = [model, data]
    done = run_tool("evaluate_longbench", *words, tmp_path / "one", "max_tokens=60")
    run_tool("evaluate_longbench", *words, tmp_path / "three", "max_tokens=60", "batch_size=3")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert list(results["tasks"]) == [task for task in TASKS if task in ROWS]
    for task, rows in ROWS.items():
        found = predictions(tmp_path / "one", task)
        assert found == predictions(tmp_path / "three", task), task
        assert [line["pred"] for line in found] == [continuation(model, task, one, 60) for one in rows]
        assert [(line["answers"], line["all_classes"], line["length"], line["_id"]) for line in found] == [
            (one["answers"], one["all_classes"], one["length"], one["_id"]) for one in rows
        ]
        entry, texts = results["tasks"][task], [line["pred"] for line in found]
        scores = [score(TASKS[task], text, r["answers"], r["all_classes"] or [], "") for text, r in zip(texts, rows)]  # noqa: B905
        assert entry["scores"] == scores and entry["score"] == pytest.approx(sum(scores) / len(scores))
    assert all(line["pred"] for line in predictions(tmp_path / "one", "samsum"))
    # One task of the group is there, so no average is.
    assert results["averages"] == {}
    assert "| Few-shot learning | trec | classification | 2 | " in done.stdout
    assert (tmp_path / "one" / "results.md").read_text() == done.stdout


def test_an_interrupted_run_goes_on(tmp_path: Path, model: Path, data: Path) -> None:
    """Lines that are there are kept, not made again; half a line is; a rerun with everything there runs no model."""
    out, words = tmp_path / "out", [model, data]
    run_tool("evaluate_longbench", *words, out, "max_tokens=60", "tasks=[hotpotqa]", "max_samples=3")
    journal = out / "journal" / "0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    kept = json.loads(lines[0])
    marked = json.dumps({**kept, "pred": "kept from before"}).encode() + b"\n"
    journal.write_bytes(marked + lines[1][:20])
    run_tool("evaluate_longbench", *words, out, "max_tokens=60", "batch_size=2")
    whole = tmp_path / "whole"
    run_tool("evaluate_longbench", *words, whole, "max_tokens=60", "batch_size=2")
    for task in ROWS:
        expected = predictions(whole, task)
        if task == "hotpotqa":
            expected[kept["index"]]["pred"] = "kept from before"
        assert predictions(out, task) == expected
    assert len(journal.read_bytes().splitlines()) == sum(map(len, ROWS.values()))
    before = journal.read_bytes()
    done = run_tool("evaluate_longbench", *words, out, "max_tokens=60", "tasks=[trec]", "max_samples=1")
    assert journal.read_bytes() == before and "prompt tokens" not in done.stderr
    assert len(predictions(out, "trec")) == 1


def test_caches(tmp_path: Path, model: Path, data: Path) -> None:
    """Through a cache in full precision and one of 8 bits as through the default; 2 bits differ. Original and MLA."""
    mla = tmp_path / "mla"
    run_tool("convert_mha_to_mla", model, mla, "low_rank.kv_lora_rank=12", "partial_rope.strategy=uniform")
    texts = {}
    for cache in ("null", "full", "int2"):
        out, options = tmp_path / cache, "cache_options={residual_length: 0, group_size: 4}" if cache == "int2" else ""
        words = [
            word for word in ("tasks=[hotpotqa]", "max_samples=3", "max_tokens=60", "batch_size=2", options) if word
        ]
        run_tool("evaluate_longbench", mla, data, out, f"cache={cache}", *words)
        texts[cache] = [line["pred"] for line in predictions(out, "hotpotqa")]
    assert texts["null"] == texts["full"] != texts["int2"]
    assert "cache=int4: LatentQuantizedCache: config is not that of a model converted" in refused(
        "evaluate_longbench", model, data, tmp_path / "none", "cache=int4"
    )


def held_by_default(folder: Path, task: str, one: dict[str, Any]) -> tuple[int, int]:
    """(bytes, tokens) of keys and values after a prompt and all new tokens but the last, from one forward pass."""
    ids = prompt_ids(folder, task, one, 60)
    tokens = len(ids) + TASKS[task].max_new_tokens - 1
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.nbytes for part in parts), tokens


def test_cache_bytes(tmp_path: Path, data: Path) -> None:
    """Of an original, its conversion and 4 bits: in the journal as a forward pass of the same length leaves them."""
    # No token is the end, so that every answer is as long as its task allows.
    original = make_tokenizer(make_llama(tmp_path / "original", max_position_embeddings=512, eos_token_id=300))
    run_tool(
        "convert_mha_to_mla", original, tmp_path / "mla", "low_rank.kv_lora_rank=12", "partial_rope.strategy=uniform"
    )
    words = ["tasks=[hotpotqa,trec]", "max_tokens=60"]
    found = {}
    for name, more in {"original": [], "mla": [], "int4": ["cache=int4", "cache_options.residual_length=8"]}.items():
        folder, out = tmp_path / ("original" if name == "original" else "mla"), tmp_path / f"out_{name}"
        start = time.perf_counter()
        done = run_tool("evaluate_longbench", folder, data, out, *words, *more)
        took = time.perf_counter() - start
        results = json.loads((out / "results.json").read_text())
        lines = [json.loads(line) for line in (out / "journal" / "0.jsonl").read_text().splitlines()]
        held = {(line["task"], line["index"]): (line["cache_bytes"], line["cached_tokens"]) for line in lines}
        if name != "int4":
            assert held == {
                (task, index): held_by_default(folder, task, one)
                for task in ("hotpotqa", "trec")
                for index, one in enumerate(ROWS[task])
            }
        found[name] = results["cache_bytes_per_token"]
        assert found[name] == sum(b for b, _ in held.values()) / sum(t for _, t in held.values())
        own = [pair for (task, _), pair in held.items() if task == "trec"]
        assert results["tasks"]["trec"]["cache_bytes_per_token"] == sum(b for b, _ in own) / sum(t for _, t in own)
        rates = {entry["decode_tokens_per_second"] for entry in (results, *results["tasks"].values())}
        assert f"\n{found[name]:.6g} cache bytes/token, {results['decode_tokens_per_second']:.4g} " in done.stdout
        # One prompt at a time, and no end before the last token; the mean of the tasks' rates is between them.
        assert all(line["decoded_tokens"] == TASKS[line["task"]].max_new_tokens - 1 for line in lines)
        seconds = [line["decode_seconds"] for line in lines]
        assert results["decode_tokens_per_second"] == sum(line["decoded_tokens"] for line in lines) / sum(seconds)
        assert min(seconds) > 0 and sum(seconds) < took and len(rates) == 3
    # float32: 3 layers of 2 groups of keys and values of 16; of 2 rotated dims for each group and 12 latents.
    assert found["original"] == 3 * 2 * 2 * 16 * 4 and found["mla"] == 3 * (2 * 2 + 12) * 4
    assert found["int4"] < 0.7 * found["mla"]
    # In a batch, both answers' share is that of the longer prompt, to which the other is padded.
    run_tool("evaluate_longbench", original, data, tmp_path / "batch", "tasks=[trec]", "max_tokens=60", "batch_size=2")
    lines = [json.loads(line) for line in (tmp_path / "batch" / "journal" / "0.jsonl").read_text().splitlines()]
    longest = max(held_by_default(original, "trec", one) for one in ROWS["trec"])
    assert [(line["cache_bytes"], line["cached_tokens"]) for line in lines] == [longest] * 2


def test_logits_that_are_not_finite(tmp_path: Path, model: Path, data: Path) -> None:
    """A model that has diverged is refused, whichever of a batch's rows show it; it would score 0 otherwise."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.norm.weight[3] = torch.nan
    loaded.save_pretrained(tmp_path / "bad")
    make_tokenizer(tmp_path / "bad")
    words = ["max_tokens=60", "tasks=[samsum,trec]", "batch_size=2"]
    line = refused("evaluate_longbench", tmp_path / "bad", data, tmp_path / "out", *words)
    assert f"{tmp_path / 'bad'}: gives logits that are not finite, dtype torch.float32" in line
    assert not (tmp_path / "out" / "results.json").exists() and not (tmp_path / "out" / "journal").exists()


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tasks=[hotpotqa]", "max_tokens=60", "batch_size=4"]
    run_tool("evaluate_longbench", model, data, tmp_path / "good", *words)
    generate, largest = LlamaForCausalLM.generate, 1

    def small(self: Any, *, input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, input_ids=input_ids, **others)

    monkeypatch.setattr(LlamaForCausalLM, "generate", small)
    done = run_tool("evaluate_longbench", model, data, tmp_path / "small", *words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("out of memory")]
    assert [line.split()[4] for line in lines] == ["4", "2"] and lines[0].endswith("going on with 2 at a time")
    assert predictions(tmp_path / "small", "hotpotqa") == predictions(tmp_path / "good", "hotpotqa")
    largest = 0
    assert "out of memory with one prompt of" in refused("evaluate_longbench", model, data, tmp_path / "none", *words)


def test_chat_template_and_truncation(tmp_path: Path, model: Path) -> None:
    """Few-shot examples and code are not put into the template; a BOS that the tokenizer adds is not added twice."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = {found.task.name: found.samples[2 % len(found.samples)] for found in read_tasks(
        str(write(tmp_path, ROWS)), None, None)}  # fmt: skip
    for task in ROWS:
        plain = prompt_ids(model, task, ROWS[task][2 % len(ROWS[task])], 60)
        assert encode_prompt(tokenizer, TASKS[task], samples[task], 60, False) == plain
        chat = encode_prompt(tokenizer, TASKS[task], samples[task], 60, True)
        text = tokenizer.decode(plain)
        assert tokenizer.decode(chat) == (text if task in ("trec", "samsum") else f"{text}lamps")


def test_archive_and_hub(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' zip gives the samples of the folder, and the hub's data set is that zip."""
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--someone--LongBench" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    with zipfile.ZipFile(snapshot / "data.zip", "w") as archive:
        for task, rows in ROWS.items():
            archive.writestr(f"data/{task}.jsonl", "".join(json.dumps(one) + "\n" for one in rows))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = [(found.task, found.sha256, [s[:5] for s in found.samples]) for found in read_tasks(str(data), None, 2)]
    for source in (str(snapshot / "data.zip"), "someone/LongBench"):
        found = read_tasks(source, None, 2)
        assert [(one.task, one.sha256, [s[:5] for s in one.samples]) for one in found] == expected
    with pytest.raises(UserError, match=r"else/LongBench: neither a folder nor a hub data set with a data\.zip"):
        read_tasks("else/LongBench", None, None)


# A metric, prediction, answer and score, each worked out by hand.
BY_HAND: list[tuple[str, str, str, float]] = [
    ("qa_f1", "The Paris, of a France!", "paris", 2 * (1 / 3) * 1 / (4 / 3)),
    ("qa_f1", "lyon", "Paris", 0.0),
    ("qa_f1", "b b c", "b c c", 2 / 3),  # bags: b and c once each
    ("rouge_l", "a b c d", "a c d e", 0.75),
    ("rouge_l", "a b. c d", "c d a b", 1.0),  # the union over sentences
    ("rouge_l", "a a a b", "a b", 1.0),  # distinct words
    ("rouge_l", "...", "a", 0.0),
    ("rouge_l", "", "a", 0.0),
    ("count", "There are 3, or 4, or 3.", "3", 2 / 3),
    ("count", "none", "3", 0.0),
    ("retrieval", "Paragraph 12 (not 1)", "Paragraph 12", 0.5),
    ("retrieval_zh", "段落7", "段落7", 1.0),
    ("code_similarity", "\n```python\n# no\nx = 1\ny = 2", "x = 1", 1.0),
    ("code_similarity", "abcd", "abxd", 0.75),
    ("code_similarity", "// only a comment", "x", 0.0),
]


@pytest.mark.parametrize(("metric", "prediction", "answer", "expected"), BY_HAND)
def test_metrics_by_hand(metric: str, prediction: str, answer: str, expected: float) -> None:
    assert METRICS[metric](prediction, answer) == pytest.approx(expected, abs=1e-7)


def test_classification_by_hand() -> None:
    classes = ["City", "State", "Other City", "Country"]
    named = METRICS["classification"]
    assert named("It is a State", "State", classes) == 1.0
    assert named("City or State", "State", classes) == 0.5
    assert named("Food", "State", classes) == 0.0
    assert named("Other City", "Other City", classes) == 1.0  # "City", a part of the answer, does not count against it
    # "City" is removed, and then the walk skips "Other", which is a part of the answer too.
    assert named("Other City", "Other City", ["City", "Other", "Other City"]) == 0.5


@needs_jieba
def test_chinese_metrics_by_hand() -> None:
    assert METRICS["qa_f1_zh"]("厦门大学", "厦门大学。") == 1.0
    assert METRICS["qa_f1_zh"]("北京大学", "厦门大学") == 0.0
    # jieba: 我 / 来到 / 北京 / 清华大学, and 我 / 去 / 北京 / 清华大学
    assert METRICS["rouge_l_zh"]("我来到北京清华大学", "我去北京清华大学") == pytest.approx(0.75, abs=1e-7)


def test_first_lines_and_averages() -> None:
    assert score(TASKS["triviaqa"], "\n\nParis\nLyon", ["x", "Paris"], [], "") == 100
    assert score(TASKS["hotpotqa"], "Paris\nLyon", ["Paris"], [], "") == pytest.approx(200 / 3)
    means = {task: Mean(float(number), 1.0) for number, task in enumerate(TASKS)}
    # narrativeqa, qasper, multifieldqa_en are 0, 1, 2 of the table.
    assert weighted(means, AVERAGES["Single-document QA (en)"]) == pytest.approx((1.0, 3**-0.5))
    assert weighted(means, AVERAGES["Code completion (zh)"]) == pytest.approx((19.5, 2**-0.5))
    groups = [1.0, 5.0, 9.0, 13.0, 16.5, 19.5]
    average = weighted(means, AVERAGES["Average of groups (en)"])
    assert average is not None and average.value == pytest.approx(sum(groups) / 6)
    english = [number for number, task in enumerate(TASKS.values()) if "en" in task.languages]
    average = weighted(means, AVERAGES["Average of 16 tasks (en)"])
    assert average is not None and average.value == pytest.approx(sum(english) / 16)
    assert weighted({"lcc": Mean(1.0, None)}, AVERAGES["Code completion (en)"]) is None


def test_refusals(tmp_path: Path, model: Path, data: Path) -> None:
    def line(*words: object, rows: dict[str, list[Any]] | None = None, folder: Path = model) -> str:
        source = data if rows is None else write(tmp_path / "bad", rows)
        return refused("evaluate_longbench", folder, source, tmp_path / "out", *words)

    assert "tasks: unknown task 'hotpot'; known: narrativeqa, qasper" in line("tasks=[hotpot]")
    assert "holds no lcc.jsonl; it has: hotpotqa, trec, samsum" in line("tasks=[lcc]")
    assert "no such folder or archive" in refused("evaluate_longbench", model, tmp_path / "none", tmp_path / "out")
    assert "holds no task of LongBench" in refused("evaluate_longbench", model, model, tmp_path / "out")
    short = {key: value for key, value in ROWS["trec"][0].items() if key != "all_classes"}
    assert "trec.jsonl, line 1: no 'all_classes' field; it has: 'context', 'input'" in line(rows={"trec": [short]})
    assert "'answers' is not a list of one string or more" in line(rows={"trec": [{**ROWS["trec"][0], "answers": []}]})
    assert "the answer 'City' does not read 'Paragraph N'" in line(
        "tasks=[passage_retrieval_en]", rows={"passage_retrieval_en": [ROWS["trec"][1]]}
    )
    narrow = make_tokenizer(make_llama(tmp_path / "narrow", max_position_embeddings=100))
    assert "and 32 new ones are more than the model's max_position_embeddings 100" in line(
        "max_tokens=90", "tasks=[hotpotqa]", folder=narrow
    )
    bare = make_tokenizer(make_llama(tmp_path / "bare", max_position_embeddings=512))
    assert "chat=true, but its tokenizer has no chat template" in line("chat=true", folder=bare)
    assert "max_tokens: 1 is too small" in line("max_tokens=1")
    assert "cache: unknown value 'int3'" in line("cache=int3")
    assert "tasks: an empty list" in line("tasks=[]")
    assert "'tasks=hotpotqa': tasks is a list, given as tasks=[hotpotqa]" in line("tasks=hotpotqa")
    assert "'tasks.trec=1': tasks is a list, given as tasks=[VALUE]" in line("tasks.trec=1")
    assert "tasks: ['trec'] is not a task" in line("tasks=[[trec]]")
    assert "cache_options is a group of settings, given as cache_options.KEY=VALUE" in line("cache_options=4")
    assert "'group_size' is given, but no quantised cache is asked for" in line("cache_options.group_size=4")
    assert "nbits is a part of the cache's name" in line("cache=int4", "cache_options.nbits=8")
    assert not (tmp_path / "out").exists()

    run_tool("evaluate_longbench", model, data, tmp_path / "out", "max_tokens=60", "tasks=[trec]")
    assert "holds predictions of another max_tokens: 60 there, 80 now; give another OUT" in line("max_tokens=80")
    assert "of another model_sha256" in line("max_tokens=60", folder=bare)
    assert "holds predictions of another data set for trec" in line(
        "max_tokens=60", "tasks=[trec]", rows={"trec": ROWS["trec"][:1]}
    )
    journal = tmp_path / "out" / "journal" / "0.jsonl"
    journal.write_bytes(b"{}\n" + journal.read_bytes())
    assert "0.jsonl, line 1: not a prediction" in line("max_tokens=60")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "exists and holds no run.json" in refused(
        "evaluate_longbench", model, data, tmp_path / "full", "max_tokens=60"
    )


OFFICIAL = """
from metrics import same
dataset2metric = {"trec": same, "hotpotqa": same}
def scorer(dataset, predictions, answers, all_classes):
    return round(100 * sum(same(p, a[0]) for p, a in zip(predictions, answers)) / len(answers), 2)
"""
"""A script with the names that the authors' has, and another metric."""


def test_beside_another_script(tmp_path: Path) -> None:
    """tools/benchmarks/longbench_metrics.py: a sample that both score alike, and one that they do not."""
    (tmp_path / "eval.py").write_text(OFFICIAL)
    (tmp_path / "metrics.py").write_text("def same(prediction, answer, **_):\n    return float(prediction == answer)\n")
    predictions = tmp_path / "out" / "predictions"
    predictions.mkdir(parents=True)
    lines = [("Paris", ["Lyon", "Paris"]), ("the Paris", ["Paris"]), ("Rome", ["Paris"])]
    rows = [{"pred": text, "answers": answers, "all_classes": None} for text, answers in lines]
    (predictions / "hotpotqa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    done = run_tool("benchmarks/longbench_metrics", tmp_path, tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "| hotpotqa | 3 | 0.00 | 66.67 | 1 apart, by up to 100 |" in done.stdout
    # A few-shot answer is its first line in both.
    city = {"pred": "\nCity\nmore", "answers": ["City"], "all_classes": ["City", "Date"]}
    (predictions / "hotpotqa.jsonl").unlink()
    (predictions / "trec.jsonl").write_text(json.dumps(city) + "\n")
    done = run_tool("benchmarks/longbench_metrics", tmp_path, tmp_path / "out")
    assert done.stdout.splitlines()[-1].endswith("| 100.00 | yes |")
    assert "holds no predictions/TASK.jsonl" in refused("benchmarks/longbench_metrics", tmp_path, tmp_path)
    assert "holds no eval.py with metrics.py" in refused(
        "benchmarks/longbench_metrics", tmp_path / "out", tmp_path / "out"
    )
    (tmp_path / "eval.py").write_text("import a_package_that_is_not_there")
    assert "pip install jieba fuzzywuzzy rouge" in refused("benchmarks/longbench_metrics", tmp_path, tmp_path / "out")


@pytest.mark.skipif(not DATA.is_dir(), reason="the optional evaluation data (../shared/data/eval) is not there")
@needs_jieba
def test_the_real_files_are_read() -> None:
    found = {one.task.name: len(one.samples) for one in read_tasks(str(DATA), None, None)}
    assert found == {"multi_news": 200, "multifieldqa_zh": 200, "passage_retrieval_zh": 200}
