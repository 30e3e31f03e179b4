"""Save a training at one parallel layout, go on from it at another, for all pairs of a table of layouts.

    python -m tests.reshard_checkpoints [only=SOURCE] [folder=DIR]

A tiny converted model takes two steps, is saved, and takes three more, at every layout. Then every layout loads what
each of them saved: all weights, master weights, both moments of the optimizer and the average of the weights must be
what the source had in memory, bit for bit; the three losses that follow must be the source's, bit for bit at the same
layout, to 1e-6 at another. Exit code 1 and a line for each pair that differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import require_one_of
from mha2mla_megatron.model.parallel import ParallelConfig
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.config import DataSettings, FinetuneSettings, OptimizerSettings
from mha2mla_megatron.training.pieces import merge_pieces
from tests.distributed import reshard_worker
from tests.distributed.worlds import run_world
from tests.megatron_cases import SHORT_NAMES, converted_config, random_tensor

CONFIG = converted_config("joint", num_attention_heads=8, num_key_value_heads=4, intermediate_size=64)
"""Four layers, each with another r and c; G = 4 groups of 2 heads."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, dict()),
    "dp2": (2, dict(gather=True)),
    "tp2": (2, dict(tp=2, sp=True)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "uneven": (2, dict(pp=2, stages="Et*3|tL")),
    "cp2-dp2": (4, dict(cp=2)),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
    "tp2-dp2": (4, dict(tp=2)),
}
"""Processes, and how they share the model; those left over are data parallel."""

PAIRS = [(source, target) for source in LAYOUTS for target in LAYOUTS]
SOME = [(source, list(LAYOUTS)[(3 * number + 2) % 8]) for number, source in enumerate(LAYOUTS)]
"""Every layout once as the source and once as the target; "pp2-vpp2" and "tp2-dp2" go on from themselves."""

LOSS_LIMIT = 1e-6
"""Relative: sums of float32 in another order; measured 2e-7 at most (tests/test_layouts.py)."""


@dataclass(frozen=True)
class ReshardSettings:
    """Settings of this script."""

    only: str | None = None
    """The one layout to save at. None: all."""

    folder: str | None = None
    """Where the checkpoints go, kept at the end. None: a temporary folder."""


def settings_of(layout: dict[str, Any]) -> FinetuneSettings:
    return FinetuneSettings(
        steps=reshard_worker.SAVED + reshard_worker.MORE,
        global_batch_size=4,
        data=DataSettings(sequence_length=16),
        # Adam divides a gradient by its own size; with an epsilon far above the noise of float32 sums, noise stays so.
        optimizer=OptimizerSettings(
            lr=1e-3, warmup_steps=0, decay_steps=1, adam_eps=1e-4, weight_decay=0.1, ema_decay=0.7
        ),
        parallel=ParallelConfig(**{SHORT_NAMES[key]: value for key, value in layout.items()}),
    )


def run_pairs(folder: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Train and save at every source, then go on at every target; one world of processes for each number and part."""
    torch.manual_seed(11)
    architecture = parse_architecture(CONFIG, "model")
    shapes = megatron_shapes(architecture).items()
    torch.save({k: random_tensor(k, shape, architecture.head_dim) for k, shape in shapes}, folder / "weights.pt")
    pairs = list(pairs)
    sources = {"one", *(source for source, _ in pairs)}  # "one" is what the others are compared with
    for size in sorted({processes for processes, _ in LAYOUTS.values()}):
        here = {name: settings_of(layout) for name, (processes, layout) in LAYOUTS.items() if processes == size}
        runs = [(name, CONFIG, folder, settings) for name, settings in here.items() if name in sources]
        run_world(size, folder, reshard_worker.save, runs)
    for size in sorted({processes for processes, _ in LAYOUTS.values()}):
        here = {name: settings_of(layout) for name, (processes, layout) in LAYOUTS.items() if processes == size}
        run_world(
            size,
            folder,
            reshard_worker.load,
            [
                (f"{source}--{target}", source, CONFIG, folder, settings)
                for target, settings in here.items()
                for source, wanted in pairs
                if wanted == target
            ],
        )


def results_of(folder: Path, name: str, target: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole tensors, put together from what the processes of layout `target` held, and losses, which all must agree on.

    Raises AssertionError where copies differ or a tensor is not wholly held.
    """
    found = [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(LAYOUTS[target][0])]
    assert all(one["losses"] == found[0]["losses"] for one in found), "the processes have different losses"
    return merge_pieces(piece for one in found for piece in one["state"]), found[0]["losses"]


def check_source(folder: Path, name: str, reference: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless a layout's state after two steps is, but for noise, the reference's.

    Without that, a moment under another weight's name both when saved and when loaded would go unseen.
    """
    whole, _ = results_of(folder, name, name)
    shapes = megatron_shapes(parse_architecture(CONFIG, "model"))
    trained = [key for key in shapes if not key.endswith("rope_pairs")]
    state = [f"optimizer.state.{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq", "param") for key in trained]
    state += [f"average.{key}" for key in trained]
    assert whole.keys() == {*shapes, *state}, sorted(whole.keys() ^ {*shapes, *state})
    for key, tensor in whole.items():
        scale = reference[key].abs().max()
        assert tensor.shape == reference[key].shape and scale > 0, f"{name}: nothing to compare in {key}"
        assert (tensor - reference[key]).abs().max() <= 1e-4 * scale, f"{name}: {key} is not what one process has"


def check_pair(folder: Path, source: str, target: str) -> float:
    """The largest relative difference of a loss; AssertionError for a tensor or loss that is not the source's."""
    expected, losses = results_of(folder, source, source)
    found, after = results_of(folder, f"{source}--{target}", target)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    different = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, first {different[0]}"
    wanted = losses[reshard_worker.SAVED :]
    if source == target:
        assert after == wanted, f"losses {after}, unbroken {wanted}"
    error = max(abs(a / b - 1) for a, b in zip(after, wanted, strict=True))
    assert error <= LOSS_LIMIT, f"losses {after}, unbroken {wanted}"
    return error


def main(argv: list[str]) -> None:
    _, words, file = split_words(
        argv, "python -m tests.reshard_checkpoints [key=value ...]", 0, 0, schema=ReshardSettings
    )
    settings = load_settings(ReshardSettings, words, file)
    if settings.only is not None:
        require_one_of("only", settings.only, tuple(LAYOUTS))
    pairs = [(source, target) for source, target in PAIRS if settings.only in (None, source)]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(settings.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run_pairs(folder, pairs)
        reference, _ = results_of(folder, "one", "one")
        for source, target in pairs:
            try:
                check_source(folder, source, reference)
                print(f"{source:>8} -> {target:8} equal; losses {check_pair(folder, source, target):.1e}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{source:>8} -> {target:8} FAILED: {error}", flush=True)
    print(f"{len(pairs)} pairs, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
