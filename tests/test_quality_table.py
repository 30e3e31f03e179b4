"""tools/quality_table.py: the table of a tiny model, against the tools by hand; interrupted, and carried away."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mha2mla_megatron.quality import stages
from mha2mla_megatron.quality.settings import QualitySettings, expand
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training import loop
from mha2mla_megatron.training.config import FinetuneSettings
from tests.conftest import PROSE, ROOT, make_llama, make_tokenizer, refused, run_tool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

STEPS = 6
TABLE = [
    "original", "original, fine-tuned", "ours -50 %", "ours -50 %, fine-tuned", "ours -50 %, distilled",
    "rope", "rope, fine-tuned", "second stage", "second stage, fine-tuned", "second stage, distilled",
    "paper -50 %", "paper -50 %, fine-tuned",
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, tokens, a task and the table's configuration."""
    root = tmp_path_factory.mktemp("quality")
    make_tokenizer(make_llama(root / "model"))
    rows = [json.dumps({"text": text * 3}) for text in PROSE]
    (root / "train.jsonl").write_text("\n".join(rows * 4))
    (root / "heldout.txt").write_text("".join(PROSE) * 3)
    task = [{"goal": a.strip(), "sol1": b.strip(), "sol2": a.strip(), "label": 0} for a in PROSE for b in PROSE[:3]]
    (root / "piqa.jsonl").write_text("\n".join(map(json.dumps, task)))
    run_tool("preprocess_data", root / "train.jsonl", root / "tokens", f"tokenizer={root / 'model'}", "workers=1")
    config = {
        "model": f"{root}/model",
        "calibration_text": f"{root}/train.jsonl",
        "calibrate": {"samples": 2, "sequence_length": 64, "stored_samples": 4},
        "base": {"dtype": "float32"},
        "rows": {
            "ours -50 %": {"series": "ours", "cache_budget": 0.5, "allocation": {"tokens": 64}},
            "rope": {"distill": False, "partial_rope": {"strategy": "uniform", "qk_rope_head_dim": 4}},
            "second stage": {
                "from": "rope, fine-tuned",
                "distill": {"teacher": "original, fine-tuned"},
                "low_rank": {"method": "joint", "objective": "weights", "kv_lora_rank": 24},
            },
            "paper -50 %": {
                "distill": False,
                "finetune": {"optimizer": {"lr": 2e-3}},
                "partial_rope": {"strategy": "uniform", "qk_rope_head_dim": 4},
                "low_rank": {"method": "joint", "objective": "weights", "kv_lora_rank": 24},
            },
        },
        "texts": {"held out": f"{root}/heldout.txt"},
        "perplexity": {"window": 64, "dtype": "float32"},
        "tasks": [f"{root}/piqa.jsonl"],
        "choices": {"dtype": "float32"},
        "finetune": {
            "steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "data": {"train": f"{root}/tokens",
            "sequence_length": 32}, "validation": {"data": f"{root}/tokens", "samples": 4, "interval": 3},
            "optimizer": {"lr": 1e-3},
        },
        "distillation": {"weight": 0.9},
    }  # fmt: skip
    (root / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    run_tool("quality_table", workspace / "table.yaml", f"out={workspace / 'out'}", "keep_models=true")
    assert not torch.distributed.is_initialized(), "threads that outlive Python may abort the process"
    return workspace / "out"


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in (out / "results").glob("*.json")]
    return {one["name"]: one for one in found}


