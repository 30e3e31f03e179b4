"""Bytes that a rank sends in one training step, by kind, with ring algorithms.

In a group of n a ring all-gather or reduce-scatter of N bytes has each rank send (n - 1)/n N, an all-reduce both, so
2 (n - 1)/n N (Patarasuk and Yuan 2009). Not counted: sums of single numbers (loss, gradient norm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mha2mla_megatron.checkpoint.adapters import FIRST, SECOND
from mha2mla_megatron.layout_plan.activations import FLOAT32, ForwardPass
from mha2mla_megatron.layout_plan.shards import (
    COLUMN_PARALLEL,
    HEAD_NORMS,
    ROW_PARALLEL,
    Chunk,
    count,
    split_dim,
    stage_chunks,
)


def step_traffic(
    work: ForwardPass,
    chunks: Sequence[Chunk],
    trained: dict[str, tuple[int, ...]],
    micro_batches: int,
    replicas: int,
) -> dict[str, int]:
    """What each rank of a pipeline stage sends in a step; only the kinds that the layout has.

    chunks: those of the stage. trained: its parameters that are not frozen. replicas: ranks that hold the same part of
    the model and so sum its gradients, those that share a sequence among them.
    """
    parallel = work.parallel
    tp, staged = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size > 1
    first, last = chunks[0].first, chunks[-1].last
    sent: dict[str, int] = {}
    if tp > 1:
        ring = sum(sum(_tensor_parallel(work, chunk)) for chunk in chunks) * micro_batches
        if parallel.uses_sequence_parallel:
            sent["tensor: all-gather and reduce-scatter"] = _share(ring, tp)
        else:
            sent["tensor: all-reduce"] = _share(2 * ring, tp)
        if latents := sum(sum(_latents(work, chunk)) for chunk in chunks) * micro_batches:
            sent["tensor: latents"] = _share(latents, tp)
        if partial := _partial_gradients(trained, parallel.uses_sequence_parallel):
            sent["tensor: all-reduce of replicated gradients"] = _share(2 * FLOAT32 * partial, tp)
        if shared := count(_shared_halves(trained)):
            sent["tensor: all-reduce of low-rank gradients"] = _share(
                2 * work.element_size * shared * micro_batches, tp
            )
        if last:
            numbers = 7 if work.loss_models else 3  # two maxima and five sums for both losses
            sent["tensor: loss"] = _share(2 * numbers * FLOAT32 * work.tokens * micro_batches, tp)
    if parallel.context_parallel_size > 1 and (exchanged := sum(_context_parallel(work, chunks))):
        sent["context: keys and values"] = exchanged * micro_batches
    if staged:
        sent["pipeline: send"] = _neighbours(chunks) * work.hidden * micro_batches
        name = "embedding.word_embeddings.weight" if first else "output_layer.weight"
        if work.architecture.tie_word_embeddings and (first or last) and name in trained:
            sent["pipeline: all-reduce of the tied embedding's gradient"] = FLOAT32 * math.prod(trained[name])
    if replicas > 1:
        sent["data: reduce-scatter of gradients"] = _share(FLOAT32 * count(trained), replicas)
        sent["data: all-gather of parameters"] = _share(work.element_size * count(trained), replicas)
    return sent


def teacher_traffic(work: ForwardPass, stage: int, micro_batches: int) -> dict[str, int]:
    """What the teacher's forward passes send in a step on each rank of a pipeline stage. work: the teacher's."""
    chunks = stage_chunks(work.architecture, work.parallel)[stage]
    tp, sent = work.parallel.tensor_model_parallel_size, {}
    if tp > 1:
        forward = sum(_tensor_parallel(work, chunk)[0] for chunk in chunks)
        ring = forward if work.parallel.uses_sequence_parallel else 2 * forward
        ring += sum(_latents(work, chunk)[0] for chunk in chunks)
        sent["tensor: the teacher's forward pass"] = _share(ring * micro_batches, tp)
    if work.parallel.context_parallel_size > 1:
        sent["context: the teacher's keys and values"] = _context_parallel(work, chunks)[0] * micro_batches
    if work.parallel.pipeline_model_parallel_size > 1:  # beside the model's, both ways: its gradient is 0
        sent["pipeline: the teacher's hidden states"] = _neighbours(chunks) * work.hidden * micro_batches
    return sent


def _neighbours(chunks: Sequence[Chunk]) -> int:
    """Chunks of other stages that these send to in one forward and backward pass."""
    return sum((not chunk.first) + (not chunk.last) for chunk in chunks)


def _partial_gradients(parameters: dict[str, tuple[int, ...]], sequence_parallel: bool) -> int:
    """Numbers of the parameters that every tensor-parallel rank has whole, but sees only a part of the gradient of:
    under sequence parallelism that of its tokens, and for norms of heads that of its heads."""
    elsewhere = _shared_halves(parameters)
    whole = {
        name: shape for name, shape in parameters.items() if split_dim(name, shape) is None and name not in elsewhere
    }
    return count(
        {name: shape for name, shape in whole.items() if sequence_parallel or name.split(".")[-2] in HEAD_NORMS}
    )


def _shared_halves(parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A of layers split by rows, B of those split by columns: every tensor-parallel rank has them whole, and a part of
    their gradient in each micro-batch."""
    return {
        name: shape
        for name, shape in parameters.items()
        if (name.split(".")[-2] in COLUMN_PARALLEL and name.endswith(FIRST))
        or (name.split(".")[-2] in ROW_PARALLEL and name.endswith(SECOND))
    }


