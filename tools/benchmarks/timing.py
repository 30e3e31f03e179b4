"""A device's clock and its memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch


def timed[T](run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until all that `run` starts is done, and what it returned."""
    _synchronise(device)
    start = time.perf_counter()
    result = run()
    _synchronise(device)
    return time.perf_counter() - start, result


def peak_memory(device: torch.device) -> float:
    """GiB at most: on a GPU what torch allocated since its last reset, on a CPU what the process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
