"""What decides how a run trains beside its data: rates of single tensors, skipped spikes, the best step, W&B."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mha2mla_megatron.architecture import parse_architecture, read_architecture
from mha2mla_megatron.checkpoint.mapping import parameter_map
from mha2mla_megatron.checkpoint.megatron import BEST, LATEST
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training import loop
from mha2mla_megatron.training import step as step_module
from mha2mla_megatron.training.lr_scale import lr_factors
from mha2mla_megatron.training.validation import Validation
from tests.conftest import refused, run_tool
from tests.finetune_cases import (
    BATCH,
    checkpoint_tensors,
    checkpoint_values,
    finetune,
    log_text,
    losses,
    make_workspace,
    put_back,
    read_log,
    run_words,
)
from tests.megatron_cases import converted_config
from tests.test_finetune import LEARNING_RATES, SCHEDULE, STEPS, check_steps, load, samples

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

SCALED = 'optimizer.lr_scale={"*": 0, attention: 1, latents: 0.25, norms: 3, "decoder.layers.3.*": 0}'


def hf_factor(name: str) -> float:
    """What SCALED means for tensors of the converted model in transformers, whose names others wrote."""
    if ".layers.3." in name:
        return 0
    if "norm" in name:
        return 3
    if re.search(r"\.(kv_down|k_up|v_up)_proj\.", name):
        return 0.25
    return 1 if ".self_attn." in name else 0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def scaled(workspace: Path) -> Path:
    return finetune(workspace, "mla", workspace / "scaled", *SCHEDULE, SCALED)


def test_scaled_and_frozen_tensors_are_those_of_torch(workspace: Path, scaled: Path, tmp_path: Path) -> None:
    """Loss and gradient norm, of the trained tensors alone, of every step; frozen tensors keep every bit."""
    reference = load(workspace / "mla")
    named = dict(reference.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(hf_factor(name) > 0)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "factor": hf_factor(n), "weight_decay": 0.1 * (p.dim() > 1)} for n, p in trained.items()],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    data = samples(workspace / "text", tmp_path / "cache", STEPS * BATCH)
    log = read_log(scaled)
    assert [line["lr"] for line in log] == pytest.approx(LEARNING_RATES, rel=1e-12)
    check_steps(log, reference, optimizer, data)
    before, after = checkpoint_tensors(workspace / "mla-megatron", 0), checkpoint_tensors(scaled, STEPS)
    factors = {row.megatron: hf_factor(row.hf[0]) for row in parameter_map(read_architecture(workspace / "mla"))}
    for name, tensor in before.items():
        moves = factors[name] > 0 and not name.endswith("rope_pairs")
        assert torch.equal(after[name], tensor) != moves, name
        assert (f"optimizer.state.exp_avg.{name}" in after) == moves, name


def test_a_resumed_run_keeps_its_frozen_tensors_and_may_change_rates(
    workspace: Path, scaled: Path, tmp_path: Path
) -> None:
    root = put_back(scaled, tmp_path / "run", 3)
    finetune(workspace, "mla", root, *SCHEDULE, SCALED)
    assert log_text(root) == log_text(scaled)
    expected, found = checkpoint_tensors(scaled, STEPS), checkpoint_tensors(root, STEPS)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint_values(root, STEPS) == checkpoint_values(scaled, STEPS)

    (root / LATEST).write_text("3")
    finetune(workspace, "mla", root, *SCHEDULE, SCALED.replace("0.25", "0.5"), "optimizer.lr=2e-3")
    assert [line["lr"] for line in read_log(root)][3:] == pytest.approx([2 * lr for lr in LEARNING_RATES[3:]])
    assert losses(root)[3] == losses(scaled)[3] and losses(root)[4] != losses(scaled)[4]

    for words, named in (
        ([], ["was frozen", "trained now"]), ([SCALED.replace("norms: 3", "norms: 0")], ["was trained", "frozen now"])
    ):  # fmt: skip
        (root / LATEST).write_text("3")
        line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE, *words))
        assert all(part in line for part in ["optimizer.lr_scale", str(root / "iter_0000003"), *named]), line


@pytest.mark.parametrize("model", ["original", "mla"])
def test_a_frozen_embedding_with_recomputed_layers(workspace: Path, tmp_path: Path, model: str) -> None:
    """Autograd sees no parameters inside a recomputed layer, and here none of its inputs needs a gradient either."""
    words = (*SCHEDULE, "steps=3", "optimizer.warmup_steps=0", 'optimizer.lr_scale={"embedding.*": 0}')
    plain = finetune(workspace, model, tmp_path / "plain", *words)
    again = finetune(workspace, model, tmp_path / "again", *words, "recompute=full")
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    before, after = checkpoint_tensors(plain, 3), checkpoint_tensors(again, 3)
    for name in before:
        assert torch.allclose(after[name], before[name], rtol=1e-4, atol=1e-6), name


BAD_WORDS: dict[str, tuple[str, list[str]]] = {
    "no such tensor": ('optimizer.lr_scale={"*.q_proj.*": 0}', ["'*.q_proj.*'", "latents", "layers.0.", "linear_q."]),
    "no parameter": ('optimizer.lr_scale={"*.rope_pairs": 0}', ["rope_pairs", "matches no tensor"]),
    "everything": ("optimizer.lr_scale={attention: 0, '*': 0}", ["optimizer.lr_scale", "every tensor is frozen"]),
    "negative": ("optimizer.lr_scale={attention: -1}", ["optimizer.lr_scale", "-1", "attention", "0 (frozen)"]),
    "infinite": ("optimizer.lr_scale={attention: .inf}", ["optimizer.lr_scale", "inf"]),
    "no number": ("optimizer.lr_scale={attention: slow}", ["optimizer.lr_scale", "slow"]),
    "spike below 1": ("optimizer.spike_factor=0.5", ["optimizer.spike_factor", "0.5", "1"]),
    "no window": ("optimizer.spike_window=0", ["optimizer.spike_window", "0"]),
    "no validation": ("keep_best=true", ["keep_best", "validation.data", "data.split"]),
    "no package": ("wandb=project", ["wandb", "not installed", "null"]),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_settings_are_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    word, named = BAD_WORDS[case]
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, word))
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == []


def test_a_bias_is_not_trained_without_its_weight() -> None:
    """Megatron's layers would give it no gradient, and say nothing."""
    architecture = parse_architecture(converted_config("joint", attention_bias=True), "model")
    with pytest.raises(UserError, match=r"linear_q\.bias is trained and its weight is frozen"):
        lr_factors(architecture, {"*.weight": 0})
    factors = lr_factors(architecture, {"attention": 0})
    assert {kind for name, factor in factors.items() if factor == 0 for kind in [name.split(".")[-1]]} == {
        "weight", "bias",
    }  # fmt: skip


