"""Over how many processes a model is split, whether it can be, and the process groups for it."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.distributed

from mha2mla_megatron.errors import UserError, first_line, require_at_least, require_one_of
from mha2mla_megatron.model.cpu_mode import prepare_device
from mha2mla_megatron.ranks import join_launched_ranks
from mha2mla_megatron.together import names_lost_processes

if TYPE_CHECKING:
    from mha2mla_megatron.architecture import Architecture


@dataclass(frozen=True)
class ParallelConfig:
    """How one copy of the model is split; the processes beyond one copy are data parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer: its attention heads, its MLP columns and the vocabulary."""

    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt out to, in order and in equal numbers."""

    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of the model that each pipeline stage holds, dealt out in turn: less waiting, more communication."""

    pipeline_model_parallel_layout: str | None = None
    """What each chunk holds where the numbers are not equal, in Megatron's notation: E embedding, t a layer, L output
    layer and loss, `|` between chunks, `*n` n times: Et*3|t*5|t*5|t*3L. None: equal numbers of layers."""

    context_parallel_size: int = 1
    """Processes that share every sequence."""

    cp_comm_type: str = "p2p"
    """With context parallelism and Transformer Engine: keys and values go round in a ring (p2p), or each process gets
    all of them at once (all_gather), as the local implementation always does."""

    sequence_parallel: bool = False
    """Keep the activations between the layers split along the sequence over the tensor-parallel processes. Saves
    memory; changes no result. Off with one tensor-parallel process, whatever is set."""

    overlap_grad_reduce: bool = True
    """Sum gradients over the data-parallel processes while the backward pass goes on. Changes no result."""

    overlap_param_gather: bool = False
    """Collect the updated weights from the data-parallel processes while the next forward pass goes on. Changes no
    result."""

    timeout_minutes: float = 30.0
    """How long a process waits for another one, which may have died or hang, before it gives up."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_minutes < math.inf:
            raise UserError(f"parallel.timeout_minutes: {self.timeout_minutes} is not a positive number")
        for key in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
        ):
            require_at_least(f"parallel.{key}", getattr(self, key), 1)
        require_one_of("parallel.cp_comm_type", self.cp_comm_type, ("p2p", "all_gather"))
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise UserError("parallel.overlap_param_gather: true needs parallel.overlap_grad_reduce: true")

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
            "virtual pipeline": self.virtual_pipeline_model_parallel_size,
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
        "num_key_value_heads": architecture.num_key_value_heads,  # which divide the query heads
        "intermediate_size": architecture.intermediate_size,
        "vocab_size": architecture.vocab_size,
    }
    if (experts := architecture.experts) is not None:
        sizes[experts.names.intermediate_size] = experts.intermediate_size
        if tp > 1 and not parallel.sequence_parallel:
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tp} with mixtures of experts needs "
                "parallel.sequence_parallel: true"
            )
    if architecture.mla is not None:
        for layer in range(architecture.num_layers):
            layout = architecture.layout(layer)
            sizes[f"the latents' width in layer {layer},"] = layout.kv_down_dim
            if layout.shared_rope:
                sizes[f"the width qk_rope_head_dim of the rotated key that all heads share in layer {layer},"] = (
                    layout.qk_rope_head_dim
                )
    for name, size in sizes.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tp} does not divide {name} {size}; "
                f"valid for this model: {_divisors(math.gcd(*sizes.values()))}"
            )
    _check_stages(architecture.num_layers, parallel)
    if architecture.window_layers and parallel.context_parallel_size > 1:
        raise UserError(
            f"parallel.context_parallel_size: {parallel.context_parallel_size} with sliding windows is not supported; "
            "valid for this model: 1"
        )
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"{world_size} processes were started, but one copy of the model takes {parallel.model_parallel_size} "
            f"(tensor {tp} x pipeline {pp} x context {parallel.context_parallel_size}); start a multiple of that"
        )


def _check_stages(layers: int, parallel: ParallelConfig) -> None:
    """Refuse stages that the model's layers cannot be dealt out to."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if vpp > 1 and pp == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size: {vpp} needs parallel.pipeline_model_parallel_size of at "
            "least 2, it is 1"
        )
    if parallel.pipeline_model_parallel_layout is not None:
        _check_pipeline_layout(parallel.pipeline_model_parallel_layout, layers, pp, vpp)
        return
    hint = "or deal them out with parallel.pipeline_model_parallel_layout"
    if layers % pp:
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {pp} does not divide num_hidden_layers {layers}; "
            f"valid for this model: {_divisors(layers)}; {hint}"
        )
    if layers % (pp * vpp):
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size: {vpp} does not divide the {layers // pp} layers of each "
            f"of {pp} pipeline stages; valid for this model: {_divisors(layers // pp)}; {hint}"
        )


def _check_pipeline_layout(layout: str, layers: int, pp: int, vpp: int) -> None:
    """Refuse a layout in Megatron's notation that does not add up to this model and these stages."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    key = f"parallel.pipeline_model_parallel_layout: {layout}"
    try:
        chunks = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        raise UserError(f"{key}: {first_line(error)}") from None
    if len(chunks) != pp * vpp:
        raise UserError(
            f"{key} has {len(chunks)} chunks, but pipeline {pp} x virtual pipeline {vpp} make {pp * vpp}; "
            "there are chunks - 1 signs |"
        )
    for index, chunk in enumerate(chunks):
        if not chunk:
            raise UserError(f"{key}: chunk {index} of {len(chunks)} is empty; each needs an E, a t or an L")
    whole = [part for chunk in chunks for part in chunk]
    if (found := whole.count(LayerType.decoder)) != layers:
        raise UserError(f"{key} has {found} layers t, the model has num_hidden_layers {layers}")
    if whole != [LayerType.embedding, *[LayerType.decoder] * layers, LayerType.loss]:
        raise UserError(f"{key}: not one E first, then {layers} layers t, then one L")


