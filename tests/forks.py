"""Processes that start at once: forks of one that has imported everything, which takes longer than most tests.

That one is a server which runs no threads. A fork of the tests' own process, with the threads of torch and gloo that
earlier tests have left in it, may stop at a lock that one of them held.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

import torch

TIMEOUT = 600
"""Seconds until processes that do not end are taken to hang."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([  # looked at where the first process starts
    __name__, "tests.conftest", "tests.distributed.layout_worker", "tests.distributed.reshard_worker",
    "mha2mla_megatron.checkpoint.convert_hf_megatron", "mha2mla_megatron.convert", "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama", "megatron.core.models.mimo",  # imported where first used
])  # fmt: skip


def fork(job: Callable[..., object], *args: object) -> BaseProcess:
    """Start a process of one thread that calls `job`, a function of an importable module."""
    process = _CONTEXT.Process(target=_run, args=(job, *args))
    process.start()
    return process


def exit_codes(processes: Sequence[BaseProcess]) -> list[int]:
    """Of each when all have ended: the code, or minus the signal that ended it.

    Raises AssertionError where one hangs, after killing all.
    """
    end = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert None not in codes, f"not ended after {TIMEOUT} seconds: exit codes {codes}"
    return [int(code) for code in codes if code is not None]


def _run(job: Callable[..., object], *args: object) -> None:
    torch.set_num_threads(1)  # sums have another order with more
    job(*args)
