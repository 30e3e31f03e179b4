"""One of several processes that take the same two training steps at several parallel layouts.

Each leaves, for every run, the file RUN.RANK.pt: the losses, and the pieces of the first step's gradients and of the
final weights that it holds, with their places in the whole tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from mha2mla_megatron.architecture import Architecture, parse_architecture
from mha2mla_megatron.model.parallel import check_batches, check_layout, initialize_parallel
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.pieces import fill, keep_gradients, pieces_of
from mha2mla_megatron.training.step import build_training_model, gather_weights, train_step

STEPS = 2


def run(name: str, config: dict[str, Any], weights: Path, settings: FinetuneSettings) -> None:
    """Train config.json's model from a file of whole tensors; the results go beside it."""
    if settings.implementation == "local_fused":
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernel is imported
    result = train(parse_architecture(config, name), weights, settings)
    torch.save(result, weights.parent / f"{name}.{torch.distributed.get_rank()}.pt")


def build(architecture: Architecture, settings: FinetuneSettings) -> tuple[Any, Any, Any, torch.device]:
    """Chunks of the model, optimizer, schedule, device: what a training in float32 has before its first weight."""
    world = torch.distributed.get_world_size()
    check_layout(architecture, settings.parallel, world)
    sizes = settings.data.sequence_length, settings.micro_batch_size, settings.global_batch_size
    check_batches(settings.parallel, world, *sizes)
    device = initialize_parallel(settings.parallel)
    chunks = build_training_model(architecture, settings, torch.float32, device)
    return chunks, *build_optimizer(chunks, settings, torch.float32), device


def train(architecture: Architecture, weights: Path, settings: FinetuneSettings) -> dict[str, Any]:
    """What one run leaves behind, on this rank."""
    chunks, optimizer, schedule, device = build(architecture, settings)
    fill(chunks, optimizer, torch.load(weights).__getitem__)
    schedule.step(0)
    gradients = keep_gradients(chunks, optimizer)
    batches = micro_batches(architecture.vocab_size, settings)
    losses = [train_step(chunks, optimizer, batches, settings, device).loss for _ in range(STEPS)]
    gather_weights(chunks)
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": gradients, "weights": pieces_of(chunks)}


def micro_batches(
    vocabulary: int, settings: FinetuneSettings, first: int = 0, steps: int = STEPS
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of random samples, whose masks leave each another number of tokens.

    Those of `steps` steps are drawn; the first `first` of them are left out.
    """
    generator = torch.Generator().manual_seed(3)
    size, length = settings.micro_batch_size, settings.data.sequence_length
    samples = torch.randint(vocabulary, (steps * settings.global_batch_size, length + 1), generator=generator)
    masks = (torch.rand((len(samples), length), generator=generator) < 0.8).float()
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(first * settings.global_batch_size + rank * size, len(samples), ranks * size):
        tokens, mask = samples[start : start + size], masks[start : start + size]
        yield {
            "tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": mask,
            "position_ids": torch.arange(length).repeat(size, 1),
        }  # fmt: skip
