"""What only a GPU can show: Transformer Engine's logits in bf16, and the training step of both models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_tool


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_benchmark_agrees_and_trains(tmp_path: Path) -> None:
    """The benchmark itself compares the logits of both specs with transformers' and fails above its noise floor."""
    assert (ROOT / "tools" / "benchmarks" / "train_step.py").is_file()
    words = ["shapes=[tiny]", "parity_shape=tiny", "steps=2", "rounds=1", f"output={tmp_path / 'out.json'}"]
    run_tool("benchmarks/train_step", *words, own_process=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["model"] for row in result["speed"]} == {"original", "converted"}
    assert all(row["error"] < 0.1 for row in result["parity"])
