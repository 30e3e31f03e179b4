"""LongBench on two processes gives the predictions and scores of one, also where one of them was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_tool
from tests.test_evaluate_longbench import ROWS, data, model, predictions  # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_same_as_one_process(tmp_path: Path, model: Path, data: Path) -> None:  # noqa: F811
    """Batches of two over an odd number of samples; the second rank finds a line of a run of three, torn at its end."""
    one, two, words = tmp_path / "one", tmp_path / "two", ["max_tokens=60", "batch_size=2"]
    run_tool("evaluate_longbench", model, data, one, *words)
    run_tool("evaluate_longbench", model, data, two, *words, "tasks=[samsum]")
    lines = (one / "journal" / "0.jsonl").read_bytes().splitlines(keepends=True)
    (two / "journal" / "2.jsonl").write_bytes(lines[0] + lines[1][:-2])
    tool = str(ROOT / "tools" / "evaluate_longbench.py")
    done = subprocess.run(
        [*LAUNCHER, tool, str(model), str(data), str(two), *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| hotpotqa |") == 1
    assert all(predictions(one, task) == predictions(two, task) for task in ROWS)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert first == second
    written = [len(file.read_bytes().splitlines()) for file in sorted((two / "journal").glob("*.jsonl"))]
    assert len(written) == 3 and min(written) >= 1 and sum(written) == sum(map(len, ROWS.values())) + 1  # the torn one
