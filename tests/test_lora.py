"""Training low-rank updates alone: against the formula in torch, resumed, merged, and every refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.mapping import parameter_map
from mha2mla_megatron.checkpoint.megatron import check_coverage
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.low_rank_update import LowRankUpdate
from tests.conftest import refused, run_tool
from tests.finetune_cases import (
    BATCH,
    checkpoint_tensors,
    checkpoint_values,
    exported,
    finetune,
    log_text,
    losses,
    make_workspace,
    put_back,
    read_log,
    run_words,
)
from tests.test_finetune import SCHEDULE, STEPS, check_steps, load, samples

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

RANK, ALPHA = 4, 10.0
LORA = (
    f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.targets=[attention,'*.linear_fc1.weight']",
    # Adam divides a gradient by its own size; with an epsilon far above the noise of float32 sums, noise stays noise.
    "optimizer.adam_eps=1e-4", "save_interval=1",
)  # fmt: skip
PROJECTIONS = ("self_attn", "gate_proj", "up_proj")
"""What the targets are in transformers' names."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def trained(workspace: Path) -> dict[str, Path]:
    return {model: finetune(workspace, model, workspace / f"{model}-lora", *SCHEDULE, *LORA) for model in MODELS}


MODELS = ("original", "mla")


@pytest.mark.parametrize("model", MODELS)
def test_same_as_the_formula_in_torch(workspace: Path, trained: dict[str, Path], tmp_path: Path, model: str) -> None:
    """h = W x + alpha / r B A x on transformers' model: losses, gradient norms and, at the end, merged weights.

    What Megatron holds as one matrix (q, k and v of the original; gate and up) has one A, and rows of B for each.
    """
    reference, architecture = load(workspace / model).requires_grad_(False), read_architecture(workspace / model)
    # The first step has rate 0, and leaves A where it began.
    start, updates = checkpoint_tensors(trained[model], 1), []
    for row in parameter_map(architecture):
        if not (row.megatron.endswith("weight") and any(f"{part}." in name for name in row.hf for part in PROJECTIONS)):
            continue
        a, b = (start[row.megatron.removesuffix("weight") + name].requires_grad_() for name in ("lora_A", "lora_B"))
        assert a.abs().max() <= a.shape[1] ** -0.5 < 1.2 * a.abs().max() and not b.any()
        updates.append((row, a, b))
        for i, name in enumerate(row.hf):

            def add(_: Any, x: Any, y: torch.Tensor, row: Any = row, a: Any = a, b: Any = b, i: int = i) -> Any:
                return y + ALPHA / RANK * (x[0] @ a.T @ row.layout.unpack(b, architecture)[i].T)

            reference.get_submodule(name.removesuffix(".weight")).register_forward_hook(add)
    parameters = [part for _, *both in updates for part in both]
    assert {name for name in start if name.endswith(("lora_A", "lora_B")) and not name.startswith("optimizer")} == {
        row.megatron.removesuffix("weight") + name for row, *_ in updates for name in ("lora_A", "lora_B")
    }
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    data = samples(workspace / "text", tmp_path / "cache", STEPS * BATCH)
    check_steps(read_log(trained[model]), reference, optimizer, data)
    before, merged = load_file(workspace / model / "model.safetensors"), exported(trained[model], tmp_path / "hf")
    assert before.keys() == merged.keys()
    changes = {
        name: part
        for row, a, b in updates
        for name, part in zip(row.hf, row.layout.unpack(ALPHA / RANK * b @ a, architecture), strict=True)
    }
    for name, tensor in merged.items():
        if name in changes:
            assert changes[name].abs().max() > 1e-3, name
            assert (tensor - (before[name] + changes[name])).abs().max() < 1e-6, name
        else:
            assert torch.equal(tensor, before[name]), name


