"""tools/benchmarks/train_step.py with a teacher, and calibrate.py: that their numbers fit together, at a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mha2mla_megatron.model.implementation import choose_implementation
from mha2mla_megatron.model.parallel import initialize_parallel
from tests.conftest import ROOT, refused, run_tool

sys.path.insert(0, str(ROOT / "tools" / "benchmarks"))
from shapes import SHAPES, make_architecture
from train_step import random_batches, run_settings, teacher_forward, training_step


def test_the_ratio_of_a_teacher_is_that_of_its_times(tmp_path: Path) -> None:
    words = ["shapes=[tiny]", "models=[mla-68.75]", "parity_shape=null", "steps=2", "rounds=1"]
    plain_word = choose_implementation("auto") + ("+graph" if torch.cuda.is_available() else "")
    taught_word, alone = f"{plain_word}+teacher", f"{plain_word}+teacher+full"
    words += [f"implementations=[{plain_word},{taught_word},{alone}]", f"output={tmp_path / 'out.json'}"]
    printed = run_tool("benchmarks/train_step", *words, own_process=True).stdout
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "out.json").read_text())["speed"]}
    plain, taught = rows[plain_word], rows[taught_word]
    assert taught["teacher_ms"] > 0
    ratio = (taught["teacher_ms"] + plain["ms"]) / taught["ms"]
    assert taught["teacher_ratio"] == pytest.approx(ratio, rel=1e-12)
    (line,) = (line for line in printed.splitlines() if "teacher's forward" in line)
    assert line.endswith(f"{plain['ms']:.1f}) / step with it: {ratio:.3f}")
    assert line.split()[:3] == ["tiny", taught_word, "mla-68.75"]
    # Without the step that it would be compared with there is no ratio.
    assert all("teacher_ratio" not in rows[name] for name in (plain_word, alone))


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the CPU's implementation, in this process")
def test_the_teacher_of_a_timed_step_is_another_model() -> None:
    shape = SHAPES["tiny"]
    device = initialize_parallel(run_settings(shape, "local").parallel)
    converted = make_architecture(shape, "mla-68.75")
    parts = training_step(converted, shape, run_settings(shape, "local+teacher"), device)().parts
    assert parts["kl"] > 1e-4
    assert training_step(converted, shape, run_settings(shape, "local"), device)().parts == {}
    tokens = next(random_batches(shape, device))["tokens"]
    logits = teacher_forward(shape, run_settings(shape, "local+teacher"), device)()
    assert logits.shape == (*tokens.shape, shape.vocabulary) and not logits.requires_grad


def test_a_peer_has_no_teacher() -> None:
    words = ["implementations=[transformers+teacher]"]
    assert "transformers+teacher: nothing can follow a peer" in refused("benchmarks/train_step", *words)


def test_rates_of_calibration_fit_together(tmp_path: Path) -> None:
    words = ["shapes=[tiny]", "layers=1", "samples=3", "stored_samples=5", "sequence_length=16", "rounds=2"]
    printed = run_tool("benchmarks/calibrate", *words, f"output={tmp_path / 'out.json'}", own_process=True).stdout
    rows = {row["way"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ["forward", "forward + backward", "sums", "sums, stored"]
    lines = printed.splitlines()[-len(rows) :]
    for line, (way, row) in zip(lines, rows.items(), strict=True):
        assert (row["layers"], row["tokens"]) == (1, 3 * 16)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens"], rel=1e-12)
        assert row["of_forward"] * row["seconds"] == pytest.approx(rows["forward"]["seconds"], rel=1e-12)
        compared = rows["forward + backward"]["seconds"] / row["seconds"]
        assert row["of_forward_backward"] == pytest.approx(compared, rel=1e-12)
        assert row["GiB"] > 0
        assert way in line and line.split()[-3:-1] == [f"{row['of_forward']:.3f}", f"{compared:.3f}"]


def test_bad_settings_of_calibration_are_refused() -> None:
    for word, message in (
        ("shapes=[9B]", "shapes: unknown value '9B'"),
        ("layers=0", "layers: 0"),
        ("samples=0", "samples: 0"),
        ("dtype=int8", "dtype: unknown value 'int8'"),
    ):
        assert message in refused("benchmarks/calibrate", word)
