"""Bytes that a rank sends in one training step, by kind, with ring algorithms.

In a group of n a ring all-gather or reduce-scatter of N bytes has each rank send (n - 1)/n N, an all-reduce both, so
2 (n - 1)/n N (Patarasuk and Yuan 2009). Not counted: sums of single numbers (loss, gradient norm).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mha2mla_megatron.layout_plan.activations import FLOAT32, ForwardPass
from mha2mla_megatron.layout_plan.shards import count, split_dim


def step_traffic(
    work: ForwardPass,
    layers: Iterable[int],
    trained: dict[str, tuple[int, ...]],
    first: bool,
    last: bool,
    micro_batches: int,
    data_size: int,
) -> dict[str, int]:
    """What each rank of a pipeline stage sends in a step; only the kinds that the layout has.

    layers: those of the stage. trained: its parameters that are not frozen. first, last: whether it is the first or
    last one. data_size: ranks that hold the same part of the model.
    """
    parallel = work.parallel
    tp, staged = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size > 1
    sent: dict[str, int] = {}
    if tp > 1:
        ring = _tensor_parallel(work, list(layers), first, last) * micro_batches
        if parallel.uses_sequence_parallel:
            sent["tensor: all-gather and reduce-scatter"] = _share(ring, tp)
            whole = {name: shape for name, shape in trained.items() if split_dim(name, shape) is None}
            sent["tensor: all-reduce of replicated gradients"] = _share(2 * FLOAT32 * count(whole), tp)
        else:
            sent["tensor: all-reduce"] = _share(2 * ring, tp)
        if last:
            sent["tensor: loss"] = _share(2 * 3 * FLOAT32 * work.tokens * micro_batches, tp)
    if staged:
        sent["pipeline: send"] = ((not first) + (not last)) * work.hidden * micro_batches
        name = "embedding.word_embeddings.weight" if first else "output_layer.weight"
        if work.architecture.tie_word_embeddings and (first or last) and name in trained:
            sent["pipeline: all-reduce of the tied embedding's gradient"] = FLOAT32 * math.prod(trained[name])
    if data_size > 1:
        sent["data: reduce-scatter of gradients"] = _share(FLOAT32 * count(trained), data_size)
        sent["data: all-gather of parameters"] = _share(work.element_size * count(trained), data_size)
    return sent


def _share(size: int, ranks: int) -> int:
    """(n - 1)/n of it."""
    return size * (ranks - 1) // ranks


def _tensor_parallel(work: ForwardPass, layers: list[int], first: bool, last: bool) -> int:
    """Bytes of all tensors that one micro-batch has summed over the group, or, under sequence parallelism, gathered or
    reduce-scattered.

    A row-parallel layer's output is summed in the forward pass, a column-parallel one's gradient in the backward pass.
    With sequence parallelism each sum is a reduce-scatter, a column-parallel layer gathers its input in both passes,
    and a row-parallel one the gradient of its output.
    """
    element, architecture = work.tokens * work.element_size, work.architecture
    forward = backward = 0
    for layer in layers:
        column = _column_parallel_inputs(work, layer)
        row = 2 * architecture.hidden_size
        if work.parallel.uses_sequence_parallel:
            forward, backward = forward + column + row, backward + 2 * column + row
            if work.recompute == "latent" and architecture.mla is not None:
                layout = architecture.layout(layer)  # keys and values gather their latents once more
                backward += layout.kv_down_dim * (layout.factors_key + layout.factors_value)
        else:
            forward, backward = forward + row, backward + column
    if work.recompute == "full":
        backward += forward
    h = architecture.hidden_size
    if work.parallel.uses_sequence_parallel:
        ends = 2 * h * first + 3 * h * last
    else:
        ends = h * first + h * last
    return element * (forward + backward + ends)


def _column_parallel_inputs(work: ForwardPass, layer: int) -> int:
    """Widths of what a layer's column-parallel projections gather, or whose gradients they sum: the input of each by
    itself; where they are fused, the input and all latents once."""
    architecture, h = work.architecture, work.architecture.hidden_size
    if architecture.mla is None:
        return 2 * h  # linear_qkv, linear_fc1
    layout = architecture.layout(layer)
    if work.fused_projections:
        return 2 * h + layout.kv_down_dim
    own = {"o_proj", "kv_down_proj"}  # row-parallel; on every rank
    return h + sum(columns for name, (_, columns) in layout.projections().items() if name not in own)