def layers_of_chunks(num_layers: int, parallel: ParallelConfig) -> list[range]:
    """The layers, from 0, of each chunk of a layout that `check_layout` has passed, in the order in which a sample goes
    through them. Chunk i is on stage i modulo the number of stages; the first one has the embedding too, the last one
    the final norm and the output layer."""
    number = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    counts = [num_layers // number] * number
    if parallel.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        chunks = PipelineParallelLayerLayout.parse_str_to_list(parallel.pipeline_model_parallel_layout)
        counts = [chunk.count(LayerType.decoder) for chunk in chunks]
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def check_batches(
    parallel: ParallelConfig, world_size: int, sequence_length: int, micro_batch_size: int, global_batch_size: int
) -> None:
    """Refuse sequences and batches that a layout, which `check_layout` has passed, cannot be fed with.

    Raises UserError naming the two numbers and what would be valid.
    """
    data_size = world_size // parallel.model_parallel_size
    if global_batch_size % (micro_batch_size * data_size):
        raise UserError(
            f"global_batch_size: {global_batch_size} does not divide by micro_batch_size "
            f"{micro_batch_size} x {data_size} data-parallel ranks"
        )
    micro_batches, pp = global_batch_size // (micro_batch_size * data_size), parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size > 1 and micro_batches % pp:
        raise UserError(
            f"global_batch_size: {global_batch_size} gives {micro_batches} micro batches a step and rank; with virtual "
            f"pipeline stages they must divide by parallel.pipeline_model_parallel_size {pp}: "
            f"give a multiple of {micro_batch_size * data_size * pp}"
        )
    # Context parallelism gives each process two pieces, an early and a late one, so that all have as much to do.
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    pieces = math.lcm(2 * cp if cp > 1 else 1, cp * tp if parallel.uses_sequence_parallel else 1)
    if sequence_length % pieces:
        raise UserError(
            f"data.sequence_length: {sequence_length} cannot be split over context_parallel_size {cp} and, with "
            f"sequence_parallel {str(parallel.uses_sequence_parallel).lower()}, tensor_model_parallel_size {tp}; "
            f"give a multiple of {pieces}"
        )


def initialize_parallel(parallel: ParallelConfig, seed: int = 1234) -> torch.device:
    """Join the processes, form Megatron's groups for `parallel`, seed the random states; returns this process's device.

    Under torchrun the world is torchrun's; a plain `python` is a world of one that opens no port. Called again, it
    forms new groups in the same world where the layout is another one. `seed` decides initial weights and dropout.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    timeout = timedelta(minutes=parallel.timeout_minutes)
    device = _join_world(timeout)
    # Megatron forgets groups without closing them, and each of gloo's keeps its threads.
    if not _has_groups(parallel):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=parallel.timeout_minutes,  # type: ignore[arg-type]  # it makes a timedelta
        )
    vpp = parallel.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)  # forms no groups
    # As in Megatron's own training: the stages of a pipeline must not draw the same weights.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    # States that a CUDA graph may hold, and that are switched without a copy.
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=device.type == "cuda")
    return device


def shut_down_parallel() -> None:
    """Give the groups and the world back; nothing where there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def own_world() -> Iterator[None]:
    """Give a world that is joined within the block back at its end, where the process may be about to end.

    A thread of gloo's that is still at work when Python ends aborts the process (torch 2.11: exit code -6). Where all
    processes raise the same UserError gloo's world is given back too; NCCL cannot close while the error's frames hold a
    CUDA graph, and after any other error one process may wait for ever.
    """
    joined_before = torch.distributed.is_initialized()

    def joined_here() -> bool:
        return torch.distributed.is_initialized() and not joined_before

    try:
        yield
    except UserError:
        if joined_here() and torch.distributed.get_backend() == "gloo":
            shut_down_parallel()
        raise
    if joined_here():
        gc.collect()  # a CUDA graph that waits for it keeps NCCL from closing
        shut_down_parallel()


@contextmanager
def resumable_job(parallel: ParallelConfig, then: str) -> Iterator[None]:
    """`own_world` of a command that can be repeated. Where a process has died, the others say `then`, what the same
    command does, in one line."""
    limit = f"parallel.timeout_minutes {parallel.timeout_minutes:g}"
    reason = f"another process has died, or was waited for longer than {limit}"
    with names_lost_processes(reason, f"the same command {then}"), own_world():
        yield


def _has_groups(parallel: ParallelConfig) -> bool:
    """Whether Megatron's groups are there already, in this layout."""
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized() and (
        parallel_state.get_tensor_model_parallel_world_size() == parallel.tensor_model_parallel_size
        and parallel_state.get_pipeline_model_parallel_world_size() == parallel.pipeline_model_parallel_size
        and parallel_state.get_context_parallel_world_size() == parallel.context_parallel_size
    )


def _join_world(timeout: timedelta) -> torch.device:
    device = prepare_device()
    if torch.distributed.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        join_launched_ranks(backend, timeout)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