def gradients_times(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiply the gradients of these forward passes, counted from 1 and two a step; their losses stay as they are."""
    count, masked_loss = 0, step_module.masked_loss

    def larger(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        total, number, shown = masked_loss(mask, losses)
        if count in factors:
            factor = factors[count]
            total.register_hook(lambda gradient: gradient * factor)
        return total, number, shown

    monkeypatch.setattr(step_module, "masked_loss", larger)


SPIKE = ("steps=8", "save_interval=1", "optimizer.spike_factor=3", "optimizer.spike_window=3")


def test_spikes_are_left_out_and_a_resumed_run_knows_the_usual_norm(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2, before three updates are known, and 5 and 7 have gradients a hundred times too large."""
    root, words = tmp_path / "run", (*SCHEDULE, *SPIKE)
    with monkeypatch.context() as patch:
        gradients_times(patch, dict.fromkeys((3, 4, 9, 10, 13, 14), 100.0))
        done = run_tool("finetune", *run_words(workspace, "mla", root, *words))
    log = read_log(root)
    assert [line.get("skipped", False) for line in log] == [False] * 4 + [True, False, True, False]
    norms = [line["grad_norm"] for line in log]
    median = statistics.median(norms[1:4])
    assert norms[1] > 50 * norms[0] and norms[4] > 3 * median and math.isfinite(norms[4])
    warning = next(line for line in done.stderr.splitlines() if "step 5" in line)
    assert f"{norms[4] / median:.4g} times the median {median:.4g} of 3 updates" in warning and "left out (1" in warning
    assert "samples 16-19" in warning
    fourth, fifth, sixth = (checkpoint_tensors(root, step) for step in (4, 5, 6))
    assert all(torch.equal(fourth[name], fifth[name]) for name in fourth)
    assert any(not torch.equal(fifth[name], sixth[name]) for name in fifth)
    run = checkpoint_values(root, 8)["run"]
    assert (run["skipped"], run["skipped_in_a_row"]) == (2, 0)
    assert run["grad_norms"] == [norms[3], norms[5], norms[7]]  # of updates alone

    again = put_back(root, tmp_path / "again", 6)
    with monkeypatch.context() as patch:
        gradients_times(patch, {1: 100.0, 2: 100.0})
        finetune(workspace, "mla", again, *words)
    assert log_text(again) == log_text(root)
    expected, found = checkpoint_tensors(root, 8), checkpoint_tensors(again, 8)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint_values(again, 8) == checkpoint_values(root, 8)
    assert "grad_norms" not in run_tool("inspect_checkpoint", root, "verify=false").stdout


def test_too_many_spikes_in_a_row_stop_the_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_times(monkeypatch, dict.fromkeys(range(9, 17), 100.0))
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, *SPIKE, "max_skips_in_a_row=1")
    line = refused("finetune", *words)
    assert "step 6" in line and "2 steps in a row, max_skips_in_a_row is 1" in line and "times the median" in line
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def losses_of_validation(monkeypatch: pytest.MonkeyPatch, given: list[float]) -> None:
    values = iter(given)
    monkeypatch.setattr(Validation, "measure", lambda *_: next(values))


