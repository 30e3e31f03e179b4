"""tools/sweep.py as a user runs it: rows and grids, results that agree, and a rerun that only does what is new."""

from __future__ import annotations

import csv
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.sweep import SweepSettings, expand_rows
from tests.conftest import PROSE, ROOT, make_llama, make_tokenizer, refused, run_tool

ORIGINAL_ELEMENTS = 2 * 2 * 16  # keys and values, G, d


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "original"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(random.Random(0).choices(PROSE, k=20)))
    return file


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    run_tool("calibrate", model, text, file, "samples=4", "stored_samples=4", "sequence_length=32")
    return file


def write(file: Path, settings: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump({"perplexity": {"window": 32, "max_windows": 6}, **settings}, sort_keys=False))
    return file


def run(model: Path, text: Path, out: Path, config: Path, *words: str) -> tuple[dict[str, Any], Any]:
    done = run_tool("sweep", model, text, out, f"config={config}", *words)
    return json.loads((out / "results.json").read_text()), done


def rows_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was measured anew, from the log."""
    lines = [line.removeprefix("== ") for line in done.stderr.splitlines() if line.startswith("== ")]
    return [line.partition(": ")[2] or line for line in lines]


SETTINGS: dict[str, Any] = {
    "rows": {
        "plain uniform": {"partial_rope": {"strategy": "uniform"}, "low_rank": {"method": "joint"}},
        "high, split": {"partial_rope.strategy": "high", "low_rank": {"method": "split"}},
        "RoPE alone": {"low_rank": {"method": "none"}, "grid": {"low_rank.kv_lora_rank": [None]}},
    },
    "grid": {"low_rank.kv_lora_rank": [8, 32], "partial_rope.qk_rope_head_dim": [4]},
}


def test_a_sweep_and_its_rerun(tmp_path: Path, model: Path, text: Path) -> None:
    config, out = write(tmp_path / "sweep.yaml", SETTINGS), tmp_path / "out"
    results, done = run(model, text, out, config)
    names = [
        "plain uniform, kv_lora_rank=8 qk_rope_head_dim=4",
        "plain uniform, kv_lora_rank=32 qk_rope_head_dim=4",
        "high, split, kv_lora_rank=8 qk_rope_head_dim=4",
        "high, split, kv_lora_rank=32 qk_rope_head_dim=4",
        "RoPE alone, kv_lora_rank=null qk_rope_head_dim=4",
    ]
    assert [row["name"] for row in results["rows"]] == names and rows_run(done) == ["original", *names]
    small, large, split, too_large, rope = results["rows"]

    # What the rows are, and the numbers of the other tools for the same conversion.
    assert small["cache_elements"] == 2 * 4 + 8 and split["cache_elements"] == 2 * 4 + 2 * 8
    assert rope["cache_elements"] == ORIGINAL_ELEMENTS == results["original"]["cache_elements"]
    assert small["cache_fraction"] == small["cache_elements"] / ORIGINAL_ELEMENTS
    assert small["cache_bytes_per_token"] == 3 * 4 * small["cache_elements"]  # layers, bytes of float32
    assert small["settings"]["dtype"] == "float32" and small["settings"]["partial_rope"]["strategy"] == "uniform"
    run_tool("convert_mha_to_mla", model, tmp_path / "mla", "partial_rope.strategy=uniform", "dtype=float32",
             "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=8")  # fmt: skip
    run_tool("evaluate_perplexity", model, tmp_path / "mla", text, "window=32", "max_windows=6",
             f"output={tmp_path}/ppl.json")  # fmt: skip
    for entry, expected in zip(
        (results["original"], small), json.loads((tmp_path / "ppl.json").read_text())["results"], strict=True
    ):
        for figure in ("perplexity", "perplexity_standard_error", "tokens", "cache_bytes_per_token"):
            assert entry[figure] == expected[figure]
    assert small["ratio"] == small["perplexity"] / results["original"]["perplexity"]

    # A row that cannot be is told so, in the file and in the table; the others are there.
    assert "kv_lora_rank: 32 is more than the rank" in too_large["refused"] and "perplexity" not in too_large
    assert f"refused: {too_large['refused']}" in done.stdout and "refused" not in large
    with (out / "results.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["name"] for row in table] == ["original", *names]
    assert float(table[1]["perplexity"]) == small["perplexity"] and f"{small['perplexity']:.4f}" in done.stdout
    assert table[4]["refused"] == too_large["refused"] and table[4]["perplexity"] == ""
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in out.iterdir()} == {"results.json", "results.csv", "results.png"}

    # Again: only the refused row is tried. Other names and more rows: only what is new. Another text: all.
    again, done = run(model, text, out, config)
    assert rows_run(done) == [names[3]] and again["rows"] == results["rows"]
    changed = {**SETTINGS, "rows": {"renamed": SETTINGS["rows"]["plain uniform"]}}
    changed["grid"] = {**SETTINGS["grid"], "low_rank.kv_lora_rank": [8, 9]}
    renamed, done = run(model, text, out, write(tmp_path / "changed.yaml", changed))
    assert rows_run(done) == ["renamed, kv_lora_rank=9 qk_rope_head_dim=4"]
    assert renamed["rows"][0] == {**small, "name": "renamed, kv_lora_rank=8 qk_rope_head_dim=4", "group": "renamed"}
    (tmp_path / "other.txt").write_text("".join(PROSE) * 3)
    other, done = run(model, tmp_path / "other.txt", out, tmp_path / "changed.yaml")
    assert len(rows_run(done)) == 3 and other["rows"][0]["perplexity"] != small["perplexity"]
    back, done = run(model, text, out, config)  # what was measured before the other text is still known
    assert rows_run(done) == ["original", names[3]] and back["rows"] == results["rows"]


def test_statistics(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    """Conversions with statistics; a file of other contents under the same name makes them run again."""
    file = tmp_path / "statistics.safetensors"
    file.write_bytes(statistics.read_bytes())
    config = write(
        tmp_path / "sweep.yaml",
        {
            "rows": {
                "data-aware": {"low_rank": {"kv_lora_rank": 16}},
                "budget": {"grid": {"cache_elements": [24]}, "allocation": {"tokens": 32}},
            },
            "base": {"statistics": str(file)},
        },
    )
    results, done = run(model, text, tmp_path / "out", config, "keep_models=true")
    assert rows_run(done) == ["original", "data-aware", "budget, cache_elements=24"]
    assert [row["cache_elements"] <= 24 for row in results["rows"]] == [True, True]
    assert results["statistics"][str(file)]["tokens"] == 4 * 32
    folders = list((tmp_path / "out" / "models").iterdir())
    assert len(folders) == 2 and all((folder / "model.safetensors").is_file() for folder in folders)
    moved = file.rename(tmp_path / "moved.safetensors")
    _, done = run(model, text, tmp_path / "out", config, "keep_models=true", f"base.statistics={moved}")
    assert rows_run(done) == []
    run_tool("calibrate", model, text, file, "samples=3", "stored_samples=3", "sequence_length=32")
    _, done = run(model, text, tmp_path / "out", config)
    assert rows_run(done) == ["data-aware", "budget, cache_elements=24"]


def test_caches(tmp_path: Path, model: Path, text: Path) -> None:
    """Each model through each cache, converted once; the original through those that it can have."""
    settings = {
        "rows": {"joint": {"low_rank.method": "joint", "grid": {"low_rank.kv_lora_rank": [8, 16]}}},
        "caches": ["full", "int4", "int2"],
        "cache_options": {"residual_length": 0, "group_size": 4},
    }
    config, out = write(tmp_path / "sweep.yaml", settings), tmp_path / "out"
    results, done = run(model, text, out, config)
    names = [f"joint, kv_lora_rank={c}, {cache}" for c in (8, 16) for cache in settings["caches"]]
    assert [row["name"] for row in results["rows"]] == ["original, full", *names]
    assert rows_run(done) == ["original", "original, full", *names] and done.stderr.count("MHA -> MLA: 0/") <= 2
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["original, full"]["perplexity"] == pytest.approx(results["original"]["perplexity"], rel=1e-5)
    assert rows["original, full"]["cache_bytes_per_token"] == results["original"]["cache_bytes_per_token"]
    run_tool("convert_mha_to_mla", model, tmp_path / "mla", "low_rank.method=joint", "dtype=float32",
             "low_rank.kv_lora_rank=16")  # fmt: skip
    run_tool("evaluate_perplexity", tmp_path / "mla", text, "window=32", "max_windows=6", "cache=int4",
             "cache_options={residual_length: 0, group_size: 4}", f"output={tmp_path}/ppl.json")  # fmt: skip
    (expected,) = json.loads((tmp_path / "ppl.json").read_text())["results"]
    int4 = rows["joint, kv_lora_rank=16, int4"]
    assert int4["cache"] == "int4" and int4["group"] == "joint, int4"
    for figure in ("perplexity", "perplexity_standard_error", "tokens", "cache_bytes_per_token"):
        assert int4[figure] == expected[figure]
    with (out / "results.csv").open() as stream:
        assert [row["cache"] for row in csv.DictReader(stream)] == ["", "full", *settings["caches"] * 2]

    # Other options make the quantised ones anew, another cache is measured alone, and one that is not there is said so.
    again, done = run(model, text, out, config, "cache_options.group_size=8")
    assert rows_run(done) == [name for name in names if "full" not in name]
    again, done = run(model, text, out, config, "caches=[full,int8]")
    assert rows_run(done) == [f"joint, kv_lora_rank={c}, int8" for c in (8, 16)]
    assert again["rows"][1] == rows[names[0]]


def test_refusals(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    """Before any work: nothing is left behind."""
    out = tmp_path / "out"

    def line(settings: dict[str, Any], *words: str, folder: Path = model, target: Path = out) -> str:
        message = refused("sweep", folder, text, target, f"config={write(tmp_path / 'bad.yaml', settings)}", *words)
        assert not out.exists()
        return message

    assert "row 'a': 'partial_rope.strateg=\"high\"': unknown key 'partial_rope.strateg'; known here: strategy" in line(
        {"rows": {"b": None, "a": {"partial_rope": {"strateg": "high"}}}}
    )
    assert "row 'a': ckpt_format: unknown value 'torch_dist'; valid: hf" in line(
        {"rows": {"a": {"ckpt_format": "torch_dist"}}}
    )
    assert "row 'a, heal_steps=3': 'heal.heal_steps=3': unknown key" in line(
        {"rows": {"a": {}}, "grid": {"heal.heal_steps": [3]}}
    )
    assert "row 'base': low_rank.method: unknown value 'jiont'" in line({}, "base.low_rank.method=jiont")
    assert "row 'base': 'heal=[3]': " in line({}, "base.heal=[3]")
    assert "rows.a: 3 is not a mapping of settings" in line({"rows": {"a": 3}})
    assert "grid: heal.steps: 3 is not a list" in line({}, "grid.heal.steps=3")
    assert "unknown key 'gird'" in line({"gird": {}})
    assert "perplexity.cache: a sweep has a list of them, caches=[int4]" in line({}, "perplexity.cache=int4")
    assert "caches: unknown value 'int3'; valid: full, int8" in line({}, "caches=[int3]")
    assert "'group_size' is given, but no quantised cache" in line({}, "cache_options.group_size=4", "caches=[full]")
    assert "perplexity.output: a sweep writes results.json" in line({}, "perplexity.output=x.json")
    assert f"{tmp_path / 'none'}: cannot be read (No such file" in line({}, f"base.statistics={tmp_path / 'none'}")
    other = make_tokenizer(make_llama(tmp_path / "other", seed=1))
    assert "statistics of another model" in line({}, f"base.statistics={statistics}", folder=other)
    assert "fewer than a window of 9999" in line({}, "perplexity.window=9999")
    assert "no such folder" in line({}, folder=tmp_path / "nowhere")
    assert "holds no results.json of a sweep" in line({}, target=model)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{}")
    assert "not the results of a sweep" in line({}, target=tmp_path / "broken")
    run_tool("convert_mha_to_mla", model, tmp_path / "mla", "low_rank.kv_lora_rank=8")
    assert "is converted already; a sweep starts from the original" in line({}, folder=tmp_path / "mla")


def test_the_ablation_is_what_it_says() -> None:
    """Sixteen rows at three cache sizes of 384 elements, G = 3; a shared rotated key is cached once."""
    settings = load_settings(SweepSettings, ["base.statistics=statistics"], ROOT / "examples" / "ablation.yaml")
    rows = expand_rows(settings)
    assert len(rows) == 48 and len({row.group for row in rows}) == 16
    for group in {row.group for row in rows}:
        elements = []
        for row in (row.settings for row in rows if row.group == group):
            r, c = row.partial_rope.qk_rope_head_dim, row.low_rank.kv_lora_rank
            heads = 1 if row.partial_rope.shared else 3
            elements.append(row.cache_elements if row.budgeted else heads * r + c)
        assert elements == [120, 72, 48], group
