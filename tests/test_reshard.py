"""A checkpoint of any layout goes on at any other: some pairs of tests/reshard_checkpoints.py, all where slow runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reshard_checkpoints import LAYOUTS, SOME, check_pair, check_source, results_of, run_pairs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")


def check(folder: Path, pairs: list[tuple[str, str]]) -> None:
    run_pairs(folder, pairs)
    reference, _ = results_of(folder, "one", "one")
    for name in LAYOUTS:
        check_source(folder, name, reference)
    for source, target in pairs:
        check_pair(folder, source, target)


def test_every_layout_is_saved_and_loaded(tmp_path: Path) -> None:
    for side in zip(*SOME, strict=True):
        assert sorted(side) == sorted(LAYOUTS)
    check(tmp_path, SOME)
