"""tools/export_deepseek.py: transformers' own DeepSeek-V2 gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_llama, refused, run_tool

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """In float64, so that a difference is one of the stored float32 weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    return model.eval()(TOKENS).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("groups", "strategy", "rope", "table"),
    [
        (2, "low", {}, "longrope"),
        (2, "uniform", {"rope_parameters": LLAMA3}, "longrope"),
        (1, "uniform", {}, "default"),
    ],
)
def test_same_logits(tmp_path: Path, groups: int, strategy: str, rope: dict[str, Any], table: str) -> None:
    """Queries and up-projections are scaled and rounded to float32 once more, which changes logits of standard
    deviation 1.2 by some 1e-6; a wrong pair, block, scale or norm changes them by more than 0.01."""
    source, mla, target = tmp_path / "original", tmp_path / "mla", tmp_path / "deepseek"
    make_llama(source, groups=groups, **rope)
    words = [f"partial_rope.strategy={strategy}", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=20"]
    words += ["low_rank.k_lora_rank=9"] * (groups == 1)  # keys of a part of the latent
    run_tool("convert_mha_to_mla", source, mla, *words)
    run_tool("export_deepseek", mla, target)
    config = config_of(target)
    assert config["rope_parameters"]["rope_type"] == table
    assert config["qk_rope_head_dim"] == 4 * groups and config["kv_lora_rank"] == 20
    torch.testing.assert_close(logits(target), logits(mla), atol=2e-5, rtol=0)


def test_what_the_layout_cannot_say(tmp_path: Path) -> None:
    source, biased = make_llama(tmp_path / "original"), make_llama(tmp_path / "biased", bias=True)
    by_layer = ["partial_rope.qk_rope_head_dim=[4,8,4]", "low_rank.kv_lora_rank=20"]
    cases = {
        "r or c differ by layer": (source, by_layer),
        "low_rank.method=split": (source, ["partial_rope.qk_rope_head_dim=4", "low_rank.method=split",
                                           "low_rank.kv_lora_rank=12"]),
        "attention_bias": (biased, ["partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=20"]),
    }  # fmt: skip
    for i, (message, (model, words)) in enumerate(cases.items()):
        run_tool("convert_mha_to_mla", model, tmp_path / f"mla{i}", *words)
        assert message in refused("export_deepseek", tmp_path / f"mla{i}", tmp_path / "out")
    assert "is not converted" in refused("export_deepseek", source, tmp_path / "out")
    scores = tmp_path / "scores.safetensors"
    save_file({"scores": torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(0))}, scores)
    words = ["partial_rope.strategy=2-norm", f"partial_rope.scores={scores}", "partial_rope.qk_rope_head_dim=4"]
    run_tool("convert_mha_to_mla", source, tmp_path / "pairs", *words, "low_rank.kv_lora_rank=20")
    assert "differ between layers" in refused("export_deepseek", tmp_path / "pairs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
