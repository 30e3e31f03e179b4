"""LongBench on two processes gives the predictions and scores of one, also where one of them was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, children, run_tool
from tests.test_evaluate_longbench import ROWS, data, model, predictions, row, write  # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

TOOL = str(ROOT / "tools" / "evaluate_longbench.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def results(out: Path) -> dict[str, Any]:
    """All of them that do not depend on how long something took."""
    found = json.loads((out / "results.json").read_text())
    for entry in (found, *found["tasks"].values()):
        assert entry.pop("decode_tokens_per_second") > 0
    return found


def test_same_as_one_process(tmp_path: Path, model: Path, data: Path) -> None:  # noqa: F811
    """Batches of two over an odd number of samples; the second rank finds a line of a run of three, torn at its end."""
    one, two, words = tmp_path / "one", tmp_path / "two", ["max_tokens=60", "batch_size=2"]
    run_tool("evaluate_longbench", model, data, one, *words)
    run_tool("evaluate_longbench", model, data, two, *words, "tasks=[samsum]")
    lines = (one / "journal" / "0.jsonl").read_bytes().splitlines(keepends=True)
    (two / "journal" / "2.jsonl").write_bytes(lines[0] + lines[1][:-2])
    done = subprocess.run(
        [*LAUNCHER, TOOL, str(model), str(data), str(two), *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| hotpotqa |") == 1
    assert all(predictions(one, task) == predictions(two, task) for task in ROWS)
    assert results(one) == results(two)
    written = [len(file.read_bytes().splitlines()) for file in sorted((two / "journal").glob("*.jsonl"))]
    assert len(written) == 3 and min(written) >= 1 and sum(written) == sum(map(len, ROWS.values())) + 1  # the torn one


PATIENCE = 120


def journals(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "journal").glob("*.jsonl"))}


def test_killed_in_the_middle(tmp_path: Path, model: Path) -> None:  # noqa: F811
    """Both of two processes get SIGKILL once there are a few answers; two others go on from there, and the end is that
    of one process which nothing stopped, what the cache took included."""
    many = {
        "hotpotqa": [row(number, ["lamps"]) for number in range(12)],
        "samsum": [row(n, ["a map"]) for n in range(6)],
    }
    source, one, two = write(tmp_path / "data", many), tmp_path / "one", tmp_path / "two"
    words = [str(model), str(source), str(two), "max_tokens=60"]
    with (tmp_path / "said.txt").open("w") as stream:
        torchrun = subprocess.Popen([*LAUNCHER, TOOL, *words], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE
        while sum(lines.count(b"\n") for lines in journals(two).values()) < 3:
            assert torchrun.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()
            time.sleep(0.01)
        workers = children(torchrun.pid, "evaluate_longbench.py")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert torchrun.wait(PATIENCE) != 0 and len(workers) == 2
    finally:
        torchrun.kill()
    left = journals(two)
    assert 3 <= sum(lines.count(b"\n") for lines in left.values()) < 18 and not (two / "results.json").exists()

    done = subprocess.run([*LAUNCHER, TOOL, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    run_tool("evaluate_longbench", model, source, one, "max_tokens=60")
    assert results(one) == results(two) and results(one)["cache_bytes_per_token"] == 768
    assert all(predictions(one, task) == predictions(two, task) for task in many)
    whole = journals(two)
    assert all(whole[name].startswith(lines[: lines.rfind(b"\n") + 1]) for name, lines in left.items())
    assert sum(lines.count(b"\n") for lines in whole.values()) == 18  # none was made twice
