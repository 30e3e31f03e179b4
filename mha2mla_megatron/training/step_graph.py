"""The forward and backward passes of a training step as one CUDA graph.

A small model's kernels end before the host has started the next ones. A graph starts thousands of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_all_rng_states

from mha2mla_megatron.training.checks import check_graph
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.distillation import Teacher
from mha2mla_megatron.training.step import run_micro_batches

WARMUP = 3
"""Steps that run as they are, in which kernels are compiled and chosen, and communicators made."""


class StepGraph:
    """`run_micro_batches`, as a CUDA graph from the fourth step on.

    A graph reads and writes the same memory every time: batches are copied to where the first ones were, and sums are
    read where they were left. It keeps the memory of all activations for itself.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[dict[str, torch.Tensor]] = []
        self.sums: list[dict[str, torch.Tensor]] = []

    def run(
        self,
        chunks: Sequence[DistributedDataParallel],
        batches: Iterator[dict[str, torch.Tensor]],
        count: int,
        settings: FinetuneSettings,
        device: torch.device,
        distillation: Teacher | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """As `run_micro_batches` with the same arguments, which must be the same in every step but for `batches`; of
        the teacher, only the weight may be written to."""
        for index in range(count):
            batch = {name: value for name, value in next(batches).items() if isinstance(value, torch.Tensor)}
            if self.steps == 0:
                self.inputs.append({name: value.to(device, copy=True) for name, value in batch.items()})
            else:
                for name, place in self.inputs[index].items():
                    place.copy_(batch[name], non_blocking=True)
        self.steps += 1
        if self.steps <= WARMUP:
            return run_micro_batches(chunks, iter(self.inputs), count, settings, device, distillation)
        if self.graph is None:
            self.graph, self.sums = capture(
                lambda: run_micro_batches(chunks, iter(self.inputs), count, settings, device, distillation)
            )
        self.graph.replay()
        return self.sums


def capture[T](run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `run` starts on the current stream, one of `use_own_stream`, and what it returned: tensors that
    each replay fills anew. What `run` reads must live as long as the graph."""
    graph = torch.cuda.CUDAGraph()
    states: Any = get_all_rng_states()
    for state in states.values():
        graph.register_generator_state(state)
    # Other threads, such as NCCL's watchdog, go on asking the driver for things in the meantime.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        results = run()
    return graph, results


def graph_of(settings: FinetuneSettings, device: torch.device) -> StepGraph | None:
    """What `settings.cuda_graph` asks for. Call it before the model is built: from then on this process works on a
    stream of its own, as a capture must, and where gradients are summed on the stream that the model was built on.

    Raises UserError where there is no GPU.
    """
    if not settings.cuda_graph:
        return None
    check_graph(settings, device.type)
    use_own_stream()
    return StepGraph()


def use_own_stream() -> None:
    """Work on a new stream from now on: the default one cannot be captured."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)
