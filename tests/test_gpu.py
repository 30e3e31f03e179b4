"""What only a GPU can show: Transformer Engine's logits in bf16, and the training step of both models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.conftest import ROOT, make_tokenizer, run_tool
from tests.finetune_cases import exported, finetune, losses, make_workspace, run_words, write_tokens
from tests.test_shared_rope import convert, make_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_benchmark_agrees_and_trains(tmp_path: Path) -> None:
    """The benchmark itself compares the logits of both specs with transformers' and fails above its noise floor."""
    assert (ROOT / "tools" / "benchmarks" / "train_step.py").is_file()
    words = ["shapes=[tiny]", "parity_shape=tiny", "steps=2", "rounds=1", f"output={tmp_path / 'out.json'}"]
    run_tool("benchmarks/train_step", *words, own_process=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["model"] for row in result["speed"]} == {"original", "mla-68.75"}
    assert all(row["error"] < 0.1 for row in result["parity"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
@pytest.mark.parametrize("model", ["original", "mla"])
def test_context_parallelism_trains_like_one_gpu(tmp_path: Path, model: str) -> None:
    """Transformer Engine's two ways of it, in bf16: losses differ by its rounding, wrong positions by far more."""
    workspace = make_workspace(tmp_path)
    words = ["implementation=transformer_engine", "steps=6", "save_interval=6", "optimizer.warmup_steps=1"]
    expected = losses(finetune(workspace, model, tmp_path / "single", *words, own_process=True))
    for comm in ("p2p", "all_gather"):
        root = tmp_path / comm
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        layout = ["parallel.context_parallel_size=2", f"parallel.cp_comm_type={comm}"]
        command = [*launcher, ROOT / "tools" / "finetune.py", *run_words(workspace, model, root, *words, *layout)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(root) == pytest.approx(expected, rel=2e-2), comm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("model", "teacher"), [("original", None), ("mla", None), ("mla", "original")])
def test_a_graph_trains_like_single_kernels(tmp_path: Path, model: str, teacher: str | None) -> None:
    """Sums of bf16 gradients run in another order from run to run, by far less than one wrong batch shows."""
    workspace = make_workspace(tmp_path)
    words = []
    if teacher:  # and a weight that is another in each step: a graph that kept that of its capture shows in the loss
        words = [f"distillation.teacher={workspace / teacher}-megatron", "distillation.weight=1"]
        words += ["distillation.final_weight=0", "distillation.decay_steps=10", "distillation.attention_weight=0.5"]
    words += ["implementation=transformer_engine", "steps=10", "save_interval=5", "optimizer.warmup_steps=1"]
    expected = losses(finetune(workspace, model, tmp_path / "plain", *words, own_process=True))
    graphed = losses(finetune(workspace, model, tmp_path / "graph", *words, "cuda_graph=true", own_process=True))
    assert len(graphed) == 10
    assert graphed == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_of_the_distillation_loss() -> None:
    command = [sys.executable, "-m", "tests.vocab_parallel_cases", "200", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "200 cases\n"), done.stderr


SHORT_RUN = ["steps=8", "save_interval=8", "optimizer.warmup_steps=1", "optimizer.lr=1e-2"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "words", [["lora.rank=4", "lora.targets=[attention, mlp]"], ["optimizer.ema_decay=0.5"]], ids=["lora", "average"]
)
def test_settings_train_alike_in_both_implementations(tmp_path: Path, words: list[str]) -> None:
    """bf16 and two ways of the same layer: rounding is all that may differ."""
    workspace = make_workspace(tmp_path)
    average = ["weights=average"] if "optimizer.ema_decay=0.5" in words else []
    found = {}
    for name in ("local", "transformer_engine"):
        implementation = f"implementation={name}"
        run = finetune(workspace, "mla", tmp_path / name, *words, *SHORT_RUN, implementation, own_process=True)
        found[name] = losses(run), exported(run, tmp_path / f"{name}-hf", *average)
    (expected, exact), (got, tensors) = found.values()
    assert got == pytest.approx(expected, rel=1e-2)
    errors = {name: (tensors[name].float() - t.float()).norm() / t.float().norm() for name, t in exact.items()}
    # 0.004 was seen; a tensor that is not trained, or trained twice, differs by more than 0.1.
    assert max(errors.values()) < 0.02, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("words", [[], ["recompute=latent"], ["cuda_graph=true"]], ids=["plain", "latent", "graph"])
def test_wide_queries_and_keys_train_alike_in_both_implementations(
    tmp_path: Path, text: Path, words: list[str]
) -> None:
    """Of r + d dims, beside values of d: bf16 and two ways of the same layer."""
    original, statistics = make_model(tmp_path, text)
    wide = ["partial_rope.shared=true", "partial_rope.qk_rope_head_dim=[0,8,16]", "partial_rope.qk_nope_head_dim=16"]
    convert(original, tmp_path / "mla", statistics, *wide, "low_rank.method=joint", "low_rank.kv_lora_rank=24")
    run_tool("convert_hf_to_megatron", tmp_path / "mla", tmp_path / "mla-megatron")
    write_tokens(tmp_path / "text")
    (tmp_path / "settings.yaml").write_text("")
    expected, got = (
        losses(finetune(tmp_path, "mla", tmp_path / name, *SHORT_RUN, *more, own_process=True))
        for name, more in (
            ("local", ["implementation=local"]), ("te", ["implementation=transformer_engine", *words]),
        )
    )  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_experts_train_alike_in_both_implementations(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "original")
    make_tokenizer(tmp_path / "original")
    words = ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=24"]
    run_tool("convert_mha_to_mla", tmp_path / "original", tmp_path / "mla", *words)
    run_tool("convert_hf_to_megatron", tmp_path / "mla", tmp_path / "mla-megatron")
    write_tokens(tmp_path / "text")
    (tmp_path / "settings.yaml").write_text("")
    expected, got = (
        losses(finetune(tmp_path, "mla", tmp_path / name, *SHORT_RUN, f"implementation={name}", own_process=True))
        for name in ("local", "transformer_engine")
    )
    # A rounding sends a token to another expert now and then.
    assert got == pytest.approx(expected, rel=2e-2)
