"""optimizer.ema_decay: the moving average of the weights, against its formula in float64, resumed and exported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mha2mla_megatron.checkpoint.megatron import check_coverage
from mha2mla_megatron.errors import UserError
from tests.conftest import refused, run_tool
from tests.finetune_cases import (
    checkpoint_tensors,
    checkpoint_values,
    exported,
    finetune,
    log_text,
    make_workspace,
    put_back,
    run_words,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

STEPS, DECAY = 5, 0.8
SCHEDULE = (f"steps={STEPS}", "save_interval=1", "optimizer.warmup_steps=1", "optimizer.decay_steps=1")
AVERAGE = f"optimizer.ema_decay={DECAY}"
FROZEN = 'optimizer.lr_scale={"*.mlp.*": 0}'
LIMIT = 1e-6
"""Of a tensor's largest value: the rounding of six float32 results. A step that is missed, counted twice or taken from
bf16 weights shows at 1e-4."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("average"))


@pytest.fixture(scope="module")
def averaged(workspace: Path) -> Path:
    """A run in float32 with a frozen MLP."""
    return finetune(workspace, "mla", workspace / "averaged", *SCHEDULE, AVERAGE, FROZEN)


def average_of(start: Tensors, steps: list[Tensors]) -> Tensors:
    """The recursion, from the weights before the first step and those after each one; float64."""
    average = {name: tensor.double() for name, tensor in start.items()}
    for weights in steps:
        average = {name: DECAY * tensor + (1 - DECAY) * weights[name].double() for name, tensor in average.items()}
    return average


def masters(root: Path, step: int) -> Tensors:
    prefix = "optimizer.state.param."
    return {k.removeprefix(prefix): v for k, v in checkpoint_tensors(root, step).items() if k.startswith(prefix)}


def averages(root: Path, step: int) -> Tensors:
    found = {k: v for k, v in checkpoint_tensors(root, step).items() if k.startswith("average.")}
    assert {tensor.dtype for tensor in found.values()} <= {torch.float32}
    return {name.removeprefix("average."): tensor for name, tensor in found.items()}


def check_near(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].double() - tensor).abs().max() <= LIMIT * tensor.abs().max(), name


@pytest.mark.parametrize(("model", "dtype"), [("mla", torch.float32), ("original", torch.bfloat16)])
def test_it_follows_the_master_weights(
    workspace: Path, averaged: Path, tmp_path: Path, model: str, dtype: torch.dtype
) -> None:
    """The first step has rate 0, so after it average and weights are as they began."""
    root = averaged
    if dtype == torch.bfloat16:
        root = finetune(workspace, model, tmp_path / "run", *SCHEDULE, AVERAGE, "dtype=bfloat16")
    start = {
        name: tensor.to(dtype)
        for name, tensor in checkpoint_tensors(workspace / f"{model}-megatron", 0).items()
        if name in masters(root, 1)
    }
    for step in range(1, STEPS + 1):
        check_near(averages(root, step), average_of(start, [masters(root, n) for n in range(1, step + 1)]))
    last = masters(root, STEPS)
    assert all((average - last[name]).abs().max() > 1e-4 for name, average in averages(root, STEPS).items())


def test_the_export_is_the_average_of_the_exports(workspace: Path, averaged: Path, tmp_path: Path) -> None:
    """In transformers' names; what is frozen is the model's own, bit for bit."""
    start = load_file(workspace / "mla" / "model.safetensors")
    steps = [exported(averaged, tmp_path / str(step), f"iteration={step}") for step in range(1, STEPS + 1)]
    found = exported(averaged, tmp_path / "average", "weights=average")
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in start.items()}
    floats = {name for name, tensor in start.items() if tensor.is_floating_point()}
    expected = average_of({name: start[name] for name in floats}, steps)
    check_near({name: found[name] for name in floats}, expected)
    same = [name for name in found if torch.equal(found[name], steps[-1][name])]
    frozen = [name for name in found if ".mlp." in name or "post_attention_layernorm" in name]  # in Megatron one module
    assert sorted(same) == sorted([*frozen, *(start.keys() - floats)]) and len(frozen) == 4 * 4
    assert all(torch.equal(found[name], start[name]) for name in same)


def test_a_16_bit_export_rounds_the_average_once(workspace: Path, tmp_path: Path) -> None:
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, AVERAGE, "dtype=bfloat16")
    found = exported(root, tmp_path / "hf", "weights=average")
    name = "layers.1.self_attention.linear_q.weight"
    average = averages(root, STEPS)[f"decoder.{name}"]
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], average.bfloat16())


def test_resumed_equals_unbroken_bit_for_bit(workspace: Path, averaged: Path, tmp_path: Path) -> None:
    root = put_back(averaged, tmp_path / "run", 3)
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE, AVERAGE, FROZEN))
    assert "average" not in done.stdout + done.stderr
    assert log_text(root) == log_text(averaged)
    expected, found = checkpoint_tensors(averaged, STEPS), checkpoint_tensors(root, STEPS)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint_values(root, STEPS) == checkpoint_values(averaged, STEPS)