def test_the_table_is_what_the_tools_give(tmp_path: Path, workspace: Path, finished: Path) -> None:
    """The fine-tuned model of one row, and the original, through the commands by hand."""
    found = results(finished)
    assert sorted(found) == sorted(TABLE)
    assert found["ours -50 %"]["cache_fraction"] <= 0.5 and found["original"]["cache_fraction"] == 1
    assert found["paper -50 %"]["cache_elements"] == 2 * 4 + 24
    stages_before = {"second stage": 1, "second stage, fine-tuned": 2, "second stage, distilled": 2}
    for name, one in found.items():
        runs = stages_before.get(name, int(name.endswith(("tuned", "distilled"))))
        assert one["tokens"] == runs * STEPS * 4 * 32, name
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    words = ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=24", "dtype=float32"]
    run_tool("convert_mha_to_mla", workspace / "model", tmp_path / "mla", "partial_rope.strategy=uniform", *words)
    run_tool("convert_hf_to_megatron", tmp_path / "mla", tmp_path / "megatron")
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config["finetune"]))
    words = [f"load={tmp_path / 'megatron'}", f"save={tmp_path / 'run'}", "optimizer.lr=2e-3"]
    run_tool("finetune", tmp_path / "finetune.yaml", *words)
    run_tool("convert_megatron_to_hf", tmp_path / "run", tmp_path / "tuned")
    run_tool(
        "evaluate_perplexity", workspace / "model", tmp_path / "mla", tmp_path / "tuned", workspace / "heldout.txt",
        "window=64", "dtype=float32", f"output={tmp_path / 'p.json'}",
    )  # fmt: skip
    run_tool("evaluate_choices", tmp_path / "tuned", workspace / "piqa.jsonl", f"output={tmp_path / 'c.json'}")
    by_hand = json.loads((tmp_path / "p.json").read_text())["results"]
    for name, one in zip(("original", "paper -50 %", "paper -50 %, fine-tuned"), by_hand, strict=True):
        assert found[name]["texts"]["held out"].items() >= {k: v for k, v in one.items() if k != "model"}.items()
    (scored,) = json.loads((tmp_path / "c.json").read_text())["results"]
    task = found["paper -50 %, fine-tuned"]["tasks"][f"{workspace.name}/piqa.jsonl"]
    assert [bit == "1" for bit in task["right"]] == scored["right"] and task["acc_norm"] == scored["acc_norm"]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    curves = found["paper -50 %, fine-tuned"]["curves"]
    assert curves["loss"] == [[128 * line["step"], line["loss"]] for line in log if "loss" in line]
    assert [tokens for tokens, _ in curves["validation_loss"]] == [3 * 128, 6 * 128]
    distilled, tuned = found["ours -50 %, distilled"], found["ours -50 %, fine-tuned"]
    assert distilled["texts"]["held out"]["perplexity"] != tuned["texts"]["held out"]["perplexity"]

    table = (finished / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:-2]] == TABLE
    ratio = by_hand[2]["perplexity"] / found["original, fine-tuned"]["texts"]["held out"]["perplexity"]
    assert f"(x {ratio:.4f})" in table[-3] and "± " in table[-3] and "original, fine-tuned" in table[-1]
    assert (finished / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_two_stages_and_a_trained_teacher_are_what_the_tools_give(
    tmp_path: Path, workspace: Path, finished: Path
) -> None:
    """Partial RoPE trained, factored, and trained again by the fine-tuned original: by hand, command after command."""
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config["finetune"]))

    def trained(model: Path, name: str, *words: str) -> Path:
        run_tool("convert_hf_to_megatron", model, tmp_path / f"{name}_megatron")
        roots = [f"load={tmp_path / name}_megatron", f"save={tmp_path / name}_run"]
        run_tool("finetune", tmp_path / "finetune.yaml", *roots, *words)
        run_tool("convert_megatron_to_hf", tmp_path / f"{name}_run", tmp_path / f"{name}_tuned")
        return tmp_path / f"{name}_tuned"

    rope = ["partial_rope.strategy=uniform", "partial_rope.qk_rope_head_dim=4", "dtype=float32"]
    run_tool("convert_mha_to_mla", workspace / "model", tmp_path / "rope", *rope)
    low_rank = ["low_rank.method=joint", "low_rank.objective=weights", "low_rank.kv_lora_rank=24", "dtype=float32"]
    run_tool("convert_mha_to_mla", trained(tmp_path / "rope", "rope"), tmp_path / "mla", *low_rank)
    trained(workspace / "model", "original")
    teacher = [f"distillation.teacher={tmp_path / 'original_run'}", "distillation.weight=0.9"]
    student = trained(tmp_path / "mla", "mla", *teacher)
    run_tool(
        "evaluate_perplexity", tmp_path / "mla", student, workspace / "heldout.txt",
        "window=64", "dtype=float32", f"output={tmp_path / 'p.json'}",
    )  # fmt: skip
    found = results(finished)
    by_hand = json.loads((tmp_path / "p.json").read_text())["results"]
    for name, one in zip(("second stage", "second stage, distilled"), by_hand, strict=True):
        assert found[name]["texts"]["held out"]["perplexity"] == one["perplexity"], name


