"""Names of low-rank updates (LoRA, Hu et al., arXiv 2106.09685) in checkpoints.

A matrix `X.weight` [rows, columns] that has one is used as weight + alpha / r lora_B lora_A, with `X.lora_A`
[r, columns] and `X.lora_B` [rows, r] beside it. r is in their shapes, alpha among the step's values of the run.
"""

from __future__ import annotations

from collections.abc import Mapping

ALPHA = "lora_alpha"
"""Key of that."""

FIRST, SECOND = "lora_A", "lora_B"


def adapter_names(weight: str) -> tuple[str, str]:
    """A's and B's of the matrix of this name."""
    stem = weight.removesuffix("weight")
    return stem + FIRST, stem + SECOND


def adapter_shapes(matrices: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the updates of these matrices, of which the shapes are given too."""
    shapes = {}
    for weight, (rows, columns) in matrices.items():
        shapes |= dict(zip(adapter_names(weight), ((rank, columns), (rows, rank)), strict=True))
    return shapes


def with_adapters(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors that a model must have, and those of the updates that a step folder with `found` has of them."""
    shapes = dict(expected)
    for weight, shape in expected.items():
        first = found.get(adapter_names(weight)[0], ())
        if len(shape) == len(first) == 2:
            shapes |= adapter_shapes({weight: shape}, first[0])
    return shapes
