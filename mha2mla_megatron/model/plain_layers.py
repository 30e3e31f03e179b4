"""Layers in plain torch that Megatron-core lacks, or offers with Transformer Engine alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Upstream's own wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        _mark_replicated(self.weight, config)


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel process holds whole: [..., in] to ([..., out], None)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
    ) -> None:
        super().__init__()
        assert not bias and not skip_bias_add and not is_expert
        weight = torch.empty(output_size, input_size, device=_device(config), dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            with torch.no_grad():
                init_method(self.weight)
        _mark_replicated(self.weight, config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def _mark_replicated(weight: torch.Tensor, config: TransformerConfig) -> None:
    # Under sequence parallelism each process sees a part of the tokens; Megatron sums the gradients of marked weights.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _device(config: TransformerConfig) -> torch.device | int | str:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