def test_a_run_stays_until_nobody_learns_from_it(tmp_path: Path, workspace: Path) -> None:
    words = (workspace / "table.yaml", f"out={tmp_path / 'out'}", "only=[original]")
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    one = {"ours": {**config["rows"]["ours -50 %"], "distill": {"teacher": "original, fine-tuned"}, "finetune": True}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({**config, "rows": one}))
    run_tool("quality_table", tmp_path / "table.yaml", *words[1:])
    (kept,) = (tmp_path / "out" / "work").glob("run_*")
    assert (kept / "run" / f"iter_{STEPS:07d}").is_dir()
    done = run_tool("quality_table", tmp_path / "table.yaml", words[1])
    assert "original, fine-tuned: fine-tune" not in done.stdout, "its teacher was there"
    assert not list((tmp_path / "out" / "work").glob("run_*"))


def test_a_fine_tuned_original_is_calibrated_before_it_is_converted(
    tmp_path: Path, workspace: Path, finished: Path
) -> None:
    """As by the commands, by hand."""
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    row = {**config["rows"]["ours -50 %"], "from": "original, fine-tuned", "finetune": False, "distill": False}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({**config, "rows": {"tuned first": row}, "tasks": []}))
    shutil.copytree(finished, tmp_path / "out")
    run_tool("quality_table", tmp_path / "table.yaml", f"out={tmp_path / 'out'}", "only=[tuned first]")
    found = results(tmp_path / "out")["tuned first"]
    assert found["tokens"] == STEPS * 4 * 32

    run_tool("convert_hf_to_megatron", workspace / "model", tmp_path / "megatron")
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config["finetune"]))
    run_tool("finetune", tmp_path / "finetune.yaml", f"load={tmp_path / 'megatron'}", f"save={tmp_path / 'run'}")
    run_tool("convert_megatron_to_hf", tmp_path / "run", tmp_path / "tuned")
    words = [f"{key}={value}" for key, value in config["calibrate"].items()]
    run_tool("calibrate", tmp_path / "tuned", workspace / "train.jsonl", tmp_path / "s.safetensors", *words)
    words = ["dtype=float32", "cache_budget=0.5", "allocation.tokens=64", f"statistics={tmp_path / 's.safetensors'}"]
    run_tool("convert_mha_to_mla", tmp_path / "tuned", tmp_path / "mla", *words)
    words = ["window=64", "dtype=float32", f"output={tmp_path / 'p.json'}"]
    run_tool("evaluate_perplexity", tmp_path / "mla", workspace / "heldout.txt", *words)
    (by_hand,) = json.loads((tmp_path / "p.json").read_text())["results"]
    assert found["texts"]["held out"]["perplexity"] == by_hand["perplexity"]


