"""What each process holds of weights, gradients and optimizer state, placed in the whole tensors as checkpoints place
it: the form in which the results of different parallel layouts are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from mha2mla_megatron.model.provider import sharded_weights
from mha2mla_megatron.training.checkpoint import METADATA
from mha2mla_megatron.training.weight_average import WeightAverage

Piece = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]
"""Name and shape of the whole tensor, place in it, content."""


def fill(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, whole: Callable[[str], torch.Tensor]
) -> None:
    """Take this rank's part of whole tensors, by name: parameters and buffers."""
    with torch.no_grad():
        for piece in _sharded_tensors(chunks):
            piece.data.copy_(whole(piece.key)[piece.global_slice()])
    optimizer.reload_model_params()


def pieces_of(chunks: Sequence[DistributedDataParallel]) -> list[Piece]:
    """This rank's part of the model's floating-point tensors, copied."""
    return [_piece(piece, piece.data) for piece in _sharded_tensors(chunks) if piece.data.is_floating_point()]


def keep_gradients(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> list[Piece]:
    """An empty list, which the optimizer's next step fills with this rank's part of the gradients, float32, before it
    uses them."""
    gradients: list[Piece] = []
    update = optimizer.step

    def step() -> Any:
        optimizer.step = update  # type: ignore[method-assign]
        gradients.extend(_gradient_pieces(chunks))
        return update()

    optimizer.step = step  # type: ignore[method-assign]
    return gradients


def state_pieces(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, average: WeightAverage | None = None
) -> list[Piece]:
    """This rank's part of weights, master weights, moments and averages, copied; also of tensors that are not
    floating-point."""
    model: dict[str, Any] = {str(index): sharded_weights(chunk.module) for index, chunk in enumerate(chunks)}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=METADATA)}
    if average is not None:
        state["average"] = average.placed(model)
    apply_factories(state)
    tensors: list[Any] = [piece for piece in nested_values(state) if isinstance(piece, ShardedTensor)]
    return [_piece(piece, piece.data) for piece in tensors]


def merge_pieces(pieces: Iterable[Piece]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks.

    Raises AssertionError where copies of a piece differ or a tensor is not wholly held.
    """
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, torch.Tensor] = {}
    for key, shape, place, piece in pieces:
        if key not in whole:
            whole[key], covered[key] = torch.zeros(shape, dtype=piece.dtype), torch.zeros(shape, dtype=torch.bool)
        assert whole[key].shape == shape, key
        seen = covered[key][place]
        assert torch.equal(whole[key][place][seen], piece[seen]), f"copies of {key} differ"
        whole[key][place] = piece
        covered[key][place] = True
    missing = [key for key, mask in covered.items() if not mask.all()]
    assert not missing, f"no process holds all of {missing[0]}"
    return whole


def _gradient_pieces(chunks: Sequence[DistributedDataParallel]) -> Iterator[Piece]:
    """Like `pieces_of`, with the gradients: each data-parallel rank has the sums of its part of every bucket alone."""
    buffers: list[Any] = [buffer for chunk in chunks for buffer in chunk.buffers]  # type: ignore[attr-defined]
    for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
        group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    starts = {parameter.data_ptr(): parameter for parameter in parameters}
    for piece in _sharded_tensors(chunks):
        if not piece.data.is_floating_point():
            continue
        # Checkpoints place weights, whole or in views of them; the gradient has the same place in its own tensor.
        start = max(address for address in starts if address <= piece.data.data_ptr())
        gradient: Any = starts[start].main_grad  # type: ignore[attr-defined]
        offset = gradient.storage_offset() + (piece.data.data_ptr() - start) // piece.data.element_size()
        assert starts[start].is_contiguous() and gradient.is_contiguous()
        yield _piece(piece, gradient.as_strided(piece.data.shape, piece.data.stride(), offset))


def _piece(placed: Any, content: torch.Tensor) -> Piece:
    return placed.key, tuple(placed.global_shape), placed.global_slice(), content.detach().clone()


def _sharded_tensors(chunks: Sequence[DistributedDataParallel]) -> Iterator[Any]:
    state: dict[str, Any] = {str(index): sharded_weights(chunk.module) for index, chunk in enumerate(chunks)}
    apply_factories(state)
    return nested_values(state)
