"""The device a process computes on, and what makes Megatron-core run where there is no GPU.

Megatron-core asks for CUDA in places that have no switch: streams, random states, `device="cuda"` in the schedules, the
type names that the distributed optimizer compares. CPU mode answers all of them with the CPU. It changes the whole
process and is never on where a GPU is found.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mha2mla_megatron.errors import UserError

_mode: _CpuForCuda | None = None


def prepare_device() -> torch.device:
    """The device of this process, made current: the CUDA device of its LOCAL_RANK, or the CPU in CPU mode.

    Raises UserError where a node has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        enable_cpu_mode()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; "
            "start at most that many processes a node (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and has a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def enable_cpu_mode() -> None:
    """Let Megatron-core run on the CPU from now on. Calling it again does nothing."""
    global _mode
    assert not torch.cuda.is_available(), "CPU mode is for machines without a GPU"
    if _mode is not None:
        return
    from megatron.core.tensor_parallel import random

    # The function mode makes torch warn of what Megatron does on a GPU without a warning.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name, replacement in _CUDA_REPLACEMENTS.items():
        setattr(torch.cuda, name, replacement)
    # The tracker of Megatron's random states reads and writes CUDA generators through these two.
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    _mode = mode = _CpuForCuda()
    mode.__enter__()
    # A backward pass goes through the mode's handler, where the mode is off; recomputing runs whole layers in there.
    recompute = random.CheckpointFunction.backward

    def recompute_in_mode(*args: Any) -> Any:
        with mode:
            return recompute(*args)

    random.CheckpointFunction.backward = staticmethod(recompute_in_mode)  # type: ignore[method-assign]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


_CUDA_REPLACEMENTS: dict[str, Any] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "current_stream": lambda device=None: torch.cpu.current_stream(),
    "stream": torch.cpu.stream,
    "Stream": torch.cpu.Stream,
    "get_rng_state": lambda device="cpu": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cpu": torch.set_rng_state(new_state),
    "manual_seed": torch.manual_seed,
    "memory_allocated": _zero,
    "max_memory_allocated": _zero,
    "memory_reserved": _zero,
    "max_memory_reserved": _zero,
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": _nothing,
}


class _CpuForCuda(TorchFunctionMode):
    """Tensors asked for on CUDA are made on the CPU; CPU tensors name their type as CUDA tensors do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers compare it with 'torch.cuda.FloatTensor' and refuse anything else.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if "pin_memory" in kwargs:  # page-locked memory is for copies to a GPU
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
