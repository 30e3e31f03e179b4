"""tools/benchmarks/multi_gpu.py: its worlds whatever becomes of them, and the whole of it on a CPU or on GPUs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, refused, run_tool

sys.path.insert(0, str(ROOT / "tools" / "benchmarks"))
import job_worlds

TINY = ["shapes=[tiny]", "small_shape=tiny", "save_shape=tiny", "calibrate_shape=tiny", "save_layers=2", "steps=1"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[job_worlds.World]:
    monkeypatch.setattr(job_worlds, "GRACE", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    world = job_worlds.World(ROOT / "tests" / "job_worlds_script.py", 2, tmp_path / "world")
    assert world.run("add", {"a": 1, "b": 2}, 60) == 3  # both have started
    yield world
    world.stop()


def test_a_world_goes_on_after_a_job_that_all_failed_in(world: job_worlds.World) -> None:
    with pytest.raises(job_worlds.JobFailed, match="rank 0: ValueError: no such layout"):
        world.run("fail", {"ranks": [0, 1]}, 60)
    assert world.usable
    assert world.run("add", {"a": 3, "b": 4}, 60) == 7
    world.close()
    assert [process.returncode for process in world.processes] == [0, 0]


@pytest.mark.parametrize(
    ("job", "arguments", "limit", "message"),
    [
        ("fail", {"ranks": [1]}, 60, "rank 1: ValueError: no such layout"),
        ("die", {}, 60, "rank 1 ended with -9: about to end"),
        ("fail", {"ranks": []}, 1, "no answer of rank 0 after 1 s"),
    ],
    ids=["failed", "died", "hung"],
)
def test_a_world_that_one_process_is_missing_from_is_ended(
    world: job_worlds.World, job: str, arguments: dict[str, Any], limit: float, message: str
) -> None:
    with pytest.raises(job_worlds.JobFailed, match=message):
        world.run(job, arguments, limit)
    assert not world.usable


def test_bad_settings_are_refused() -> None:
    assert "parts: unknown value 'speed'; valid: exact, reshard" in refused("benchmarks/multi_gpu", "parts=[speed]")
    assert "gpus: 3 is not supported; valid: 2, 4, 8" in refused("benchmarks/multi_gpu", "gpus=3")
    assert "shapes: unknown value '9B'" in refused("benchmarks/multi_gpu", "shapes=[9B]")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU; with GPUs the test below says more")
def test_parts_on_a_cpu(tmp_path: Path) -> None:
    """The others take minutes; exact and reshard do what tests/test_layouts.py and test_reshard.py do."""
    output = tmp_path / "out.json"
    parts = "parts=[memory,save]"
    done = run_tool("benchmarks/multi_gpu", *TINY, parts, "time_budget=600", f"output={output}", own_process=True)
    rows = json.loads(output.read_text())["rows"]
    assert [json.loads(line) for line in Path(f"{output}.jsonl").read_text().splitlines()] == rows
    assert "0 FAILED" in done.stdout
    assert {row["part"] for row in rows if row["verdict"] == "left out"} == {"memory"}
    assert sum(row["part"] == "save" for row in rows) == 1


@pytest.mark.slow
def test_saves_are_timed() -> None:
    done = run_tool("benchmarks/save", "shape=tiny", "layers=1", "processes=[1]", "saves=2", own_process=True)
    names, row = (line.split(" | ") for line in done.stdout.splitlines())
    found = dict(zip(names, map(float, row), strict=True))
    assert found["processes"] == 1 and 0.05 < found["GiB"] < 0.2
    assert (
        0 < found["later s"] < found["blocking s"]
        and abs(found["ratio"] - found["later s"] / found["blocking s"]) < 0.1
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
def test_layouts_agree_with_one_gpu(tmp_path: Path) -> None:
    """Float32 to 1e-4; bf16 with Transformer Engine, context parallelism with p2p and all-gather too, to its floor."""
    output = tmp_path / "out.json"
    run_tool("benchmarks/multi_gpu", "gpus=2", "parts=[exact,reshard]", f"output={output}", own_process=True)
    rows = json.loads(output.read_text())["rows"]
    exact = {(row["model"], row["layout"]) for row in rows if row["part"] == "exact" and row["verdict"] == "ok"}
    for model in ("small original bfloat16 TE", "small converted bfloat16 TE"):
        assert {(model, "cp2 p2p"), (model, "cp2 all_gather"), (model, "tp2+sp"), (model, "pp2 vpp2")} <= exact
    assert not [row for row in rows if row["verdict"] == "left out"]