def test_it_changes_nothing_else(workspace: Path, averaged: Path, tmp_path: Path) -> None:
    """And begins, and ends, at a resume whose setting says so, with one line."""
    plain = finetune(workspace, "mla", tmp_path / "plain", *SCHEDULE, FROZEN)
    before, after = checkpoint_tensors(plain, STEPS), checkpoint_tensors(averaged, STEPS)
    assert before.keys() == {name for name in after if not name.startswith("average.")}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    root = put_back(plain, tmp_path / "begins", 3)
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE, AVERAGE, FROZEN))
    (line,) = (line for line in done.stdout.splitlines() if "average" in line)
    assert "iter_0000003" in line and "optimizer.ema_decay" in line
    check_near(averages(root, STEPS), average_of(masters(root, 3), [masters(root, 4), masters(root, 5)]))

    root = put_back(averaged, tmp_path / "ends", 3)
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE, FROZEN))
    (line,) = (line for line in done.stderr.splitlines() if "average" in line)
    assert line.startswith("warning: ") and "iter_0000003" in line and "optimizer.ema_decay" in line
    assert checkpoint_tensors(root, STEPS).keys() == before.keys()
    assert log_text(root) == log_text(averaged)


def test_low_rank_updates_are_averaged_and_then_merged(workspace: Path, tmp_path: Path) -> None:
    """W + alpha / r B A, of the average of B and that of A, which is not the average of B A."""
    words = (*SCHEDULE, AVERAGE, "lora.rank=4", "lora.alpha=10", "lora.targets=['*.linear_q.weight']")
    root = finetune(workspace, "mla", tmp_path / "run", *words)
    begun = {k: v * k.endswith("lora_A") for k, v in masters(root, 1).items()}  # A of the first step, whose rate is 0
    expected = average_of(begun, [masters(root, step) for step in range(1, STEPS + 1)])
    check_near(averages(root, STEPS), expected)
    source = load_file(workspace / "mla" / "model.safetensors")
    found = exported(root, tmp_path / "hf", "weights=average")
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        a, b = (expected.pop(f"decoder.layers.{layer}.self_attention.linear_q.lora_{which}") for which in "AB")
        weight = source.pop(name)
        assert (found[name] - (weight + 10 / 4 * b @ a)).abs().max() <= LIMIT * weight.abs().max()
        assert (found[name] - weight).abs().max() > 1e-3
    assert not expected and all(torch.equal(found[name], tensor) for name, tensor in source.items())


def test_every_other_tool_takes_the_trained_weights(workspace: Path, averaged: Path, tmp_path: Path) -> None:
    trained = exported(averaged, tmp_path / "hf")
    assert "equal" in run_tool("verify_conversion", averaged, tmp_path / "hf").stdout
    words = ("steps=1", "optimizer.warmup_steps=0", "optimizer.lr=0", "optimizer.decay_steps=1", f"load={averaged}")
    again = exported(finetune(workspace, "mla", tmp_path / "run", *words), tmp_path / "again", "weights=trained")
    assert again.keys() == trained.keys() and all(torch.equal(again[name], trained[name]) for name in trained)
    text = run_tool("inspect_checkpoint", averaged).stdout
    assert "average of the weights: yes" in text and re.search(r"^average\.\* +float32 ", text, re.MULTILINE), text
    assert "average of the weights: no" in run_tool("inspect_checkpoint", tmp_path / "run").stdout


def test_an_average_that_is_not_there_is_refused(workspace: Path, averaged: Path, tmp_path: Path) -> None:
    source = workspace / "mla-megatron"
    line = refused("convert_megatron_to_hf", source, tmp_path / "hf", "weights=average")
    assert all(part in line for part in ("weights: ", "iter_0000000", "no average", "optimizer.ema_decay")), line
    line = refused("convert_megatron_to_hf", averaged, tmp_path / "hf", "weights=mean")
    assert "weights" in line and "'mean'" in line and "trained, average" in line
    assert list(tmp_path.iterdir()) == []


def test_averages_that_do_not_fit_are_named() -> None:
    model, moments = {"x": (6, 4), "y": (4,)}, {"optimizer.state.exp_avg.x": (6, 4)}
    check_coverage({**model, **moments, "average.x": (6, 4)}, model, Path("step"))
    for found, named in (
        ({"average.x": (4, 6)}, "average.x has shape (4, 6), x has (6, 4)"),
        ({"average.z": (6, 4)}, "surplus tensor average.z"),
        ({"average.y": (4,)}, "tensor average.x is missing"),
    ):
        with pytest.raises(UserError, match=re.escape(named)):
            check_coverage({**model, **moments, **found}, model, Path("step"))


@pytest.mark.parametrize("value", ["1", "-0.1", ".nan", "often"])
def test_bad_settings_are_refused(workspace: Path, tmp_path: Path, value: str) -> None:
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, f"optimizer.ema_decay={value}")
    line = refused("finetune", *words)
    assert "optimizer.ema_decay" in line and value.lstrip(".") in line, line
    assert list(tmp_path.iterdir()) == [], "something was written"
