"""Distillation and validation as a user runs them, against torch and transformers; the KL split over a vocabulary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from matplotlib.axes import Axes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mha2mla_megatron.data.dataset import build_dataset
from mha2mla_megatron.training import loop, step_graph
from mha2mla_megatron.training.run_picture import plot_runs
from tests.conftest import ROOT, make_llama, refused, run_tool
from tests.distributed.losses_worker import TEMPERATURE, split_losses
from tests.finetune_cases import (
    BATCH,
    EOD,
    LENGTH,
    VOCABULARY,
    checkpoint_tensors,
    finetune,
    log_text,
    logits_of,
    make_workspace,
    put_back,
    read_log,
    run_words,
    samples,
    steps_of,
    write_tokens,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

SCHEDULE = ("steps=4", "save_interval=2", "optimizer.warmup_steps=2", "optimizer.decay_steps=1")
WEIGHT, HELD_OUT = 0.7, 5
MATCHED = 0.6
"""Weight of attention outputs."""
BIASED = ("partial_rope.qk_rope_head_dim=8", "low_rank.method=split", "low_rank.kv_lora_rank=12")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("distillation"))
    write_tokens(root / "heldout", documents=25)
    return root


def teacher(workspace: Path, model: str = "original", weight: float = WEIGHT, temperature: float = 1.0) -> list[str]:
    return [
        f"distillation.teacher={workspace / model}-megatron", f"distillation.weight={weight}",
        f"distillation.temperature={temperature}",
    ]  # fmt: skip


def validation(workspace: Path) -> list[str]:
    return [f"validation.data={workspace / 'heldout'}", f"validation.samples={HELD_OUT}", "validation.interval=3"]


@pytest.fixture(scope="module")
def plain(workspace: Path) -> Path:
    return finetune(workspace, "mla", workspace / "plain", *SCHEDULE)


@pytest.fixture(scope="module")
def distilled(workspace: Path) -> Path:
    words = [*teacher(workspace, temperature=TEMPERATURE), *validation(workspace)]
    return finetune(workspace, "mla", workspace / "distilled", *SCHEDULE, *words)


def kernel_cases(count: int, seed: int, **environment: str) -> str:
    """In a process of their own: Triton reads whether to interpret as it is imported."""
    command = [sys.executable, "-m", "tests.vocab_parallel_cases", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def known_tokens(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities of them and of the rest together)."""
    log_p = (teacher / TEMPERATURE).log_softmax(-1)
    values, order = log_p.sort(-1, descending=True)
    rest = values[..., k:].logsumexp(-1, keepdim=True)  # -inf where there is none
    return order[..., :k].contiguous(), torch.cat((values[..., :k], rest), -1)


def coarse_kl(student: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    log_q = (student / TEMPERATURE).log_softmax(-1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, ids, False)
    rest = log_q.masked_fill(~others, -1e300).logsumexp(-1, keepdim=True)
    log_q = torch.cat((log_q.gather(-1, ids), rest), -1)
    finite = log_p.isfinite()
    return TEMPERATURE**2 * (log_p.exp() * (log_p.masked_fill(~finite, 0) - log_q) * finite).sum(-1)


def test_losses_of_split_logits_are_torchs(tmp_path: Path) -> None:
    """float64, logits of which some are far out: forward and gradient on 1, 2 and 4 processes, also where 5 of a
    teacher's 24 tokens are known, and all of them; these as a cache's maker finds them, but in float16."""
    generator = torch.Generator().manual_seed(0)
    student, other = (30 * torch.randn((3, 5, 24), generator=generator, dtype=torch.float64) for _ in range(2))
    other[0] /= 30  # so that what is not known has a probability
    labels = torch.randint(0, 24, (3, 5), generator=generator)
    upstream = torch.randn((3, 3, 5), generator=generator, dtype=torch.float64)
    known = [known_tokens(other, k) for k in (5, 24)]
    torch.save((student, other, known, labels, upstream), tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(split_losses, (tmp_path,), nprocs=4)
    for index in range(4):
        whole = student.clone().requires_grad_()
        log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (whole, other))
        kl = TEMPERATURE**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        if index == 1:
            kl = kl * 0
        elif index == 2:  # with all tokens known it is the teacher's own
            kl = coarse_kl(whole, *known[0])
        lm = torch.nn.functional.cross_entropy(whole.transpose(1, 2), labels, reduction="none")
        expected = torch.stack((lm, kl, whole.logsumexp(-1)))
        (expected * upstream).sum().backward()
        for size in (1, 2, 4):
            found = [torch.load(tmp_path / f"{size}.{rank}.pt")[index] for rank in range(4)]
            for first in range(0, 4, size):
                torch.testing.assert_close(found[first][0], expected.detach(), rtol=1e-12, atol=1e-12)
                gradient = torch.cat([found[first + part][1] for part in range(size)], -1)
                torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-12)
    for size in (1, 2, 4):
        for rank in range(4):
            for (ids, log_probs), (given, exact) in zip(
                torch.load(tmp_path / f"{size}.{rank}.top.pt"), known, strict=True
            ):
                assert torch.equal(ids, given.flatten(0, 1))
                torch.testing.assert_close(log_probs, exact.flatten(0, 1).clamp(min=-65504).half(), rtol=0, atol=0)