def test_begins_as_the_frozen_model_and_leaves_it_alone(
    workspace: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """The loss of the first step is that of the model without updates, to the last digit."""
    plain = finetune(workspace, "mla", tmp_path / "plain", "steps=1", "optimizer.warmup_steps=0")
    assert log_text(plain)[0][1] == log_text(trained["mla"])[0][1]
    before, after = checkpoint_tensors(workspace / "mla-megatron", 0), checkpoint_tensors(trained["mla"], STEPS)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.rsplit(".", 1)[1] for name in after if name.startswith("optimizer.")} == {"lora_A", "lora_B"}


def test_resumed_equals_unbroken_bit_for_bit(workspace: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    root = put_back(trained["mla"], tmp_path / "run", 3)
    finetune(workspace, "mla", root, *SCHEDULE, *LORA)
    assert log_text(root) == log_text(trained["mla"])
    expected, found = checkpoint_tensors(trained["mla"], STEPS), checkpoint_tensors(root, STEPS)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint_values(root, STEPS) == checkpoint_values(trained["mla"], STEPS)


def test_other_updates_than_before_are_refused(workspace: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    root = put_back(trained["mla"], tmp_path / "run", 3)
    for words in ([*LORA, "lora.alpha=8"], [*LORA, "lora.rank=2"], [*LORA, "lora.targets=[attention]"], []):
        line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE, *words))
        assert all(part in line for part in ["lora: ", "iter_0000003", "settings.yaml", "load="]), line
    plain = finetune(workspace, "mla", tmp_path / "plain", "steps=1", "optimizer.warmup_steps=0")
    line = refused("finetune", *run_words(workspace, "mla", plain, *SCHEDULE, *LORA))
    assert "lora: " in line and "iter_0000001" in line, line


