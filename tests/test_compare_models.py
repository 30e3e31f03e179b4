"""tools/compare_models.py: each number at each position against a plain float64 loop over transformers models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_llama, make_pair, make_tokenizer, refused, run_tool

WINDOW = 33
SCORES = ("kl", "top1", "logit_error", "nll_a", "nll_b", "nll_difference")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("models"))


def reference(folders: tuple[Path, Path], text: Path, windows: int, bos: bool) -> list[list[dict[str, float]]]:
    """Of each window and context of 1 to N - 1 tokens, the scores, one token at a time."""
    ids = AutoTokenizer.from_pretrained(folders[0])(text.read_text(), add_special_tokens=False)["input_ids"]
    a, b = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in folders)
    found = []
    for number in range(windows):
        window = [1] * bos + ids[number * WINDOW : (number + 1) * WINDOW]
        with torch.no_grad():
            x, y = (model(torch.tensor([window])).logits[0].double() for model in (a, b))
        rows = []
        for place in range(bos, len(window) - 1):
            p, q, target = x[place].softmax(0), y[place].softmax(0), window[place + 1]
            nll = [-math.log(side[target].item()) for side in (p, q)]
            rows.append(
                {
                    "kl": sum(p[i].item() * math.log(p[i] / q[i]) for i in range(len(p))),
                    "top1": float(x[place].argmax() == y[place].argmax()),
                    "logit_error": math.sqrt(sum((x[place] - y[place]).tolist()[i] ** 2 for i in range(len(p))) / 256),
                    "nll_a": nll[0],
                    "nll_b": nll[1],
                    "nll_difference": nll[1] - nll[0],
                }
            )
        found.append(rows)
    return found


def compare(tmp_path: Path, *words: object) -> tuple[dict[str, Any], str]:
    done = run_tool("compare_models", *words, f"window={WINDOW}", f"output={tmp_path / 'out.json'}")
    return json.loads((tmp_path / "out.json").read_text()), done.stdout


@pytest.mark.parametrize("bos", [False, True])
def test_the_numbers_are_those_of_a_plain_loop(
    tmp_path: Path, models: tuple[Path, Path], text: Path, bos: bool
) -> None:
    words = ["max_windows=3", "bins=3", "batch_size=2", f"bos={str(bos).lower()}"]
    report, table = compare(tmp_path, *models, text, *words)
    rows = reference(models, text, 3, bos)
    assert [(one["first"], one["last"]) for one in report["bins"]] == [(1, 11), (12, 21), (22, 32)]
    for one in [*report["bins"], report["whole"]]:
        for score in SCORES:
            means = [mean(row[score] for row in window[one["first"] - 1 : one["last"]]) for window in rows]
            # float32 logits: 1e-6 of their size; a shift by one position shows at 1e-1.
            assert one[score]["value"] == pytest.approx(mean(means), rel=1e-4, abs=1e-5), score
            assert one[score]["error"] == pytest.approx(stdev(means) / 3**0.5, rel=1e-3, abs=1e-5), score
    assert (report["whole"]["first"], report["whole"]["last"], report["windows"]) == (1, WINDOW - 1, 3)
    assert report["cache_bytes_per_token"] == [768, 3 * (2 * 8 + 20) * 4]
    lines = table.splitlines()
    assert lines[1].endswith("432 cache bytes/token") and lines[-1].split()[0] == "all"
    assert f"{report['whole']['kl']['value']:.4f} ± {report['whole']['kl']['error']:.4f}" in lines[-1]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_likelihoods_are_those_of_evaluate_perplexity(
    tmp_path: Path, models: tuple[Path, Path], text: Path
) -> None:
    report, _ = compare(tmp_path, *models, text, "max_windows=null")
    run_tool("evaluate_perplexity", *models, text, f"window={WINDOW}", f"output={tmp_path / 'p.json'}")
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    for score, result in zip(("nll_a", "nll_b"), results, strict=True):
        assert report["whole"][score]["value"] == pytest.approx(result["nll"], rel=1e-6)
        assert report["whole"][score]["error"] == pytest.approx(result["nll_standard_error"], rel=1e-5)


def test_a_model_and_itself(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    report, _ = compare(tmp_path, models[1], models[1], text, "max_windows=1", "bins=1", "dtype=bfloat16")
    whole = {score: report["whole"][score]["value"] for score in ("kl", "top1", "logit_error", "nll_difference")}
    assert whole == {"kl": 0, "top1": 1, "logit_error": 0, "nll_difference": 0}
    assert report["whole"]["kl"]["error"] is None  # of a single window


def test_refusals(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    def line(*words: object) -> str:
        return refused("compare_models", *words, f"output={tmp_path / 'out.json'}")

    a, b = models
    assert "no such folder" in line(a, tmp_path / "none", text)
    assert "no such file" in line(a, b, tmp_path / "none.txt")
    wide = make_tokenizer(make_llama(tmp_path / "wide", vocab_size=260))
    assert f"{wide}: vocab_size 260, but {a} has 256; logits need one vocabulary" in line(a, wide, text)
    other = make_tokenizer(make_llama(tmp_path / "other"), vocab_size=200)
    assert f"B ({other}): its tokenizer gives other tokens than that of A ({a}), from token" in line(
        a, other, text, "window=64"
    )
    assert f"{a}: window: 129 tokens (BOS included) are more than the model's max_position_embeddings 128" in line(
        a, b, text, "window=128", "bos=true"
    )
    (tmp_path / "short.txt").write_text("The tide had gone out.")
    assert "fewer than a window of 32" in line(a, b, tmp_path / "short.txt", "window=32")
    assert "bins: 32 are more than the 31 positions of window=32" in line(a, b, text, "window=32", "bins=32")
    assert "output: 'x.txt' must end in .json" in refused("compare_models", a, b, text, "output=x.txt")
    assert "dtype: unknown value 'int8'" in line(a, b, text, "dtype=int8")
    damaged = make_tokenizer(make_llama(tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"] *= math.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert f"{damaged}: gives log-likelihoods that are not finite" in line(a, damaged, text, "window=32")
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.png").exists()
