"""Kernels that give the same bits each time they are run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}
"""What cuBLAS, Transformer Engine's attention and NCCL read: a buffer that no streams share, no sums in the order in
which blocks end, one way to sum over GPUs whatever their load."""


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Where it is `wanted`, until the end of the context; enter it before the first kernel. torch then raises at an
    operation that has no deterministic kernel."""
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    mode = torch.get_deterministic_debug_mode()
    os.environ.update(ENVIRONMENT)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
