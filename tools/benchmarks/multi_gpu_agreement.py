"""The jobs of multi_gpu.py that compare: gradients with one GPU's, and a checkpoint with what it was saved from.

They run in every process of a world at once; what they return is that of rank 0.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from shapes import KINDS, SHAPES, make_architecture

from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.data.dataset import sample_batches
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel
from mha2mla_megatron.training.checkpoint import StepSaver, resume_run
from mha2mla_megatron.training.config import DataSettings, FinetuneSettings, OptimizerSettings
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.pieces import Piece, fill, keep_gradients, merge_pieces, state_pieces
from mha2mla_megatron.training.step import build_training_model, gather_weights, train_step

GAIN = 1.5
"""Of random matrices: attention is far from uniform, so that a mistake in it shows."""

SAMPLES, SAVED, MORE = 8, 2, 3
"""Samples of a step; steps before a checkpoint and after it."""


class Run:
    """A model with weights that are the same at every layout and in every type, its optimizer, and its batches."""

    def __init__(
        self,
        shape: str,
        kind: str,
        dtype: str,
        implementation: str,
        parallel: dict[str, Any],
        filled: bool = True,
    ) -> None:
        sizes, self.dtype = SHAPES[shape], getattr(torch, dtype)
        self.architecture = make_architecture(sizes, KINDS[kind])
        self.settings = FinetuneSettings(
            micro_batch_size=1,
            global_batch_size=SAMPLES,
            steps=100,
            implementation=implementation,
            data=DataSettings(sequence_length=sizes.sequence_length),
            # Adam divides a gradient by its own size; with an epsilon above its noise, noise stays so.
            optimizer=OptimizerSettings(lr=1e-3, warmup_steps=0, decay_steps=1, adam_eps=1e-4, weight_decay=0.1),
            parallel=ParallelConfig(**parallel),
        )
        self.device = initialize_parallel(self.settings.parallel)
        self.chunks = build_training_model(self.architecture, self.settings, self.dtype, self.device)
        self.optimizer, self.schedule = build_optimizer(self.chunks, self.settings, self.dtype)
        if filled:
            shapes = megatron_shapes(self.architecture)
            fill(self.chunks, self.optimizer, partial(random_weight, shapes, self.architecture.head_dim))
        self.model = [chunk.module for chunk in self.chunks]

    def losses(self, first: int, steps: int) -> list[float]:
        """Those of `steps` steps after the first `first`."""
        length, vocabulary = self.settings.data.sequence_length, self.architecture.vocab_size
        samples: Any = [random_sample(index, length, vocabulary) for index in range((first + steps) * SAMPLES)]
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = sample_batches(samples, first * SAMPLES, len(samples), 1, *ranks, 0)
        self.schedule.step(0)
        found = []
        for _ in range(steps):
            found.append(train_step(self.chunks, self.optimizer, batches, self.settings, self.device).loss)
            self.schedule.step(1)
        return found


def random_weight(shapes: dict[str, tuple[int, ...]], head_dim: int, name: str) -> torch.Tensor:
    """A tensor of the whole model, always the same for its name; bf16 has all of its values."""
    generator, shape = torch.Generator().manual_seed(zlib.crc32(name.encode())), shapes[name]
    if name.endswith("rope_pairs"):
        return torch.stack([torch.randperm(head_dim // 2, generator=generator)[: shape[1]] for _ in range(shape[0])])
    numbers = torch.randn(shape, generator=generator)
    numbers = 1 + 0.1 * numbers if len(shape) == 1 else numbers * (GAIN / math.sqrt(shape[-1]))
    return numbers.bfloat16().float()


def random_sample(index: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Tokens, and a mask that leaves each sample another number of them."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(vocabulary, (length + 1,), generator=generator)
    mask = (torch.rand(length, generator=generator) < 0.8).float()
    return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": torch.arange(length)}


def gradients(folder: str, store: str | None = None, reference: str | None = None, **what: Any) -> dict[str, Any]:
    """The loss of one step and its gradients; see `Run` for `what`.

    store: the file in `folder` that keeps them (of a world of one). reference: such a file, to compare with; then the
    result has the relative error of the loss and, by tensor, ||difference|| / ||reference||.
    """
    run = Run(**what)
    found = keep_gradients(run.chunks, run.optimizer)
    (loss,) = run.losses(0, 1)
    result: dict[str, Any] = {"loss": loss}
    if reference is not None:
        expected = torch.load(Path(folder) / f"{reference}.pt", mmap=True)
        result["loss_error"] = abs(loss / expected["loss"] - 1)
        result["errors"] = _errors(found, expected["gradients"])
    if store is not None:
        whole = merge_pieces((key, shape, place, piece.cpu()) for key, shape, place, piece in found)
        torch.save({"loss": loss, "gradients": whole}, Path(folder) / f"{store}.pt")
    return result


def _errors(found: list[Piece], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Every piece of every process is compared; the pieces must make up all tensors, and the worst copy counts."""
    mine = []
    for key, shape, place, piece in found:
        assert shape == tuple(expected[key].shape), key
        difference = piece - expected[key][place].to(piece.device)
        mine.append((key, str(place), piece.numel(), float(difference.double().square().sum())))
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    squares: dict[str, dict[str, float]] = defaultdict(dict)
    for key, place, number, square in (entry for entries in everyones for entry in entries):
        numbers[key][place] = number
        squares[key][place] = max(square, squares[key].get(place, 0.0))
    errors = {}
    for key, whole in expected.items():
        held = sum(numbers[key].values())
        assert held == whole.numel(), f"{key}: the processes hold {held} of {whole.numel()} numbers"
        errors[key] = math.sqrt(sum(squares[key].values())) / float(whole.double().norm())
    return errors


