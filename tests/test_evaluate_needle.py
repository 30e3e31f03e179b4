"""tools/evaluate_needle.py: haystacks read back as text, scores against a plain loop, reruns, and a model that can."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.evaluation.haystack import HaystackMaker
from mha2mla_megatron.evaluation.needle import NeedleSettings, answer
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzĊ"
"""What needles are made of; the last one is the line end of byte-level tokenizers."""
ASKED = re.compile(r"\nThe secret number of (the \w+ \w+) is$")
NEEDLE = re.compile(r"\nThe secret number of (the \w+ \w+) is (\d{5})\.\n")
WORDS = ["lengths=[320,200]", "depths=[0.5,0]", "samples=2", "choices=4", "needles=2", "cache_chunk=64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    original = make_llama(folder / "original", max_position_embeddings=512)
    make_tokenizer(original, alphabet=ALPHABET)
    words = ["partial_rope.qk_rope_head_dim=8", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    run_tool("convert_mha_to_mla", original, folder / "mla", *words)
    return original, folder / "mla"


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "filler.txt"
    file.write_text("".join(PROSE) * 8)
    return file


def make_maker(folder: Path, filler: Path, **changes: Any) -> tuple[HaystackMaker, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    settings: dict[str, Any] = {"prefix": [1], "needles": 3, "choices": 5, "seed": 0, **changes}
    return HaystackMaker(encode, tokenizer.decode, encode(filler.read_text()), **settings), tokenizer


def test_haystacks(models: tuple[Path, Path], filler: Path) -> None:
    """Read back: exact length, BOS once, every needle whole, the one asked for where it should be, filler unbroken."""
    maker, tokenizer = make_maker(models[0], filler)
    asked, text = set(), filler.read_text()
    for sample in range(6):
        for length in (250, 400):
            for depth in (0.0, 0.3, 0.5, 1.0):
                question = maker.make(length, depth, sample)
                assert len(question.ids) + len(question.choices[0]) == length
                assert question.ids[0] == 1 and 1 not in question.ids[1:] and 0 not in question.ids
                read = tokenizer.decode(question.ids[1:])
                needles = dict(NEEDLE.findall(read))
                (key,) = ASKED.findall(read)
                assert len(needles) == 3 and key == question.key and needles[key] == question.values[0]
                assert set(question.values[:3]) == set(needles.values())
                assert len(set(question.values)) == 5 and not set(question.values[3:]) & set(needles.values())
                assert [tokenizer.decode(ids).strip() for ids in question.choices] == question.values
                bare = NEEDLE.sub("", read.removesuffix(ASKED.search(read).group()))  # type: ignore[union-attr]
                assert bare in text
                # As many sentences as a needle may go back for are at most BACK = 100 tokens: here, one of the PROSE.
                place = read.index(f"\nThe secret number of {key} is {needles[key]}")
                before = len(NEEDLE.sub("", read[:place]))
                assert depth * len(bare) - 115 < before <= depth * len(bare) + 5
                assert before == 0 or bare[:before].endswith((". ", ".")) or before == len(bare)
                asked.add((sample, key, needles[key]))
    assert len(asked) == 6  # one needle a sample, at any depth and length
    assert maker.make(250, 0.3, 1) == make_maker(models[0], filler)[0].make(250, 0.3, 1)
    assert maker.make(250, 0.3, 1).ids != make_maker(models[0], filler, seed=1)[0].make(250, 0.3, 1).ids


def results_of(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text())["results"], lines


def test_scores_are_those_of_a_plain_loop(tmp_path: Path, models: tuple[Path, Path], filler: Path) -> None:
    out = tmp_path / "out"
    done = run_tool("evaluate_needle", *models, filler, out, *WORDS)
    rows, lines = results_of(out)
    assert len(lines) == 2 * 2 * 2 * 2 and (out / "results.md").read_text() == done.stdout
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    maker, tokenizer = make_maker(models[0], filler, prefix=[], needles=2, choices=4)
    loaded = {str(m): AutoModelForCausalLM.from_pretrained(m, trust_remote_code=True) for m in models}
    scores: dict[tuple[str, int], dict[str, list[list[float]]]] = {}
    for line in lines:
        question = maker.make(line["length"], line["depth"], line["sample"])
        sums = {}
        for value in question.values:  # each whole, without a cache
            start = len(question.ids)
            ids = question.ids + tokenizer(f" {value}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = loaded[line["model"]](torch.tensor([ids]), use_cache=False).logits[0].double()
            log_p = logits.log_softmax(-1)
            sums[value] = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
            if value == question.values[0]:
                written = all(logits[i - 1].argmax() == ids[i] for i in range(start, len(ids)))
        # float32 sums in chunks; a token off shows at 1e-1.
        assert line["log_likelihoods"] == pytest.approx(sums, rel=1e-5)
        right = sums[line["answer"]]
        assert line["answer"] == question.values[0] and line["key"] == question.key
        assert line["prediction"] == max(sums, key=lambda value: sums[value])
        assert line["rank"] == 1 + sum(other > right for other in sums.values())
        assert line["probability"] == pytest.approx(
            1 / sum(2.718281828459045 ** (other - right) for other in sums.values()), rel=1e-4
        )
        assert line["greedy"] == written
        own = scores.setdefault((line["model"], line["length"]), {"accuracy": [[], []], "probability": [[], []]})
        own["accuracy"][line["sample"]].append(float(line["rank"] == 1))
        own["probability"][line["sample"]].append(line["probability"])
    for row in rows:
        for score, samples in scores[row["model"], row["length"]].items():
            means = [mean(values) for values in samples]
            assert row[score]["value"] == pytest.approx(mean(means))
            assert row[score]["error"] == pytest.approx(stdev(means) / 2**0.5)
        assert [one["depth"] for one in row["depths"]] == [0, 0.5]
        assert row["cache_bytes_per_token"] == (768 if row["model"] == str(models[0]) else 3 * (2 * 8 + 20) * 4)


@pytest.mark.parametrize(
    "kind",
    [
        "full",
        "int4",
        pytest.param("hqq4", marks=pytest.mark.skipif(find_spec("hqq") is None, reason="no hqq here")),
        pytest.param("quanto4", marks=pytest.mark.skipif(find_spec("optimum") is None, reason="no quanto here")),
    ],
)
def test_choices_leave_no_trace(models: tuple[Path, Path], filler: Path, kind: str) -> None:
    """Each choice goes through a copy of the cache: in another order, and alone, they have the same scores."""
    maker, _ = make_maker(models[0], filler)
    question = maker.make(300, 0.5, 0)
    model = AutoModelForCausalLM.from_pretrained(models[1], trust_remote_code=True)
    settings = NeedleSettings(caches=[kind], cache_options={} if kind == "full" else {"residual_length": 2})

    def score(choices: list[list[int]]) -> list[float]:
        return answer("m", model, kind, question._replace(choices=choices), settings)[0]

    sums = score(question.choices)
    assert len(set(sums)) == 5
    assert score(question.choices[::-1])[::-1] == sums and score(question.choices[3:4]) == sums[3:4]


def test_quantised_caches_and_reruns(tmp_path: Path, models: tuple[Path, Path], filler: Path) -> None:
    out, words = tmp_path / "out", [*models, filler]
    options = ["caches=[full,int4]", "cache_options={residual_length: 4, group_size: 4}"]
    done = run_tool("evaluate_needle", *words, out, *WORDS, *options)
    assert f"left out: {models[0]}: cache=int4" in done.stderr
    rows, lines = results_of(out)
    assert [(row["model"], row["cache"]) for row in rows[::2]] == [
        (str(models[0]), "full"), (str(models[1]), "full"), (str(models[1]), "int4")
    ]  # fmt: skip
    assert rows[-1]["cache_bytes_per_token"] < 0.6 * rows[-3]["cache_bytes_per_token"]

    journal = out / "predictions.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    run_tool("evaluate_needle", *words, out, *WORDS, *options)
    assert journal.read_bytes() == whole and results_of(out)[0] == rows
    # More samples: only they are new.
    run_tool("evaluate_needle", *words, out, *WORDS, *options, "samples=3")
    assert journal.read_bytes().startswith(whole) and len(results_of(out)[1]) == len(lines) * 3 // 2
    assert "holds predictions of another seed: 0 there, 1 now" in refused(
        "evaluate_needle", *words, out, *WORDS, *options, "seed=1"
    )
    journal.write_bytes(b"[]\n" + whole)
    assert "predictions.jsonl, line 1: not a prediction" in refused("evaluate_needle", *words, out, *WORDS, *options)


def test_refusals(tmp_path: Path, models: tuple[Path, Path], filler: Path) -> None:
    def line(*words: object, source: Path = filler, folders: tuple[Path, ...] = models) -> str:
        return refused("evaluate_needle", *folders, source, tmp_path / "out", *words)

    assert f"{models[0]}: lengths: 513 tokens are more than its max_position_embeddings 512" in line("lengths=[513]")
    assert "caches: unknown value 'hqq3'" in line("caches=[hqq3]")
    assert "no such folder" in line(folders=(models[0], tmp_path / "none"))
    assert "no such file" in line(source=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text(PROSE[0])
    assert f"{tmp_path / 'short.txt'}: the text has " in line("lengths=[400]", source=tmp_path / "short.txt")
    assert "filler.txt: lengths: 64 tokens have no room for filler beside 3 needles" in line(
        "lengths=[64]", "needles=3"
    )
    assert "depths: 1.5 is not from 0 to 1" in line("depths=[0,1.5]") and "depths: an empty list" in line("depths=[]")
    assert "choices: 1 is too small" in line("choices=1") and "needles: 0 is too small" in line("needles=0")
    assert "needles: 257 are more than the 256 keys" in line("needles=257")
    other = make_tokenizer(make_llama(tmp_path / "other", max_position_embeddings=512), vocab_size=200)
    assert "its tokenizer gives other tokens" in line(folders=(models[0], other))
    assert "its tokenizer cannot tell the values" in line("lengths=[512]", folders=(other,))  # it has no digits
    narrow = make_tokenizer(make_llama(tmp_path / "narrow", vocab_size=100), alphabet=ALPHABET)
    assert "beyond the models' vocabulary 100" in line("lengths=[128]", folders=(narrow,))
    assert not (tmp_path / "out").exists()