def test_the_best_step_is_kept_apart(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation after every step; only the last is due to be saved, and of those saved only one is to be kept."""
    root = tmp_path / "run"
    words = (
        *SCHEDULE, "save_interval=6", "keep_last=1", "keep_best=true", f"validation.data={workspace / 'text'}",
        "validation.interval=1",
    )  # fmt: skip
    seen: list[list[int]] = []
    train_step = loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *a: (seen.append(saved_steps(root)), train_step(*a))[1])
        losses_of_validation(patch, [3.0, 2.0, math.nan, 2.0, 2.5, 4.0])
        finetune(workspace, "mla", root, *words)
    assert seen == [[], [1], [2], [2], [2], [2]] and saved_steps(root) == [2, 6]
    assert (root / BEST).read_text() == "2 2.0\n" and not list(root.glob(".*"))
    run_tool("convert_megatron_to_hf", root, tmp_path / "best", "iteration=best")
    run_tool("convert_megatron_to_hf", root, tmp_path / "second", "iteration=2")
    run_tool("convert_megatron_to_hf", root, tmp_path / "latest")
    best, second, latest = (load_file(tmp_path / n / "model.safetensors") for n in ("best", "second", "latest"))
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert any(not torch.equal(best[name], latest[name]) for name in best)
    assert "step 2 of 2, 6" in run_tool("inspect_checkpoint", root, "iteration=best", "verify=false").stdout

    (root / BEST).unlink()  # as where the run was killed just before it was written
    longer = (*words, "steps=8")
    with monkeypatch.context() as patch:
        losses_of_validation(patch, [2.25, 1.5])
        finetune(workspace, "mla", put_back(root, tmp_path / "better", 6), *longer)
    assert saved_steps(tmp_path / "better") == [8] and (tmp_path / "better" / BEST).read_text() == "8 1.5\n"
    with monkeypatch.context() as patch:
        losses_of_validation(patch, [2.25, 2.125])
        finetune(workspace, "mla", root, *longer, "save_async=true")
    assert saved_steps(root) == [2, 8] and (root / BEST).read_text() == "2 2.0\n"


def test_a_best_step_that_is_not_there_is_refused(workspace: Path, scaled: Path, tmp_path: Path) -> None:
    line = refused("convert_megatron_to_hf", scaled, tmp_path / "hf", "iteration=best")
    assert f"{scaled} has no best step" in line and "keep_best=true" in line
    assert "valid: a number, or best" in refused("convert_megatron_to_hf", scaled, tmp_path / "hf", "iteration=worst")
    copy = shutil.copytree(scaled, tmp_path / "copy")
    (copy / BEST).write_text("first")
    assert str(copy / BEST) in refused("convert_megatron_to_hf", copy, tmp_path / "hf", "iteration=best")


WANDB = """
import json, pathlib
class Run:
    def __init__(self, **given):
        self.file = pathlib.Path(given["dir"]) / "wandb" / "calls.jsonl"
        self.write("init", given)
    def write(self, *call):
        with self.file.open("a") as stream:
            stream.write(json.dumps(call) + "\\n")
    def log(self, values, step):
        self.write("log", values, step)
    def finish(self):
        self.write("finish")
init = Run
"""
"""What is called of the package, which is not installed here."""


def test_wandb_gets_what_tensorboard_gets(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    root = tmp_path / "run"
    short = [*SCHEDULE, "steps=3", "save_interval=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=1"]
    words = [*short, "wandb=project", f"validation.data={workspace / 'text'}", "validation.samples=2"]
    finetune(workspace, "mla", root, *words)
    shutil.rmtree(root / "iter_0000003")
    (root / LATEST).write_text("2")
    finetune(workspace, "mla", root, *words)
    calls = [json.loads(line) for line in (root / "wandb" / "calls.jsonl").read_text().splitlines()]
    assert [call[0] for call in calls if call[0] != "log"] == ["init", "finish"] * 2
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first == second and (first["project"], first["name"], first["mode"]) == ("project", "run", "offline")
    assert first["config"]["steps"] == 3 and first["resume"] == "allow"
    log = read_log(root)
    logged = {
        (step, key): value for _, values, step in (c for c in calls if c[0] == "log") for key, value in values.items()
    }
    for line in log:
        for key in {"loss", "grad_norm", "lr", "validation_loss"} & line.keys():
            assert logged[line["step"], key] == line[key]
    assert (3, "validation_loss") in logged


def test_deterministic_sets_its_switches_and_takes_them_back(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the run is bit for bit the one without it; the switches are for a GPU's kernels."""
    names = "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO"
    for name in names[1:]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[0], ":16:8")
    seen: list[tuple[Any, ...]] = []
    take = loop.train_step

    def recorded(chunks: Any, *rest: Any) -> Any:
        config = chunks[0].config
        switches = config.deterministic_mode, config.cross_entropy_loss_fusion
        seen.append((*switches, torch.are_deterministic_algorithms_enabled(), *map(os.environ.get, names)))
        return take(chunks, *rest)

    monkeypatch.setattr(loop, "train_step", recorded)
    short = [*SCHEDULE, "steps=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=1"]
    plain = finetune(workspace, "mla", tmp_path / "plain", *short)
    assert [found[0] for found in seen] == [False] * 2 and not any(found[2] for found in seen)
    seen.clear()
    same = finetune(workspace, "mla", tmp_path / "same", *short, "deterministic=true")
    assert seen == [(True, False, True, ":4096:8", "0", "Ring")] * 2
    assert log_text(same) == log_text(plain)
    assert not torch.are_deterministic_algorithms_enabled()
    assert [os.environ.get(name) for name in names] == [":16:8", None, None]