def save_training(folder: str, name: str, **what: Any) -> dict[str, Any]:
    """Train, save to folder/NAME in between, and go on; leaves what the processes held in folder/NAME.RANK.pt."""
    run, root = Run(**what), Path(folder) / name
    run.losses(0, SAVED)
    gather_weights(run.chunks)
    _write_state(run, root)
    root.mkdir(parents=True, exist_ok=True)
    layout = run.settings.parallel.sizes(torch.distributed.get_world_size())
    saver = StepSaver(root, run.model, run.optimizer, run.schedule, layout, None, False)
    saver.begin(SAVED, {"step": SAVED}).finish()
    return {"processes": torch.distributed.get_world_size(), "losses": run.losses(SAVED, MORE)}


def load_training(folder: str, name: str, source: str, processes: int, **what: Any) -> dict[str, Any]:
    """Go on from folder/SOURCE, saved by so many processes; the losses, and the tensors that differ, bit for bit."""
    run, root = Run(**what, filled=False), Path(folder) / name
    parts = run.model, run.optimizer, run.schedule
    resumed = resume_run(Path(folder) / source, run.architecture, *parts, run.settings.lora)
    assert resumed is not None and resumed.run == {"step": SAVED}, resumed
    _write_state(run, root)
    result: dict[str, Any] = {"losses": run.losses(SAVED, MORE)}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        found = _read_state(root, torch.distributed.get_world_size())
        expected = _read_state(Path(folder) / source, processes)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        result["tensors"] = len(expected)
        result["different"] = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
        for file in root.parent.glob(f"{root.name}.*.pt"):
            file.unlink()
    return result


def _write_state(run: Run, root: Path) -> None:
    pieces = [(key, shape, place, piece.cpu()) for key, shape, place, piece in state_pieces(run.chunks, run.optimizer)]
    torch.save(pieces, root.with_name(f"{root.name}.{torch.distributed.get_rank()}.pt"))


def _read_state(root: Path, processes: int) -> dict[str, torch.Tensor]:
    files = [root.with_name(f"{root.name}.{rank}.pt") for rank in range(processes)]
    return merge_pieces(piece for file in files for piece in torch.load(file, weights_only=False))
