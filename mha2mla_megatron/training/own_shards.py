"""What a data-parallel process holds of weights and optimizer state, as pieces of the whole tensors.

Megatron's distributed optimizer gives each data-parallel process a range of every bucket of parameters, so of a
parameter a range of its elements in row-major order. Megatron saves that in its format `fully_reshardable`, the one
that loads at any layout, after it has gathered whole tensors in every process's host memory. Here a process saves its
own range under the same names and whole shapes, cut into boxes, which is what a piece of a checkpoint is: nothing is
exchanged or copied, and a checkpoint that has the whole tensors is loaded in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_SHARDS = "shards"


def save_own_shards(optimizer: DistributedOptimizer) -> None:
    """Let the optimizer save and load, in the format `fully_reshardable`, what this process holds and no more."""
    instance: Any = optimizer
    instance.sharded_state_dict = partial(_sharded_state, optimizer)
    instance.load_parameter_state_from_fully_reshardable = partial(_take_state, optimizer)


def parts_of(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that a chain of them is made of, or the one that it is."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    distributed = [part for part in parts if isinstance(part, DistributedOptimizer)]
    assert len(distributed) == len(parts), "built without use_distributed_optimizer"
    return distributed


def own_weights(model_state: Mapping[str, Mapping[str, Any]], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """The weights of `model_state` whose optimizer state this process has; of what is not trained, all.

    model_state: chunk -> name -> where Megatron places a tensor. The process has all of the weights; cut like this,
    each data-parallel process writes as much.
    """
    parts = parts_of(optimizer)
    ranges = {weight: found for part in parts for weight, *found in own_ranges(part)}
    trained = {weight for part in parts for buffer in part.buffers for weight in buffer.param_index_map}

    own: dict[str, Any] = {}
    for chunk, state in model_state.items():
        for name, placed in state.items():
            if placed.data not in trained:
                own[f"{chunk}.{name}"] = placed
            elif placed.data in ranges:
                start, stop = ranges[placed.data]
                content = placed.data.detach().view(-1)[start:stop]
                own[f"{chunk}.{name}"] = dict(own_pieces(placed, start, stop, content, ""))
    return own


def own_ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Each parameter of which this process has optimizer state, and of which of its elements."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, where in bucket["param_map"].items():
                    yield weight, where["param"].start, where["param"].end


def places_of(model_state: Any) -> dict[torch.Tensor, Any]:
    """Parameter -> where Megatron places it, of what `sharded_weights` says of several chunks."""
    return {placed.data: placed for placed in nested_values(model_state)}


def own_pieces(
    placed: Any, start: int, stop: int, content: torch.Tensor, prefix: str
) -> Iterator[tuple[int, ShardedTensor]]:
    """(place in `content`, piece) of elements start to stop of a parameter.

    placed: where Megatron places the parameter, or the factory of its parts. content: [stop - start], beside those
    elements. The piece's name is the parameter's, after `prefix`.
    """
    weight = placed.data
    parts = nested_values(placed.build()) if isinstance(placed, ShardedTensorFactory) else [placed]
    for part in parts:
        assert part.data.is_contiguous() and part.prepend_axis_num == 0, f"{part.key} is not rows of its parameter"
        behind = (part.data.data_ptr() - weight.data_ptr()) // weight.element_size()
        begin, end = max(start, behind), min(stop, behind + part.data.numel())
        at = begin - start
        for offsets, sizes in boxes(part.local_shape, begin - behind, end - behind):
            count = math.prod(sizes)
            yield (
                at,
                replace(
                    part,
                    key=prefix + part.key,
                    data=content[at : at + count].view(sizes),
                    dtype=content.dtype,
                    local_shape=sizes,
                    global_offset=tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)),
                    axis_fragmentations=None,
                    # Of the data-parallel processes, which the last number counts, no other has these elements.
                    replica_id=(*part.replica_id[:-1], 0),
                ),
            )
            at += count


def joined(pieces: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """This process's range of a parameter, flat, from what was loaded for its `own_pieces`."""
    return torch.cat([pieces[at].flatten() for at in sorted(pieces)])


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that hold elements start to stop of a tensor of `shape` in row-major order.

    They are in that order too, and at most 2 n - 1 for n dimensions: the end of a row, whole rows, the start of a row.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows, where there are any
    parts = [(last, start, stop)] if first > last else [(first - 1, start, first * row), (last, last * row, stop)]
    for number, (index, begin, end) in enumerate(parts):
        if number == 1 and first < last:
            yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
        for offsets, sizes in boxes(shape[1:], begin - index * row, end - index * row):
            yield (index, *offsets), (1, *sizes)


def _sharded_state(
    optimizer: DistributedOptimizer, model_state: Any, is_loading: bool = False, metadata: Any = None
) -> dict[str, Any]:
    """What the method of this name returns, whose end, a collection of garbage, training would wait for."""
    if is_loading:  # the moments that are loaded into must be there
        optimizer.load_state_dict(optimizer.state_dict())
    return {
        **optimizer.state_dict(),
        "param_state": {_SHARDS: _placed_state(optimizer, model_state, is_loading)},
        "param_state_sharding_type": metadata["distrib_optim_sharding_type"],
    }


def _placed_state(optimizer: DistributedOptimizer, model_state: Any, is_loading: bool) -> dict[int, Any]:
    """Number of the parameter -> kind of state -> place in this process's range -> piece, without data for loading."""
    places = places_of(model_state)
    state: dict[int, Any] = {}
    for number, (weight, start, stop) in enumerate(own_ranges(optimizer)):
        tensors = optimizer._get_main_param_and_optimizer_states(weight)
        state[number] = {}
        for kind in ("param", *optimizer.optimizer_state_keys):
            found = dict(own_pieces(places[weight], start, stop, tensors[kind].detach(), f"optimizer.state.{kind}."))
            state[number][kind] = {at: piece.without_data() for at, piece in found.items()} if is_loading else found
    return state


@torch.no_grad()
def _take_state(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Fill this process's master weights and moments with what was loaded for `_sharded_state`."""
    for number, (weight, _, _) in enumerate(own_ranges(optimizer)):
        tensors = {kind: joined(pieces) for kind, pieces in loaded[_SHARDS][number].items()}
        optimizer._set_main_param_and_optimizer_states(weight, tensors)
