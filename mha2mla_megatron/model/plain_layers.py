"""Layers in plain torch that Megatron-core lacks, or offers with Transformer Engine alone."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Upstream's own wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        # Each process sees a part of the tokens then; Megatron sums the gradients of marked weights.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
