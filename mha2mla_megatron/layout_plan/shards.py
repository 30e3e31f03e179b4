"""Which parameters each rank holds: the library's table of global shapes, split as Megatron's layers split it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.adapters import FIRST, SECOND
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.model.parallel import ParallelConfig, layers_of_chunks

COLUMN_PARALLEL = (
    "word_embeddings", "output_layer", "linear_qkv", "linear_q", "linear_k_rope", "linear_k_up", "linear_k_nope",
    "linear_v_up", "linear_v", "linear_kv_down", "linear_fc1",
)  # fmt: skip
"""Layers whose weight and bias are split by rows; those of the vocabulary too."""

HEAD_NORMS = ("q_layernorm", "k_layernorm")
"""Split too where they have weights for each key/value head, in the converted attention."""

ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Layers whose weight is split by columns; each rank holds the whole bias."""


@dataclass(frozen=True)
class Chunk:
    """What a pipeline stage computes without waiting for another one; it has one, or several with virtual stages."""

    layers: range
    """Counted from 0; there may be none."""

    first: bool
    """It has the embedding."""

    last: bool
    """It has the final norm, the output layer and the loss."""


def stage_chunks(architecture: Architecture, parallel: ParallelConfig) -> list[list[Chunk]]:
    """The chunks of each pipeline stage, in the order in which a sample goes through them."""
    stages, layers = parallel.pipeline_model_parallel_size, layers_of_chunks(architecture.num_layers, parallel)
    chunks = [Chunk(held, i == 0, i == len(layers) - 1) for i, held in enumerate(layers)]
    return [chunks[stage::stages] for stage in range(stages)]


def split_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """The dimension that tensor parallelism splits this Megatron tensor by; None: every rank has it all."""
    *_, layer, kind = name.split(".")
    if layer in HEAD_NORMS and len(shape) == 2:
        return 0
    if layer in COLUMN_PARALLEL and kind in ("weight", "bias", SECOND):
        return 0
    return 1 if layer in ROW_PARALLEL and kind in ("weight", FIRST) else None


def stage_parameters(
    architecture: Architecture, parallel: ParallelConfig, adapters: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> list[dict[str, tuple[int, ...]]]:
    """For each pipeline stage: Megatron name -> shape on one rank, of every parameter, and of `adapters`.

    Where the output layer is the embedding and they are on two stages, the last one has a copy of it.
    """
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shapes = {**megatron_shapes(architecture), **adapters}
    if architecture.tie_word_embeddings and stages > 1:
        shapes["output_layer.weight"] = shapes["embedding.word_embeddings.weight"]
    found = []
    for chunks in stage_chunks(architecture, parallel):
        prefixes = [f"decoder.layers.{layer}." for chunk in chunks for layer in chunk.layers]
        prefixes += ["embedding."] if any(chunk.first for chunk in chunks) else []
        prefixes += ["decoder.final_layernorm.", "output_layer."] if any(chunk.last for chunk in chunks) else []
        found.append(
            {
                name: rank_shape(name, shape, tp)
                for name, shape in shapes.items()
                if name.startswith(tuple(prefixes)) and not name.endswith("rope_pairs")  # whole numbers, no parameter
            }
        )
    return found


def fp8_copies(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of the 8-bit copies that Transformer Engine keeps of the layers' matrices: each as it is and transposed,
    since Hopper multiplies only so."""
    return 2 * count({name: shape for name, shape in shapes.items() if ".linear_" in name and len(shape) == 2})


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers in all tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def rank_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's part of this Megatron tensor."""
    dim = split_dim(name, shape)
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))
