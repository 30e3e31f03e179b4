"""Which forward passes of a pipeline stage wait for their backward passes, and when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from mha2mla_megatron.model.parallel import ParallelConfig


def backward_passes(parallel: ParallelConfig, stage: int, micro_batches: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """As each backward pass of a step starts: how many micro-batches each chunk of the stage keeps activations of, its
    own among them, and the chunk, from 0, whose pass it is.

    1F1B and its interleaved form (Narayanan et al., arXiv 2104.04473): first some forward passes, then one forward and
    one backward pass in turn, then the backward passes that are left. Interleaved, a stage takes as many micro-batches
    through each of its chunks as there are stages, before it goes on to the next chunk, and starts with
    2 (p - 1 - stage) + (v - 1) p forward passes, of p stages with v chunks, in place of p - 1 - stage.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    order = [
        chunk
        for start in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for _ in range(start, min(start + stages, micro_batches))
    ]
    ahead = stages - 1 - stage
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    kept = [0] * chunks
    forward = iter(order)
    for chunk in islice(forward, ahead):
        kept[chunk] += 1
    for place in order:
        for chunk in islice(forward, 1):
            kept[chunk] += 1
        backward = chunks - 1 - place
        yield tuple(kept), backward
        kept[backward] -= 1


def idle_part(parallel: ParallelConfig, micro_batches: int) -> float:
    """Part of a step in which a stage waits: (p - 1)/(v m + p - 1) for m micro-batches on p stages of v chunks."""
    waits = parallel.pipeline_model_parallel_size - 1
    return waits / (parallel.virtual_pipeline_model_parallel_size * micro_batches + waits)
