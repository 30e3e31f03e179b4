"""Worlds of processes that each run a list of jobs: forks of one process that has imported everything once."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mha2mla_megatron.model.parallel import shut_down_parallel

TIMEOUT = 240
LAZY = ("transformers.models.llama.modeling_llama", "megatron.core.models.mimo")
"""Modules that Megatron imports when it first uses them."""


def run_world(size: int, folder: Path, job: Callable[..., None], runs: list[tuple[Any, ...]]) -> None:
    """Start `size` processes, which call `job`, a function of an importable module, with each of `runs` in turn.

    Raises AssertionError with the tracebacks of those that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, job.__module__, *LAZY])  # looked at where the first world starts
    store = folder / f"store-{size}-{job.__name__}"
    for left in folder.glob(f"{store.name}*"):  # of an earlier run in the same folder
        left.unlink()
    processes = [context.Process(target=_work, args=(rank, size, store, job, runs)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    errors = [file.read_text() for file in sorted(folder.glob(f"{store.name}-error.*"))]
    assert not errors and not any(process.exitcode for process in processes), "\n".join(errors) or "timed out"


def _work(rank: int, size: int, store: Path, job: Callable[..., None], runs: list[tuple[Any, ...]]) -> None:
    try:
        torch.set_num_threads(1)
        world = torch.distributed.FileStore(str(store), size)
        torch.distributed.init_process_group("gloo", store=world, rank=rank, world_size=size)
        for run in runs:
            job(*run)
        shut_down_parallel()
    except BaseException:
        store.with_name(f"{store.name}-error.{rank}").write_text(traceback.format_exc())
        raise
