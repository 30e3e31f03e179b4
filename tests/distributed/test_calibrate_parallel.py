"""Calibration on two processes gives the statistics of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import PROSE, ROOT, make_llama, make_tokenizer, run_tool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def provenance(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as tensors:
        return json.loads(tensors.metadata()["provenance"])


def test_same_as_one_process(tmp_path: Path) -> None:
    """An odd number of sequences: one process has a batch more, and one more sequence, than the other. They have one
    layer in memory at a time, the one process all."""
    model, text = make_tokenizer(make_llama(tmp_path / "model", bias=True)), tmp_path / "text.txt"
    text.write_text("\n".join(PROSE * 4))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ["sequence_length=32", "samples=5", "batch_size=2"]
    run_tool("calibrate", model, text, one, *words)
    done = subprocess.run(
        [*LAUNCHER, str(ROOT / "tools" / "calibrate.py"), str(model), str(text), str(two), *words, "memory=1KB"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("statistics of 160 tokens") == 1
    assert provenance(one) == provenance(two)
    expected, found = load_file(one), load_file(two)
    assert expected.keys() == found.keys()
    assert torch.equal(expected.pop("sequences"), found["sequences"])
    for name, tensor in expected.items():
        # float32 sums in another order; a sequence left out or counted twice shows at 1e-1.
        assert (tensor - found[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
