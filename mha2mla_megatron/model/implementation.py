"""Whose kernels the layers are built from."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.cpu_mode import has_transformer_engine

Implementation = Literal["local", "local_fused", "transformer_engine", "transformer_engine_unfused"]
"""Megatron-core's parts or Transformer Engine's; the converted attention with its fused path or module by module."""

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def choose_implementation(wanted: str) -> Implementation:
    """The one that `wanted` names; for `auto` transformer_engine where it is installed and has a GPU, else local.

    Raises UserError for one that cannot run here.
    """
    if wanted == "auto":
        return "transformer_engine" if has_transformer_engine() else "local"
    if uses_transformer_engine(wanted) and not has_transformer_engine():
        raise UserError(f"implementation: {wanted} needs a GPU and the package transformer-engine; valid here: local")
    if wanted == "local_fused" and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError("implementation: local_fused needs a GPU; valid here: local")
    assert wanted in IMPLEMENTATIONS, wanted
    return wanted  # type: ignore[return-value]


def uses_transformer_engine(implementation: str) -> bool:
    return implementation.startswith("transformer_engine")


def rotates_fused(implementation: str, qk_norm: bool) -> bool:
    """Whether the converted attention rotates by our kernel: norms on queries and keys would stand in its way."""
    return implementation != "local" and not qk_norm


def fuses_projections(implementation: str, qk_norm: bool, fp8: bool = False) -> bool:
    """Whether it goes from input to queries, keys and values at once, which is not made for 8 bits."""
    return implementation in ("local_fused", "transformer_engine") and not qk_norm and not fp8


def unfused(implementation: Implementation) -> Implementation:
    """The one with the same layers that goes module by module."""
    return "transformer_engine_unfused" if implementation == "transformer_engine" else implementation
