"""A checkpoint of any layout goes on at any other: some pairs of tests/reshard_checkpoints.py, all where slow runs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from mha2mla_megatron.checkpoint.megatron import iteration_folder
from mha2mla_megatron.training.own_shards import boxes
from tests.distributed.reshard_worker import SAVED
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
    """And data-parallel processes write as much each."""
    for side in zip(*SOME, strict=True):
        assert sorted(side) == sorted(LAYOUTS)
    check(tmp_path, SOME)
    first, second = ((iteration_folder(tmp_path / "dp2", SAVED) / f"__{rank}_0.distcp").stat().st_size for rank in "01")
    assert abs(first / second - 1) < 0.1, (first, second)


def test_boxes_are_the_range_in_order() -> None:
    """Of all ranges of some shapes, against the numbers of the elements."""
    for shape in ((), (5,), (3, 4), (2, 1, 3), (2, 3, 4)):
        numbers = torch.arange(math.prod(shape)).view(shape)
        for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
            places = [
                tuple(map(slice, at, map(sum, zip(at, sizes, strict=True)))) for at, sizes in boxes(shape, start, stop)
            ]
            assert torch.equal(torch.cat([numbers[place].flatten() for place in places]), torch.arange(start, stop))
            assert len(places) <= max(1, 2 * len(shape) - 1)
