"""Over how many processes a model is split, whether it can be, and the process groups for it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed

from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.model.cpu_mode import prepare_device

if TYPE_CHECKING:
    from mha2mla_megatron.architecture import Architecture


@dataclass(frozen=True)
class ParallelConfig:
    """How one copy of the model is split; the processes beyond one copy are data parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer: its attention heads, its MLP columns and the vocabulary."""

    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt out to, in order and in equal numbers."""

    context_parallel_size: int = 1
    """Processes that share every sequence. Only 1 is supported yet."""

    sequence_parallel: bool = False
    """Keep the activations between the layers split along the sequence over the tensor-parallel processes. Saves
    memory; changes no result. Off with one tensor-parallel process, whatever is set."""

    def __post_init__(self) -> None:
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            require_at_least(f"parallel.{key}", getattr(self, key), 1)

    @property
    def uses_sequence_parallel(self) -> bool:
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def sizes(self, world_size: int) -> dict[str, int]:
        """The whole layout over this many processes, as plain numbers."""
        return {
            "processes": world_size,
            "tensor": self.tensor_model_parallel_size,
            "pipeline": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
            "data": world_size // self.model_parallel_size,
        }


def launched_world_size() -> int:
    """How many processes were started: torchrun's WORLD_SIZE, 1 for a plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_layout(architecture: Architecture, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that does not divide the model or the processes; reads no weights and starts nothing.

    Raises UserError naming the two numbers and what would be valid.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = {
        "num_key_value_heads": architecture.num_key_value_heads,
        "num_attention_heads": architecture.num_attention_heads,
        "intermediate_size": architecture.intermediate_size,
        "vocab_size": architecture.vocab_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tp} does not divide {name} {size}; "
                f"valid for this model: {_divisors(math.gcd(*sizes.values()))}"
            )
    if architecture.num_layers % pp:
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {pp} does not divide num_hidden_layers {architecture.num_layers}; "
            f"valid for this model: {_divisors(architecture.num_layers)}"
        )
    if parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {parallel.context_parallel_size} is not supported yet; valid: 1"
        )
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"{world_size} processes were started, but one copy of the model takes {parallel.model_parallel_size} "
            f"(tensor {tp} x pipeline {pp} x context {parallel.context_parallel_size}); start a multiple of that"
        )


def initialize_parallel(parallel: ParallelConfig, seed: int = 1234) -> torch.device:
    """Join the processes, form Megatron's groups for `parallel`, seed the random states; returns this process's device.

    Under torchrun the world is torchrun's; a plain `python` is a world of one that opens no port. Called again, it
    forms new groups in the same world where the layout is another one. `seed` decides initial weights and dropout.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    device = _join_world()
    # Megatron forgets groups without closing them, and each of gloo's keeps its threads.
    if not _has_groups(parallel):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
    # As in Megatron's own training: the stages of a pipeline must not draw the same weights.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return device


def initialize_single_process() -> None:
    """A world of one, enough for `dist_checkpointing`; nothing where torch.distributed already runs."""
    _join_world()


def shut_down_parallel() -> None:
    """Give the groups and the world back; nothing where there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _has_groups(parallel: ParallelConfig) -> bool:
    """Whether Megatron's groups are there already, in this layout."""
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized() and (
        parallel_state.get_tensor_model_parallel_world_size() == parallel.tensor_model_parallel_size
        and parallel_state.get_pipeline_model_parallel_world_size() == parallel.pipeline_model_parallel_size
        and parallel_state.get_context_parallel_world_size() == parallel.context_parallel_size
    )


def _join_world() -> torch.device:
    device = prepare_device()
    if torch.distributed.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
