"""One of several processes that save a training at one parallel layout and go on from it at others.

Everything that is compared is written down as (name, whole shape, place, content) of the pieces that a process holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.training.checkpoint import StepSaver, resume_average, resume_run
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.pieces import fill, state_pieces
from mha2mla_megatron.training.step import gather_weights, train_step
from mha2mla_megatron.training.weight_average import WeightAverage
from tests.distributed.layout_worker import build, micro_batches

SAVED, MORE = 2, 3
"""Steps before the checkpoint and after it."""


def save(name: str, config: dict[str, Any], folder: Path, settings: FinetuneSettings) -> None:
    """Train, save to folder/`name` after each step, and go on while the last one is written; leaves
    folder/NAME.RANK.pt.

    The third save is the first that plans nothing any more.
    """
    architecture = parse_architecture(config, name)
    chunks, optimizer, schedule, device = build(architecture, settings)
    fill(chunks, optimizer, torch.load(folder / "weights.pt").__getitem__)
    schedule.step(0)
    average = WeightAverage(optimizer, settings.optimizer.ema_decay)
    (folder / name).mkdir(exist_ok=True)
    layout = settings.parallel.sizes(torch.distributed.get_world_size())
    saver = StepSaver(folder / name, _model(chunks), optimizer, schedule, layout, 1, True, average)
    losses = []
    for step in range(SAVED):
        saver.begin(step, {"step": step}).finish()
        losses += _losses(step, 1, architecture.vocab_size, chunks, optimizer, schedule, average, settings, device)
    gather_weights(chunks)
    state = state_pieces(chunks, optimizer, average)
    pending = saver.begin(SAVED, {"step": SAVED})
    losses += _losses(SAVED, MORE, architecture.vocab_size, chunks, optimizer, schedule, average, settings, device)
    pending.finish()
    _write({"losses": losses, "state": state}, folder / name)


def load(name: str, source: str, config: dict[str, Any], folder: Path, settings: FinetuneSettings) -> None:
    """Go on from folder/`source`, saved at whatever layout, at that of `settings`; leaves folder/NAME.RANK.pt."""
    architecture = parse_architecture(config, name)
    chunks, optimizer, schedule, device = build(architecture, settings)
    resumed = resume_run(folder / source, architecture, _model(chunks), optimizer, schedule, settings.lora)
    assert resumed is not None and resumed.run == {"step": SAVED}
    schedule.step(0)
    average = WeightAverage(optimizer, settings.optimizer.ema_decay)
    resume_average(resumed, _model(chunks), average)
    state = state_pieces(chunks, optimizer, average)
    losses = _losses(SAVED, MORE, architecture.vocab_size, chunks, optimizer, schedule, average, settings, device)
    _write({"losses": losses, "state": state}, folder / name)


def _model(chunks: Any) -> list[torch.nn.Module]:
    return [chunk.module for chunk in chunks]


def _losses(
    first: int,
    steps: int,
    vocabulary: int,
    chunks: Any,
    optimizer: Any,
    schedule: Any,
    average: WeightAverage,
    settings: Any,
    device: Any,
) -> list[float]:
    """Those of `steps` steps after the first `first`."""
    batches, losses = micro_batches(vocabulary, settings, first, SAVED + MORE), []
    for _ in range(steps):
        losses.append(train_step(chunks, optimizer, batches, settings, device).loss)
        average.update()
        schedule.step(1)
    return losses


def _write(result: dict[str, Any], root: Path) -> None:
    torch.save(result, root.with_name(f"{root.name}.{torch.distributed.get_rank()}.pt"))
