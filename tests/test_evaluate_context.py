"""tools/evaluate_context.py: the same last tokens from contexts of several lengths, against a plain loop; reruns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.evaluation.context_length import ContextSettings
from mha2mla_megatron.evaluation.long_context import plan_runs
from tests.conftest import make_llama, make_pair, make_tokenizer, refused, run_tool

LENGTHS, PREDICTED = (16, 24, 48), 8
WORDS = ["lengths=[48,16,24]", f"predicted={PREDICTED}", "cache_chunk=5", "max_windows=4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("models"))


def reference(folder: Path, text: Path, length: int, bos: bool) -> list[float]:
    """Mean negative log-likelihood of the last tokens of each window, without a cache."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    means, window = [], LENGTHS[-1] - bos
    for number in range(4):
        piece = [1] * bos + ids[(number + 1) * window - (length - bos) : (number + 1) * window]
        with torch.no_grad():
            log_p = model(torch.tensor([piece]), use_cache=False).logits[0].double().log_softmax(-1)
        means.append(mean(-log_p[i - 1, piece[i]].item() for i in range(length - PREDICTED, length)))
    return means


def evaluate(out: Path, *words: object) -> list[dict[str, Any]]:
    run_tool("evaluate_context", *words[:-1], words[-1], out, *WORDS)
    return json.loads((out / "results.json").read_text())["results"]


@pytest.mark.parametrize("bos", [False, True])
def test_the_numbers_are_those_of_a_plain_loop(
    tmp_path: Path, models: tuple[Path, Path], text: Path, bos: bool
) -> None:
    out = tmp_path / "out"
    done = run_tool("evaluate_context", *models, text, out, *WORDS, f"bos={str(bos).lower()}")
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [(row["model"], row["length"]) for row in rows] == [(str(m), n) for m in models for n in LENGTHS]
    expected = {(str(m), n): reference(m, text, n, bos) for m in models for n in LENGTHS}
    for row in rows:
        values = expected[row["model"], row["length"]]
        # The same float32 sums in chunks; another window or a token off shows at 1e-1.
        assert row["nll"]["value"] == pytest.approx(mean(values), rel=1e-5)
        assert row["nll"]["error"] == pytest.approx(stdev(values) / 2, rel=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(mean(values)), rel=1e-5)
        for key, base, none in (
            ("over_shortest", (row["model"], LENGTHS[0]), row["length"] == LENGTHS[0]),
            ("over_first", (str(models[0]), row["length"]), row["model"] == str(models[0])),
        ):
            if none:
                assert row[key] is None
                continue
            apart = [one - other for one, other in zip(values, expected[base], strict=True)]
            assert row[key]["value"] == pytest.approx(mean(apart), abs=1e-5)
            assert row[key]["error"] == pytest.approx(stdev(apart) / 2, abs=1e-5)
        assert row["cache_bytes_per_token"] == (768 if row["model"] == str(models[0]) else 3 * (2 * 8 + 20) * 4)
        assert f"| {row['length']} | {row['perplexity']:.3f} |" in done.stdout
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "results.md").read_text() == done.stdout