def test_every_tool_takes_it_for_the_merged_model(workspace: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    """Export, verification, a run that starts from it, one that learns from it, and inspection."""
    root, hf = trained["mla"], tmp_path / "hf"
    merged = exported(root, hf)
    report = run_tool("verify_conversion", root, hf).stdout
    assert "FAIL" not in report.upper() and "equal" in report, report
    run_tool("convert_hf_to_megatron", hf, tmp_path / "megatron")
    words = ("steps=1", "optimizer.warmup_steps=0", "optimizer.lr=0", "optimizer.decay_steps=1")
    one, other = (
        finetune(workspace, "mla", tmp_path / f"run{i}", *words, f"load={source}", f"distillation.teacher={source}")
        for i, source in enumerate((root, tmp_path / "megatron"))
    )
    assert log_text(one) == log_text(other)
    again = exported(one, tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    text = run_tool("inspect_checkpoint", root).stdout
    assert "lora_alpha 10.0" in text and "linear_q.lora_A" in text


def test_updates_that_do_not_fit_are_named() -> None:
    model = {"x.weight": (6, 4), "norm.weight": (4,)}
    good = {**model, "x.lora_A": (2, 4), "x.lora_B": (6, 2)}
    check_coverage(good, model, Path("step"))
    for change, named in (
        ({"x.lora_B": (6, 3)}, "x.lora_B has shape (6, 3)"),
        ({"x.lora_A": (2, 5)}, "x.lora_A has shape (2, 5)"),
        ({"norm.lora_A": (2, 4)}, "surplus tensor norm.lora_A"),
    ):
        with pytest.raises(UserError, match=re.escape(named)):
            check_coverage({**good, **change}, model, Path("step"))
    with pytest.raises(UserError, match="lora_B is missing"):
        check_coverage({name: shape for name, shape in good.items() if name != "x.lora_B"}, model, Path("step"))


def test_bfloat16_is_merged_in_float32(workspace: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    """The model that is exported is the one that was trained: an update's product is rounded once, with its matrix."""
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *LORA, "dtype=bfloat16")
    assert losses(root) == pytest.approx(losses(trained["mla"]), rel=2e-2)
    tensors, merged = checkpoint_tensors(root, STEPS), exported(root, tmp_path / "hf")
    assert {t.dtype for name, t in tensors.items() if name.startswith("optimizer.")} == {torch.float32}
    a, b = (tensors[f"decoder.layers.1.self_attention.linear_q.lora_{x}"] for x in "AB")
    weight = tensors["decoder.layers.1.self_attention.linear_q.weight"]
    assert a.dtype == b.dtype == weight.dtype == torch.bfloat16
    expected = (weight.float() + ALPHA / RANK * (b.float() @ a.float())).bfloat16()
    assert torch.equal(merged["model.layers.1.self_attn.q_proj.weight"], expected)
    assert not torch.equal(expected, weight)


def test_updated_weights_are_not_kept(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is formed twice: forward, and where the backward pass needs it. Recomputed layers form it once more."""
    formed, form = [], LowRankUpdate._updated_weight

    def count(layer: LowRankUpdate) -> torch.Tensor:
        formed.append(type(layer).__name__)
        return form(layer)

    monkeypatch.setattr(LowRankUpdate, "_updated_weight", count)
    words = (
        "steps=1",
        "optimizer.warmup_steps=0",
        "lora.rank=2",
        "lora.targets=['*.linear_q.weight','*.linear_fc2.*']",
    )
    once = finetune(workspace, "mla", tmp_path / "once", *words)
    layers, micro_batches = 2 * 4, BATCH // 2
    assert len(formed) == 2 * layers * micro_batches, formed
    formed.clear()
    again = finetune(workspace, "mla", tmp_path / "again", *words, "recompute=full")
    assert len(formed) == 3 * layers * micro_batches
    assert losses(again) == losses(once)
    before, after = checkpoint_tensors(once, 1), checkpoint_tensors(again, 1)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rates_of_b_may_be_others(workspace: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    words = (*SCHEDULE, *LORA, 'optimizer.lr_scale={"*.lora_A": 0, "*.lora_B": 2}')
    root = finetune(workspace, "mla", tmp_path / "run", *words)
    first, last, usual = checkpoint_tensors(root, 1), checkpoint_tensors(root, 2), checkpoint_tensors(trained["mla"], 2)
    for name, tensor in first.items():
        if name.endswith("lora_A"):
            assert torch.equal(last[name], tensor), name
        elif name.endswith("lora_B") and not name.startswith("optimizer."):
            assert torch.allclose(last[name], 2 * usual[name], rtol=1e-5), name


BAD_WORDS: dict[str, tuple[list[str], list[str]]] = {
    "no such matrix": (["lora.targets=['*.q_proj.*']"], ["lora.targets", "'*.q_proj.*'", "latents", "linear_q.weight"]),
    "vectors": (["lora.targets=[norms]"], ["lora.targets", "'norms'", "matches no matrix"]),
    "embedding": (["lora.targets=['embedding.*']"], ["lora.targets", "'embedding.*'", "matches no matrix"]),
    "none": (["lora.targets=[]"], ["lora.targets", "empty"]),
    "wide": (["lora.rank=9"], ["lora.rank: 9", "layers.1.self_attention.linear_k_rope.weight", "8 x 64", "1 to 8"]),
    "zero": (["lora.rank=0"], ["lora.rank", "0"]),
    "alpha": (["lora.alpha=-1"], ["lora.alpha", "-1"]),
    "no rank": (["lora.rank=null", "lora.alpha=8"], ["lora.rank is not"]),
    "frozen rate": (["optimizer.lr_scale={mlp: 0.5}"], ["optimizer.lr_scale", "'mlp'", "that lora trains", "lora_A"]),
    "all frozen": (["optimizer.lr_scale={'*': 0}"], ["optimizer.lr_scale", "every tensor is frozen"]),
    "8 bits": (["fp8=delayed"], ["fp8", "delayed", "lora"]),
    "latent": (["recompute=latent"], ["recompute", "lora.rank null"]),
    "fused": (["implementation=local_fused"], ["implementation", "local_fused", "lora", "valid: local"]),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_settings_are_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else local_fused is refused for another reason
    words, named = BAD_WORDS[case]
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "run", "steps=6", "lora.rank=2", *words))
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == [], "something was written"
