"""tools/evaluate_perplexity.py: the numbers of a plain transformers loop, and a cache that weighs what it should."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.evaluation.cache import cache_bytes, cache_bytes_per_token
from mha2mla_megatron.evaluation.table import format_table
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

WINDOW = 32
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "original"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(random.Random(0).choices(PROSE, k=20)))
    return file


def reference(folder: Path, content: str, *, bos: bool = False, windows: int | None = None) -> tuple[float, float, int]:
    """(perplexity, its standard error, predictions), one window at a time."""
    ids = AutoTokenizer.from_pretrained(folder)(content, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    means = []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW)[:windows]:
        window = torch.tensor([1] * bos + ids[start : start + WINDOW])
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(log_p[i - 1, window[i]].item() for i in range(1 + bos, len(window))) / (WINDOW - 1))
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    perplexity = math.exp(mean)
    return perplexity, perplexity * math.sqrt(variance / len(means)), len(means) * (WINDOW - 1)


def evaluate(tmp_path: Path, *words: object) -> tuple[list[dict[str, Any]], str]:
    done = run_tool("evaluate_perplexity", *words, f"window={WINDOW}", f"output={tmp_path / 'out' / 'result.json'}")
    return json.loads((tmp_path / "out" / "result.json").read_text())["results"], done.stdout


def test_perplexity_is_that_of_a_plain_loop(tmp_path: Path, model: Path, text: Path) -> None:
    other = make_tokenizer(make_llama(tmp_path / "other", seed=1, groups=4))
    results, table = evaluate(tmp_path, model, other, text, "batch_size=3")
    for folder, groups, result in zip((model, other), (2, 4), results, strict=True):
        perplexity, error, tokens = reference(folder, text.read_text())
        assert result["perplexity"] == pytest.approx(perplexity, rel=1e-6)
        assert result["perplexity_standard_error"] == pytest.approx(error, rel=1e-5)
        assert result["tokens"] == tokens and result["dtype"] == "float32"
        assert result["cache_bytes_per_token"] == 3 * 2 * groups * 16 * 4  # layers, k and v, heads, head dim, float32
        assert result["cache_bytes_per_sequence"] == WINDOW * result["cache_bytes_per_token"]
        assert f"{result['perplexity']:.4f}" in table
    assert table.splitlines()[0].split() == ["model", "perplexity", "std.", "error", "tokens", "cache", "bytes/token"]


def test_bos_and_limits(tmp_path: Path, model: Path, text: Path) -> None:
    """BOS changes what is seen, not what is predicted."""
    results, _ = evaluate(tmp_path, model, text, "bos=true", "max_windows=5")
    perplexity, error, tokens = reference(model, text.read_text(), bos=True, windows=5)
    assert results[0]["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert results[0]["perplexity_standard_error"] == pytest.approx(error, rel=1e-5)
    assert results[0]["tokens"] == tokens == 5 * (WINDOW - 1)
    results, table = evaluate(tmp_path, model, text, "max_windows=1")
    assert results[0]["perplexity_standard_error"] is None and " - " in table


def test_bfloat16(tmp_path: Path, model: Path, text: Path) -> None:
    results, _ = evaluate(tmp_path, model, text, "dtype=bfloat16", "device=cpu")
    assert results[0]["dtype"] == "bfloat16" and results[0]["cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 2
    assert results[0]["perplexity"] == pytest.approx(reference(model, text.read_text())[0], rel=0.05)


def test_json_lines_are_joined_by_newlines(tmp_path: Path, model: Path) -> None:
    parts = ["".join(PROSE), "".join(reversed(PROSE)), PROSE[0]]
    (tmp_path / "a.txt").write_text("\n".join(parts))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": part}) + "\n" for part in parts)
    results = [evaluate(tmp_path, model, tmp_path / name)[0][0] for name in ("a.txt", "a.jsonl.gz")]
    assert results[0] == results[1]


def test_converted_model(tmp_path: Path, model: Path, text: Path) -> None:
    """Everything rotated and nothing factored is the same model; a latent of 12 makes the cache r G + c wide."""
    run_tool("convert_mha_to_mla", model, tmp_path / "same", "partial_rope.strategy=full", "low_rank.method=none")
    run_tool(
        "convert_mha_to_mla", model, tmp_path / "small", "partial_rope.qk_rope_head_dim=8", "low_rank.method=joint",
        "low_rank.kv_lora_rank=12",
    )  # fmt: skip
    (original, same, small), _ = evaluate(tmp_path, model, tmp_path / "same", tmp_path / "small", text)
    assert same["perplexity"] == pytest.approx(original["perplexity"], rel=1e-6)
    assert same["cache_bytes_per_token"] == original["cache_bytes_per_token"] == 768
    assert small["cache_bytes_per_token"] == 3 * (2 * 8 + 12) * 4
    assert small["perplexity"] == pytest.approx(reference(tmp_path / "small", text.read_text())[0], rel=1e-6)


def test_as_a_user_runs_it(model: Path, text: Path) -> None:
    done = run_tool("evaluate_perplexity", model, text, f"window={WINDOW}", own_process=True)
    assert str(model) in done.stdout and "tokens/s" in done.stderr


def test_cache_functions(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert cache_bytes_per_token(loaded) == 768
    assert cache_bytes(loaded, tokens=5, batch_size=3) == 5 * 3 * 768


def test_refusals(tmp_path: Path, model: Path, text: Path) -> None:
    def line(*words: object) -> str:
        return refused("evaluate_perplexity", *words)

    assert "window: 129 tokens (BOS included) are more than the model's max_position_embeddings 128" in line(
        model, text, "window=128", "bos=true"
    )
    assert "window: 1 is too small" in line(model, text, "window=1")
    assert "batch_size: 0 is too small" in line(model, text, "batch_size=0")
    assert "dtype: unknown value 'int8'" in line(model, text, "dtype=int8")
    assert "device: unknown value 'tpu9'" in line(model, text, "device=tpu9")
    assert "device=cuda:77: there are" in line(model, text, "device=cuda:77")
    assert "no such file" in line(model, tmp_path / "none.txt")
    assert "no such folder" in line(tmp_path / "none", text)
    assert "exists and is a folder" in line(model, text, f"output={tmp_path}")
    (tmp_path / "short.txt").write_text(PROSE[0])
    assert "fewer than a window of 100" in line(model, tmp_path / "short.txt", "window=100")
    other = make_tokenizer(make_llama(tmp_path / "other"), vocab_size=200)
    assert f"{other}: its tokenizer gives other tokens than that of {model}, from token" in line(
        model, other, text, "window=32"
    )
    narrow = make_tokenizer(make_llama(tmp_path / "narrow", vocab_size=100))
    assert "beyond the model's vocabulary 100" in line(narrow, text, "window=32")


def test_damaged_models_are_refused(tmp_path: Path, model: Path, text: Path) -> None:
    def line(folder: Path) -> str:
        return refused("evaluate_perplexity", folder, text, f"window={WINDOW}", f"output={tmp_path}/result.json")

    folder = make_tokenizer(make_llama(tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert f"missing keys in its weights: {name}" in line(folder)
    save_file({**kept, name: weights[name] * math.nan}, folder / "model.safetensors", {"format": "pt"})
    assert "log-likelihoods that are not finite" in line(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)
    assert "cannot be loaded" in line(folder)
    (folder / "config.json").unlink()
    assert "cannot be loaded" in line(folder)
    assert not (tmp_path / "result.json").exists()


def test_table() -> None:
    assert format_table(("a", "long"), [("bcd", "1"), ("e", "22")]) == "a    long\nbcd     1\ne      22"


@pytest.mark.skipif(not DATA.is_dir(), reason="the optional evaluation data (../shared/data/eval) is not there")
def test_wikitext_file(tmp_path: Path, model: Path) -> None:
    content = (DATA / "wikitext2" / "test.txt").read_text()[:20_000]
    (tmp_path / "wiki.txt").write_text(content)
    results, _ = evaluate(tmp_path, model, tmp_path / "wiki.txt", "max_windows=9")
    assert results[0]["perplexity"] == pytest.approx(reference(model, content, windows=9)[0], rel=1e-6)