def test_kernels_of_the_losses_in_the_interpreter() -> None:
    assert kernel_cases(60, 0, TRITON_INTERPRET="1") == "60 cases\n"


def test_the_loss_and_its_parts_are_those_of_transformers(workspace: Path, distilled: Path, tmp_path: Path) -> None:
    """Of the first step, whose learning rate is 0 as the second's: both of the models that were loaded."""
    tokens, labels = samples(workspace / "text", tmp_path / "cache", 2 * BATCH)
    student, other = (logits_of(workspace / model, tokens) for model in ("mla", "original"))
    lm = torch.nn.functional.cross_entropy(student.transpose(1, 2), labels, reduction="none")
    log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (student, other))
    kl = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    first = steps_of(distilled)[0]
    assert kl[:BATCH].mean() > 0.1  # there is something to compare
    assert first["lm_loss"] == pytest.approx(lm[:BATCH].mean().item(), rel=1e-5)
    assert first["kl"] == pytest.approx(kl[:BATCH].mean().item(), rel=1e-5)
    assert first["loss"] == pytest.approx((1 - WEIGHT) * first["lm_loss"] + WEIGHT * first["kl"], rel=1e-6)


def test_z_loss_is_that_of_torch_on_transformers_model(workspace: Path, tmp_path: Path) -> None:
    """Loss, parts and gradient norm of the first two steps, of which the first has rate 0; validation is without it."""
    words = [*validation(workspace), "z_loss=0.01", "validation.interval=1"]
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *words)
    model = AutoModelForCausalLM.from_pretrained(workspace / "mla", trust_remote_code=True, dtype=torch.float32)
    tokens, labels = samples(workspace / "text", tmp_path / "cache", 2 * BATCH)
    for step in range(2):
        model.zero_grad()
        logits = model(tokens[step * BATCH :][:BATCH]).logits
        lm = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[step * BATCH :][:BATCH])
        z = 0.01 * logits.logsumexp(-1).square().mean()
        (lm + z).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        line = steps_of(root)[step]
        assert z > 0.1 and line["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
        assert line["z_loss"] == pytest.approx(z.item(), rel=1e-5)
        assert line["loss"] == pytest.approx((lm + z).item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    first = next(line["validation_loss"] for line in read_log(root) if "validation_loss" in line)
    tokens, labels = samples(workspace / "heldout", tmp_path / "held-out-cache", HELD_OUT)
    expected = torch.nn.functional.cross_entropy(logits_of(workspace / "mla", tokens).transpose(1, 2), labels)
    assert first == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_the_loss_of_transformers(workspace: Path, distilled: Path, tmp_path: Path) -> None:
    """After the third step and the last one; of the latter's weights as they are exported."""
    found = [line for line in read_log(distilled) if "validation_loss" in line]
    assert [line["step"] for line in found] == [3, 4] and found[0]["validation_loss"] != found[1]["validation_loss"]
    run_tool("convert_megatron_to_hf", distilled, tmp_path / "exported")
    tokens, labels = samples(workspace / "heldout", tmp_path / "cache", HELD_OUT)
    logits = logits_of(tmp_path / "exported", tokens)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels).item()
    assert found[1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("matched", [0, MATCHED])
def test_weight_0_and_validation_change_no_bit(workspace: Path, plain: Path, tmp_path: Path, matched: float) -> None:
    words = [*teacher(workspace, weight=0), *validation(workspace), f"distillation.attention_weight={matched}"]
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *words)
    lines = (root / "log.jsonl").read_text().splitlines(keepends=True)
    (root / "log.jsonl").write_text("".join(line for line in lines if "validation_loss" not in line))
    assert log_text(root) == log_text(plain) and all(line["kl"] > 0.1 for line in read_log(root))
    assert all(line["attention_loss"] > 0.1 if matched else "attention_loss" not in line for line in read_log(root))
    before, after = checkpoint_tensors(plain, 4), checkpoint_tensors(root, 4)
    assert before.keys() == after.keys()  # the teacher is not saved
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def changing(workspace: Path, first: float, last: float) -> list[str]:
    return [*teacher(workspace, weight=first, temperature=TEMPERATURE), f"distillation.final_weight={last}"]


def test_a_changing_weight_is_that_of_each_step(workspace: Path, tmp_path: Path) -> None:
    """Weight, loss and gradient norm of each step, of two micro batches, by transformers; the weights stay."""
    words = [*changing(workspace, 0.9, 0.3), "distillation.decay_steps=3", "optimizer.lr=0"]
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, "steps=5", *words)
    model = AutoModelForCausalLM.from_pretrained(workspace / "mla", trust_remote_code=True, dtype=torch.float32)
    tokens, labels = samples(workspace / "text", tmp_path / "cache", 5 * BATCH)
    lines = steps_of(root)
    assert [line["distillation_weight"] for line in lines] == pytest.approx([0.9, 0.9, 0.7, 0.5, 0.3], rel=1e-12)
    for step, w in enumerate((0.9, 0.9, 0.7, 0.5, 0.3)):
        model.zero_grad()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        logits = model(tokens[batch]).logits
        lm = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[batch])
        log_p = (logits_of(workspace / "original", tokens[batch]).float() / TEMPERATURE).log_softmax(-1)
        log_q = (logits / TEMPERATURE).log_softmax(-1)
        kl = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ((1 - w) * lm + w * kl).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert lines[step]["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
        assert lines[step]["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert lines[step]["loss"] == pytest.approx(((1 - w) * lm + w * kl).item(), rel=1e-5)
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_changing_weight_resumes_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    """Broken within the change, which is as long as the learning rate's decay."""
    words = [*SCHEDULE, "steps=7", "optimizer.decay_steps=5", *changing(workspace, 0.2, 1)]
    whole = finetune(workspace, "mla", tmp_path / "whole", *words)
    weights = [line["distillation_weight"] for line in steps_of(whole)]
    assert weights == pytest.approx([0.2, 0.2, 0.36, 0.52, 0.68, 0.84, 1], rel=1e-12)
    broken = finetune(workspace, "mla", put_back(whole, tmp_path / "broken", 4), *words)
    kept = ("step", "loss", "lm_loss", "kl", "distillation_weight", "grad_norm", "lr")
    first, second = ([{key: line[key] for key in kept} for line in steps_of(run)] for run in (whole, broken))
    assert first == second and len(first) == 7
    before, after = checkpoint_tensors(whole, 7), checkpoint_tensors(broken, 7)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def attention_outputs(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what each layer's attention adds to the residual stream [layers, b, s, h], logits) of a transformers model."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
        for layer in model.model.layers
    ]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs), logits


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an original and a converted model whose attention outputs have biases."""
    root = tmp_path_factory.mktemp("biased")
    original = make_llama(root / "original", bias=True, num_hidden_layers=3)
    run_tool("convert_mha_to_mla", original, root / "mla", *BIASED)
    for model in ("original", "mla"):
        run_tool("convert_hf_to_megatron", root / model, root / f"{model}-megatron")
    write_tokens(root / "text")
    (root / "settings.yaml").write_text("")
    return root


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_matching_of_attention_outputs_is_that_of_transformers(biased: Path, tmp_path: Path, recompute: str) -> None:
    """All parts of the loss and the gradient norm of five steps, of two micro batches, some tokens of which have no
    loss; w is another in each. The weights stay."""
    words = [*changing(biased, 0.9, 0.3), "distillation.decay_steps=3", f"distillation.attention_weight={MATCHED}"]
    words += ["optimizer.lr=0", "data.eod_mask_loss=true", f"recompute={recompute}"]
    root = finetune(biased, "mla", tmp_path / "run", *SCHEDULE, "steps=5", *words)
    model, other = (
        AutoModelForCausalLM.from_pretrained(biased / name, trust_remote_code=True, dtype=torch.float32)
        for name in ("mla", "original")
    )
    dataset: Any = build_dataset(
        str(biased / "text"), LENGTH, 5 * BATCH, 1234, True, EOD, VOCABULARY, tmp_path / "cache"
    )
    for step, (line, w) in enumerate(zip(steps_of(root), (0.9, 0.9, 0.7, 0.5, 0.3), strict=True)):
        rows = [dataset[step * BATCH + index] for index in range(BATCH)]
        tokens, labels, mask = (torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask"))
        assert 0 < mask.mean() < 1
        model.zero_grad()
        ours, logits = attention_outputs(model, tokens)
        with torch.no_grad():
            theirs, taught = attention_outputs(other, tokens)
        lm = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, taught))
        kl = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        matched = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean(0)
        lm, kl, matched = ((part * mask).sum() / mask.sum() for part in (lm, kl, matched))
        loss = (1 - w) * lm + w * (kl + MATCHED * matched)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert matched > 0.1, "nothing to compare"
        found = [line[key] for key in ("lm_loss", "kl", "attention_loss", "loss")]
        assert found == pytest.approx([part.item() for part in (lm, kl, matched, loss)], rel=1e-5)  # float32
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_recomputed_layers_match_as_others(biased: Path, tmp_path: Path) -> None:
    words = [*teacher(biased), f"distillation.attention_weight={MATCHED}"]
    kept, again = (
        finetune(biased, "mla", tmp_path / recompute, *SCHEDULE, *words, f"recompute={recompute}")
        for recompute in ("none", "full")
    )
    assert log_text(again) == log_text(kept)
    before, after = checkpoint_tensors(kept, 4), checkpoint_tensors(again, 4)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def test_a_layer_of_the_teacher_that_adds_nothing_has_no_term(workspace: Path, tmp_path: Path) -> None:
    """It would be divided by 0."""
    folder = shutil.copytree(workspace / "original", tmp_path / "original")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight.zero_()
    other.save_pretrained(folder)
    run_tool("convert_hf_to_megatron", folder, tmp_path / "original-megatron")
    words = [*teacher(tmp_path), f"distillation.attention_weight={MATCHED}", "optimizer.lr=0", "steps=1"]
    words += ["optimizer.warmup_steps=0"]
    (line,) = steps_of(finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *words))
    tokens, _ = samples(workspace / "text", tmp_path / "cache", BATCH)
    model = AutoModelForCausalLM.from_pretrained(workspace / "mla", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        (ours, _), (theirs, _) = attention_outputs(model, tokens), attention_outputs(other, tokens)
    terms = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
    assert not terms[1].isfinite().any()
    assert line["attention_loss"] == pytest.approx(terms[[0, 2, 3]].mean().item() * 3 / 4, rel=1e-5)
    assert 0 < line["grad_norm"] < 1e3  # neither NaN nor infinite


def test_losses_of_sources_have_what_layers_add(workspace: Path, tmp_path: Path) -> None:
    """Their mean over all tokens is the loss."""
    blend = f"data.train={{{workspace / 'text'}: 0.6, {workspace / 'heldout'}: 0.4}}"
    words = [*teacher(workspace, weight=1), f"distillation.attention_weight={MATCHED}", blend]
    for line in steps_of(finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *words)):
        assert line["attention_loss"] > 0.1
        assert line["loss"] == pytest.approx(line["kl"] + MATCHED * line["attention_loss"], rel=1e-6)
        seen = line["sources"].values()
        total = sum(source["loss"] * source["tokens"] for source in seen) / sum(source["tokens"] for source in seen)
        assert total == pytest.approx(line["loss"], rel=1e-6)


class Inputs(TorchDispatchMode):
    """In the place of a CUDA graph: notes scalars in float64 that it reads, not on the host, and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []  # all of them live on, so that no later one has their memory
        self.read: dict[int, torch.Tensor] = {}
        self.at_replay: list[list[float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = {tensor.data_ptr() for tensor in self.made}
        on_host = func is torch.ops.aten._local_scalar_dense.default
        scalars = [v for v in args if isinstance(v, torch.Tensor) and v.dtype == torch.float64 and v.ndim == 0]
        self.read |= {v.data_ptr(): v for v in scalars if v.data_ptr() not in made and not on_host}
        found = func(*args, **(kwargs or {}))
        self.made += [found] if isinstance(found, torch.Tensor) and found.dtype == torch.float64 else []
        return found

    def replay(self) -> None:
        self.at_replay.append([value.item() for value in self.read.values()])


def test_a_graph_reads_the_weight_of_each_step(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its memory, at each replay; on a GPU tests/test_gpu.py trains so."""
    graph = Inputs()

    def capture[T](run: Callable[[], T]) -> tuple[Inputs, T]:
        with graph:
            return graph, run()

    monkeypatch.setattr(step_graph, "capture", capture)
    monkeypatch.setattr(loop, "graph_of", lambda *_: step_graph.StepGraph())
    words = [*SCHEDULE, "steps=6", "distillation.decay_steps=4", *changing(workspace, 0.9, 0.1)]
    words.append(f"distillation.attention_weight={MATCHED}")
    finetune(workspace, "mla", tmp_path / "run", *words)
    assert graph.at_replay == [[pytest.approx(w)] for w in (0.5, 0.3, 0.1)]


@pytest.mark.parametrize(("model", "dtype"), [("original", "float32"), ("mla", "bfloat16")])
def test_a_model_learns_nothing_from_itself(workspace: Path, tmp_path: Path, model: str, dtype: str) -> None:
    words = [*teacher(workspace, model, weight=1, temperature=TEMPERATURE), f"dtype={dtype}"]
    words.append("distillation.attention_weight=1")
    root = finetune(workspace, model, tmp_path / "run", *SCHEDULE, "steps=3", "optimizer.weight_decay=0", *words)
    for line in steps_of(root):
        assert [line[key] for key in ("loss", "kl", "attention_loss", "grad_norm")] == [0] * 4 and line["lm_loss"] > 1


def test_resumed_equals_unbroken_bit_for_bit(workspace: Path, distilled: Path, tmp_path: Path) -> None:
    root = put_back(distilled, tmp_path / "run", 2)
    words = [*teacher(workspace, temperature=TEMPERATURE), *validation(workspace)]
    finetune(workspace, "mla", root, *SCHEDULE, *words)
    kept = ("step", "loss", "lm_loss", "kl", "validation_loss", "grad_norm", "lr")
    first, second = ([{key: line.get(key) for key in kept} for line in read_log(run)] for run in (distilled, root))
    assert first == second and len(first) == 6
    before, after = checkpoint_tensors(distilled, 4), checkpoint_tensors(root, 4)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


BAD_WORDS = {
    "missing": (["distillation.teacher=/nowhere"], ["distillation.teacher", "/nowhere", "not a Megatron checkpoint"]),
    "no teacher": (["distillation.weight=0.9"], ["distillation.weight", "0.9", "distillation.teacher"]),
    "weight": (["distillation.teacher=x", "distillation.weight=1.5"], ["distillation.weight", "1.5", "0 and 1"]),
    "final weight": (["distillation.teacher=x", "distillation.final_weight=-1"], ["final_weight", "-1", "0 and 1"]),
    "final weight alone": (["distillation.final_weight=0"], ["distillation.final_weight", "0.0", "teacher"]),
    "no step": (
        ["distillation.teacher=x", "distillation.final_weight=0", "distillation.decay_steps=0"],
        ["distillation.decay_steps", "0"],
    ),
    "too many steps": (
        ["distillation.teacher=x", "distillation.final_weight=0", "distillation.decay_steps=7"],
        ["distillation.decay_steps", "7", "steps 6"],
    ),
    "no final weight": (
        ["distillation.teacher=x", "distillation.decay_steps=3"], ["distillation.decay_steps", "3", "final_weight"]
    ),
    "temperature": (["distillation.teacher=x", "distillation.temperature=0"], ["distillation.temperature", "0.0"]),
    "heat": (["distillation.teacher=x", "distillation.temperature=1e6"], ["temperature", "1000000.0", "0.01 and 100"]),
    "attention": (
        ["distillation.teacher=x", "distillation.attention_weight=-1"], ["distillation.attention_weight", "-1.0"]
    ),
    "attention alone": (
        ["distillation.attention_weight=1"], ["distillation.attention_weight", "1.0", "distillation.teacher"]
    ),
    "layers": (
        ["distillation.teacher={tmp}/teacher", "distillation.attention_weight=1"],
        ["distillation.attention_weight: 1.0", "num_hidden_layers 4", "{tmp}/teacher has 3", "valid: 0"],
    ),
    "width": (
        ["distillation.teacher={tmp}/teacher", "distillation.attention_weight=1"],
        ["distillation.attention_weight: 1.0", "hidden_size 64", "{tmp}/teacher has 32", "valid: 0"],
    ),
    "vocabulary": (["distillation.teacher={tmp}/teacher"], ["distillation.teacher", "257", "256"]),
    "context": (["distillation.teacher={tmp}/teacher"], ["distillation.teacher", "sequence_length", "16"]),
    "damaged": (["distillation.teacher={tmp}/teacher"], ["distillation.teacher", "{tmp}/teacher/iter_0000000"]),
    "z loss": (["z_loss=-1"], ["z_loss", "-1", "at least 0"]),
    "no samples": (["validation.data=/nowhere/text"], ["validation.data", "/nowhere/text.bin"]),
    "samples": (["validation.samples=0"], ["validation.samples", "0"]),
    "blend": (["validation.data=[1]"], ["validation.data", "prefix"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_settings_are_refused(tmp_path: Path, workspace: Path, case: str) -> None:
    words, named = BAD_WORDS[case]
    changes = {
        "vocabulary": {"vocab_size": 257}, "context": {"max_position_embeddings": 16}, "damaged": {},
        "layers": {"num_hidden_layers": 3}, "width": {"hidden_size": 32},
    }  # fmt: skip
    if case in changes:
        wrong = shutil.copytree(workspace / "original-megatron", tmp_path / "teacher")
        config = json.loads((wrong / "hf" / "config.json").read_text())
        (wrong / "hf" / "config.json").write_text(json.dumps({**config, **changes[case]}))
        if case == "damaged":
            data = next(wrong.glob("iter_*/*.distcp"))
            data.write_bytes(data.read_bytes()[:1000])
    words = run_words(workspace, "mla", tmp_path / "run", "steps=6", *(word.format(tmp=tmp_path) for word in words))
    line = refused("finetune", *words)
    assert all(part.format(tmp=tmp_path) in line for part in named), line
    assert not (tmp_path / "run").exists(), "something was written"


@pytest.mark.parametrize("name", [r"$\foo$", "_hidden", "100 % of $ 1"])
def test_a_run_of_any_name_has_its_line_in_the_legend(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown: list[str] = []
    legend = Axes.legend

    def recorded(axes: Axes, *arguments: Any, **settings: Any) -> Any:
        made = legend(axes, *arguments, **settings)
        shown.extend(text.get_text() for text in made.get_texts())
        return made

    monkeypatch.setattr(Axes, "legend", recorded)
    shutil.copytree(plain, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    plot_runs([Path(name)], tmp_path / "picture.png", overwrite=False)
    assert {text.replace("\\$", "$").strip("\N{ZERO WIDTH SPACE}") for text in shown} == {name}


def test_all_parts_of_the_loss_are_drawn(tmp_path: Path) -> None:
    parts = ("loss", "lm_loss", "kl", "attention_loss", "z_loss")
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(parts, 1.0)}) + "\n")
    drawn: list[str] = []
    plot = Axes.plot

    def recorded(axes: Axes, *points: Any, label: str, **settings: Any) -> Any:
        drawn.append(label)
        return plot(axes, *points, label=label, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", recorded)
        plot_runs([tmp_path], tmp_path / "picture.png", overwrite=False)
    assert [label.removeprefix(f"{tmp_path}").removeprefix(": ") for label in drawn] == ["", *parts[1:]]


def test_plot(workspace: Path, plain: Path, distilled: Path, tmp_path: Path) -> None:
    picture = tmp_path / "runs.png"
    run_tool("plot_run", plain, distilled, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "overwrite=true" in refused("plot_run", plain, picture)
    assert "log.jsonl" in refused("plot_run", workspace, tmp_path / "b.png")
    assert ".png" in refused("plot_run", plain, distilled)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_text('{"step": 1}\nsoon\n')
    assert "line 2" in refused("plot_run", tmp_path / "bad", tmp_path / "b.png")
    (tmp_path / "bad" / "log.jsonl").write_text('{"step": 1}\n')
    assert "nothing that could be drawn" in refused("plot_run", tmp_path / "bad", tmp_path / "b.png")
    (tmp_path / "bad" / "log.jsonl").write_text('{"step": 1')
    assert "no step" in refused("plot_run", tmp_path / "bad", tmp_path / "b.png")
