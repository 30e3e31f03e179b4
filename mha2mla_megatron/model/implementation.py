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


def fuses_projections(implementation: str, qk_norm: bool) -> bool:
    """Whether the converted attention takes its fused path, which has no place for norms on queries and keys."""
    return implementation in ("local_fused", "transformer_engine") and not qk_norm
