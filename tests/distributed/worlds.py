"""Worlds of processes that each run a list of jobs."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

from mha2mla_megatron.model.parallel import shut_down_parallel
from tests.forks import exit_codes, fork


def run_world(size: int, folder: Path, job: Callable[..., None], runs: list[tuple[Any, ...]]) -> None:
    """Start `size` processes, which call `job`, a function of an importable module, with each of `runs` in turn.

    Runs at one layout belong together: each change of it leaves gloo's threads of the one before, and with hundreds of
    them every message is slow.

    Raises AssertionError with the tracebacks of those that failed.
    """
    store = folder / f"store-{size}-{job.__name__}"
    for left in folder.glob(f"{store.name}*"):  # of an earlier run in the same folder
        left.unlink()
    codes = exit_codes([fork(_work, rank, size, store, job, runs) for rank in range(size)])
    errors = [file.read_text() for file in sorted(folder.glob(f"{store.name}-error.*"))]
    assert not errors and not any(codes), "\n".join(errors) or f"exit codes {codes}"


def _work(rank: int, size: int, store: Path, job: Callable[..., None], runs: list[tuple[Any, ...]]) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)  # as torchrun does
    try:
        world = torch.distributed.FileStore(str(store), size)
        torch.distributed.init_process_group("gloo", store=world, rank=rank, world_size=size)
        for run in runs:
            job(*run)
        shut_down_parallel()
    except BaseException:
        store.with_name(f"{store.name}-error.{rank}").write_text(traceback.format_exc())
        raise