def _share(size: int, ranks: int) -> int:
    """(n - 1)/n of it."""
    return size * (ranks - 1) // ranks


def _tensor_parallel(work: ForwardPass, chunk: Chunk) -> tuple[int, int]:
    """Bytes of all tensors that one micro-batch has summed over the group, or, under sequence parallelism, gathered or
    reduce-scattered, in its forward and in its backward pass through one chunk.

    A row-parallel layer's output is summed in the forward pass, a column-parallel one's gradient in the backward pass.
    With sequence parallelism each sum is a reduce-scatter, a column-parallel layer gathers its input in both passes,
    and a row-parallel one the gradient of its output. Experts come with sequence parallelism alone: those of a layer
    share one gathered input, which they keep, the tokens' weights, and the choice in whole bytes.
    """
    element, architecture = work.tokens * work.element_size, work.architecture
    forward = backward = choices = 0
    for layer in chunk.layers:
        column = _column_parallel_inputs(work, layer)
        row = 2 * architecture.hidden_size
        if work.parallel.uses_sequence_parallel:
            forward, backward = forward + column + row, backward + 2 * column + row
            if (experts := architecture.experts_of(layer)) is not None:
                once = architecture.hidden_size + experts.num_experts
                forward, backward, choices = forward + once, backward + once, choices + experts.num_experts
        else:
            forward, backward = forward + row, backward + column
    again = work.recompute == "full"
    if again:
        backward += forward
    h = architecture.hidden_size
    if work.parallel.uses_sequence_parallel:
        forward, backward = forward + h * (chunk.first + chunk.last), backward + h * (chunk.first + 2 * chunk.last)
    else:
        forward, backward = forward + h * chunk.first, backward + h * chunk.last
    choices *= work.tokens
    return element * forward + choices, element * backward + again * choices


def _context_parallel(work: ForwardPass, chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Bytes that attention sends in the forward and in the backward pass of a micro-batch: n - 1 times its own keys and
    values, whether in a ring or gathered, and in the backward pass their gradients as often.

    Transformer Engine fetches keys and values in the backward pass again, the local attention only where it recomputes.
    """
    own = sum(work.keys_and_values(layer) for chunk in chunks for layer in chunk.layers)
    once = (work.parallel.context_parallel_size - 1) * own
    again = work.transformer_engine + (work.recompute in ("selective", "full"))
    return once, once * (1 + again)


def _column_parallel_inputs(work: ForwardPass, layer: int) -> int:
    """Widths of what a layer's column-parallel projections gather, or whose gradients they sum: the input of each by
    itself; where they are fused, the input once, and the latents are counted by `_latents`."""
    architecture, h = work.architecture, work.architecture.hidden_size
    of_mlp = h if architecture.experts_of(layer) is None else 0  # linear_fc1
    if architecture.mla is None:
        return of_mlp + h  # linear_qkv
    layout = architecture.layout(layer)
    if work.fused_projections:
        return of_mlp + h
    return of_mlp + sum(columns for name, (_, columns) in layout.projections().items() if name != "o_proj")


def _latents(work: ForwardPass, chunk: Chunk) -> tuple[int, int]:
    """Bytes of all latents that one micro-batch has gathered or reduce-scattered, in its forward and in its backward
    pass through one chunk: each rank computes some of their columns. And of rotated keys that all heads share: gathered
    in the forward pass, in the backward pass their gradients are summed.

    Where projections are fused, both passes gather them, the second one sums their gradients, and keys and values that
    are computed again gather theirs. Else they are gathered; under sequence parallelism, where each projection that
    reads them gathers them from the tokens of each rank, an all-to-all brings them there, in both passes.
    """
    architecture, parallel = work.architecture, work.parallel
    if architecture.mla is None:
        return 0, 0
    forward = backward = 0
    for layer in chunk.layers:
        layout = architecture.layout(layer)
        if layout.shared_rope:
            forward, backward = forward + layout.rope_dim, backward + layout.rope_dim
        width = layout.kv_down_dim
        if work.fused_projections:
            again = (layout.factors_key + layout.factors_value) if work.recompute == "latent" else 0
            forward, backward = forward + width, backward + (2 + again) * width
        elif parallel.uses_sequence_parallel:
            own = width // parallel.tensor_model_parallel_size
            forward, backward = forward + own, backward + own
        else:
            forward += width
    if work.recompute == "full":
        backward += forward
    element = work.tokens * work.element_size
    return element * forward, element * backward
