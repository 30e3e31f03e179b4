"""The loss over a fixed set of held-out samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from mha2mla_megatron.data.dataset import Padded, sample_batches
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.step import StepMeans, gather_weights, run_micro_batches


class Validation:
    """Measures the loss of the first validation.samples samples of `dataset`, the same ones at any layout."""

    def __init__(self, dataset: Any, settings: FinetuneSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        together = settings.micro_batch_size * parallel_state.get_data_parallel_world_size()
        pp = settings.parallel.pipeline_model_parallel_size  # virtual stages take micro batches in groups of so many
        self.micro_batches = math.ceil(settings.validation.samples / (together * pp)) * pp
        self.dataset = Padded(dataset, settings.validation.samples, self.micro_batches * together)

    def due(self, step: int) -> bool:
        """Whether there is one after this step, counted from 1."""
        return step == self.settings.steps or step % self.settings.validation.interval == 0

    def measure(self, chunks: Sequence[DistributedDataParallel]) -> float:
        """Mean loss over all predicted tokens of the samples, on every rank; the model trains on as if not asked."""
        batches = sample_batches(
            self.dataset,
            0,
            len(self.dataset),
            self.settings.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            self.settings.data.workers,
        )
        gather_weights(chunks)
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            found = run_micro_batches(
                chunks, batches, self.micro_batches, self.settings, self.device, forward_only=True
            )
        for chunk in chunks:
            chunk.train()
        return StepMeans(found, self.device).of()["loss"]
