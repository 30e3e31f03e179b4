"""A device's clock, its memory, and what it does meanwhile."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

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


def device_time(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a step on this process's GPU, from its first kernel to its last.

    `computing`: some kernel but NCCL's runs; `communicating`: one of NCCL's does; `exposed`: only NCCL's do; `idle`:
    none. `kernels`: (name, milliseconds, calls), those that take longest first.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    kernels: dict[str, tuple[float, int]] = {}
    for event in seen.events():
        if event.device_type != DeviceType.CUDA or event.name.startswith(("nccl:", "Optimizer", "ProfilerStep")):
            continue
        start, end = event.time_range.start / 1000, event.time_range.end / 1000
        spans[event.name.startswith("nccl")].append((start, end))
        total, calls = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = total + end - start, calls + 1
    every = spans[False] + spans[True]
    computing, busy = _covered(spans[False]), _covered(every)
    rows = sorted(((name, *numbers) for name, numbers in kernels.items()), key=lambda row: -row[1])
    return {
        "computing": computing, "communicating": _covered(spans[True]), "exposed": busy - computing,
        "idle": max(end for _, end in every) - min(start for start, _ in every) - busy, "kernels": rows,
    }  # fmt: skip


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