def test_a_quantised_cache_is_what_is_measured(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    """int4 is left out for the original; for the other, its bytes shrink with the length and its numbers differ."""
    words = [*models, text, tmp_path / "out", *WORDS, "caches=[full,int4]"]
    done = run_tool("evaluate_context", *words, "cache_options={residual_length: 4, group_size: 4}")
    assert f"left out: {models[0]}: cache=int4: LatentQuantizedCache: config is not that of a model" in done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    runs = [(row["model"], row["cache"]) for row in rows[::3]]
    assert runs == [(str(models[0]), "full"), (str(models[1]), "full"), (str(models[1]), "int4")]
    full, packed = rows[3:6], rows[6:]
    for one, other in zip(full, packed, strict=True):
        assert 0 < abs(one["nll"]["value"] - other["nll"]["value"]) < 0.5
        assert other["cache_bytes_per_token"] < 0.9 * one["cache_bytes_per_token"]
    assert packed[2]["cache_bytes_per_token"] < packed[0]["cache_bytes_per_token"]


def test_a_rerun_measures_what_is_missing(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    out = tmp_path / "out"
    whole = evaluate(out, *models, text)
    journal = out / "windows.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 3 * 4
    # As if killed in the middle of the sixth line; a number that was changed by hand is kept, so it is not made again.
    kept = json.loads(lines[0])
    lines[0] = json.dumps({**kept, "nll": kept["nll"] + 4}) + "\n"
    journal.write_text("".join(lines[:5]) + lines[5][:20])
    again = evaluate(out, *models, text)
    assert len(journal.read_text().splitlines()) == 24
    assert again[0]["nll"]["value"] == pytest.approx(whole[0]["nll"]["value"] + 1)
    assert again[1:3] == [
        {**row, "over_shortest": {**row["over_shortest"], **change["over_shortest"]}}
        for row, change in zip(whole[1:3], again[1:3], strict=True)
    ]
    assert [row["nll"] for row in again[3:]] == [row["nll"] for row in whole[3:]]

    def line(*words: object) -> str:
        return refused("evaluate_context", *words)

    assert "holds predictions of another predicted: 8 there, 4 now; give another OUT" in line(
        *models, text, out, *WORDS, "predicted=4"
    )
    (tmp_path / "other.txt").write_text(text.read_text()[10:])
    assert "another text_sha256" in line(*models, tmp_path / "other.txt", out, *WORDS)
    journal.write_text("{}\n" + journal.read_text())
    assert "windows.jsonl, line 1: not a window's result" in line(*models, text, out, *WORDS)


def test_lengths_by_default(tmp_path: Path) -> None:
    """Doubling from 2048, and the longest that all models take; no weights are read for that."""
    folders = [str(make_llama(tmp_path / str(n), max_position_embeddings=n)) for n in (128, 2048, 6000, 8192)]
    assert plan_runs(folders[2:], ContextSettings()).lengths == [2048, 4096, 6000]
    assert plan_runs(folders[3:], ContextSettings()).lengths == [2048, 4096, 8192]
    assert plan_runs(folders[1:], ContextSettings()).lengths == [2048]
    assert plan_runs(folders, ContextSettings()).lengths == [128]


def test_refusals(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    original, mla = models

    def line(*words: object, source: Path = text, folders: tuple[Path, ...] = models) -> str:
        return refused("evaluate_context", *folders, source, tmp_path / "out", "predicted=8", *words)

    assert (
        f"{original}: lengths: 256 tokens are more than its max_position_embeddings 128; beyond=true goes there"
        in line("lengths=[16,256]")
    )
    assert "caches: unknown value 'int3'; valid: full, int8" in line("caches=[full,int3]")
    assert "cache=int4: LatentQuantizedCache" in line("caches=[full,int4]", "lengths=[16]", folders=(original,))
    assert "no such folder" in line("lengths=[16]", folders=(original, tmp_path / "none"))
    assert "no such file" in line("lengths=[16]", source=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("The tide had gone out.")
    assert "fewer than a window of 64" in line("lengths=[16,64]", source=tmp_path / "short.txt")
    assert "predicted: 8 tokens leave nothing of a context of 8" in line("lengths=[8,64]")
    assert "lengths: an empty list" in line("lengths=[]") and "caches: an empty list" in line("caches=[]")
    other = make_tokenizer(make_llama(tmp_path / "other"), vocab_size=200)
    assert "its tokenizer gives other tokens" in line("lengths=[16]", folders=(original, other))
    assert not (tmp_path / "out").exists()
    run_tool(
        "evaluate_context",
        mla,
        text,
        tmp_path / "far",
        "lengths=[16,160]",
        "beyond=true",
        "max_windows=1",
        "predicted=8",
    )