def test_nothing_is_done_twice_and_results_travel_without_models(
    tmp_path: Path, workspace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("done before")

    for stage in ("calibrate", "convert_model", "evaluate_perplexity", "evaluate_choices", "hf_to_megatron"):
        monkeypatch.setattr(stages, stage, never)
    shutil.copytree(finished / "results", tmp_path / "out" / "results")
    done = run_tool("quality_table", workspace / "table.yaml", f"out={tmp_path / 'out'}")
    assert "Not complete" not in done.stdout
    assert (tmp_path / "out" / "table.md").read_text() == (finished / "table.md").read_text()

    measured: list[str] = []
    monkeypatch.setattr(stages, "evaluate_choices", lambda models, *_: measured.extend(models) or never())
    with pytest.raises(AssertionError):
        run_tool("quality_table", workspace / "table.yaml", f"out={tmp_path / 'out'}", "choices.max_rows=9")
    assert measured == [f"{workspace}/model"], "another number of rows is another measurement"


def test_time_up_in_the_middle_of_a_training(
    tmp_path: Path, workspace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm rings in the third step; the next call goes on from it, and ends where an unbroken run does."""
    train_step, steps, before = loop.train_step, 0, signal.getsignal(signal.SIGALRM)

    def alarmed(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGALRM)
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", alarmed)
    words = (workspace / "table.yaml", f"out={tmp_path / 'out'}", "minutes=60", "only=[original]")
    done = run_tool("quality_table", *words)
    assert "Not complete yet: original, fine-tuned." in done.stdout and steps == 3
    assert signal.getsignal(signal.SIGALRM) is before
    half = results(tmp_path / "out")
    assert half["original, fine-tuned"]["tokens"] == 3 * 128 and half["original"]["texts"].keys() == {"held out"}
    assert "original" in (tmp_path / "out" / "table.md").read_text()
    done = run_tool("quality_table", *words)
    assert steps == STEPS and "Not complete" not in done.stdout
    mine, whole = results(tmp_path / "out")["original, fine-tuned"], results(finished)["original, fine-tuned"]
    assert mine["curves"] == whole["curves"] and mine["texts"] == whole["texts"] and mine["tasks"] == whole["tasks"]


def test_a_name_that_yaml_takes_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text("rows:\n  2e-3: {}\n")
    line = refused("quality_table", tmp_path / "table.yaml")
    assert line == f"error: {tmp_path}/table.yaml: the key rows.0.002 (float) is not a text; put it into quotes"


def test_time_that_is_up_at_once(workspace: Path, tmp_path: Path) -> None:
    """And an empty mapping, which leaves out what the file has: nothing is trained."""
    words = (workspace / "table.yaml", f"out={tmp_path / 'out'}", "rows={}", "finetune={}", "distillation={}")
    done = run_tool("quality_table", *words, "minutes=1e-9")
    assert "Not complete yet: original. The same" in done.stdout
    run_tool("quality_table", *words)
    assert results(tmp_path / "out").keys() == {"original"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model=null"], ["model", "not set"]),
        (["texts={a: /none/a.txt}"], ["/none/a.txt", "no such file"]),
        (["texts={a: /}"], ["/: a folder, not a file"]),
        (["finetune.load=x"], ["finetune.load", "leave it out"]),
        (["finetune.stepz=x"], ["finetune", "stepz"]),
        (["only=[theirs]"], ["only", "theirs", "paper -50 %"]),
        (["rows.new.cache_budget=7"], ["new", "cache_budget", "7"]),
        (["minutes=0"], ["minutes"]),
        (["rows.new=7"], ["rows.new", "7", "mapping"]),
        (["distillation.teacher=[original]"], ["distillation.teacher", "['original']", "no trained line"]),
        (["rows.new.finetune=maybe"], ["rows.new.finetune", "maybe", "true, false"]),
        (["rows.new.distill={weight: 2}", "rows.new.cache_budget=0.5"], ["distillation.weight", "2"]),
        (["finetune.data.train=/none/tokens"], ["/none/tokens.idx"]),
        (["rows.new.from=ours -50 %"], ["rows.new.from", "'ours -50 %'", "no trained line", "rope, fine-tuned"]),
        (["rows.rope.distill={teacher: 'rope, distilled'}"], ["rows.rope: distillation.teacher", "'rope, distilled'"]),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else None,
)
def test_bad_settings_are_refused(tmp_path: Path, workspace: Path, words: list[str], named: list[str]) -> None:
    line = refused("quality_table", workspace / "table.yaml", f"out={tmp_path / 'out'}", *words)
    assert all(part in line for part in named), line
    assert not (tmp_path / "out" / "results").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "quality").glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_are_tables(tmp_path: Path, workspace: Path, file: Path) -> None:
    """Every row of them is one, whatever the model."""
    words = [f"model={workspace / 'model'}", f"out={tmp_path / 'out'}", f"calibration_text={workspace / 'train.jsonl'}"]
    words += [f"finetune.data.train={workspace / 'tokens'}", f"finetune.validation.data={workspace / 'tokens'}"]
    settings = load_settings(QualitySettings, [*words, f"texts={{a: {workspace / 'heldout.txt'}}}"], file)
    entries, _ = expand(settings, "model", "text")
    assert {entry.row for entry in entries} == {"original", *settings.rows}


def test_what_a_line_is_known_by(tmp_path: Path, workspace: Path) -> None:
    """Its settings but the default ones, which a later version may bring, and the contents of its token files: a corpus
    made anew, with documents as long as before, is another one. A row's blend takes the place of the common one. The
    original, as nothing was converted, does not depend on the text for statistics."""
    for suffix in (".bin", ".idx", ".json"):
        for name in ("a", "b"):
            shutil.copy(workspace / f"tokens{suffix}", tmp_path / f"{name}{suffix}")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    row = {"low_rank": {"method": "joint", "kv_lora_rank": 24}}
    own = {"default": {"seed": FinetuneSettings().seed}, "other": {"seed": 7}, "blend": {"data": {"train": {b: 1.0}}}}
    config["rows"] = {"plain": row, **{name: {**row, "finetune": values} for name, values in own.items()}}
    config["finetune"]["data"]["train"] = {a: 1.0}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def keys(text: str = "text") -> dict[str, str]:
        settings = load_settings(QualitySettings, [f"out={tmp_path / 'out'}"], tmp_path / "table.yaml")
        entries, _ = expand(settings, "model", text)
        trained = {entry.row: entry.training for entry in entries if entry.kind == "fine-tuned"}
        assert {row: one.data.train for row, one in trained.items() if one is not None} == {
            "original": {a: 1.0}, "plain": {a: 1.0}, "default": {a: 1.0}, "other": {a: 1.0}, "blend": {b: 1.0}
        }  # fmt: skip
        return {entry.row: entry.key for entry in entries if entry.kind == "fine-tuned"}

    before = keys()
    # The same contents under another name are the same.
    assert before["plain"] == before["default"] == before["blend"] != before["other"]
    of_another_text = keys("another text")
    assert {row for row in before if before[row] == of_another_text[row]} == {"original"}
    tokens = bytearray((tmp_path / "a.bin").read_bytes())
    tokens[0] ^= 1
    (tmp_path / "a.bin").write_bytes(tokens)
    after = keys()
    assert after["plain"] != before["plain"] and after["blend"] == before["blend"]


def test_rows_of_one_conversion_keep_their_names(tmp_path: Path, workspace: Path) -> None:
    row = {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "joint", "kv_lora_rank": 24}}
    config = yaml.safe_load((workspace / "table.yaml").read_text())
    config |= {"rows": {"slow": row, "fast": row}, "finetune": {}, "distillation": {}, "tasks": []}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run_tool("quality_table", tmp_path / "table.yaml", f"out={tmp_path / 'out'}")
    assert sorted(results(tmp_path / "out")) == ["fast", "original", "slow"]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()[2:5]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == ["original", "slow", "fast"]
