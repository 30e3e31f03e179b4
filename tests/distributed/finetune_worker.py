"""One of several processes of a world that each run tools/finetune.py, in which something may go wrong."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mha2mla_megatron.training import loop
from mha2mla_megatron.training import step as step_module
from tests.conftest import run_tool


def full_disk() -> None:
    """No file can grow beyond 100 kB, about a tenth of what a process saves."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def nan() -> None:
    """The next forward pass gives one."""
    masked_loss = step_module.masked_loss

    def once(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        step_module.masked_loss = masked_loss
        return masked_loss(mask, losses * math.nan)

    step_module.masked_loss = once


FAULTS = {"signal": lambda: os.kill(os.getpid(), signal.SIGTERM), "full disk": full_disk, "nan": nan}


def in_second_step(fault: str | None, rank: int) -> Any:
    """`train_step` with this fault, on that rank, before its second step."""
    steps, train_step = 0, loop.train_step

    def step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if rank == torch.distributed.get_rank() and steps == 2 and fault is not None:
            FAULTS[fault]()
        return train_step(*args)

    return step


def run(name: str, argv: list[str], fault: str | None, rank: int, folder: Path) -> None:
    """Leaves folder/NAME.RANK.json: the exit code, and what was written to stderr. fault: what happens on process
    `rank` in its second step, a key of FAULTS, or None."""
    with patch.object(loop, "train_step", in_second_step(fault, rank)):
        done = run_tool("finetune", *argv, check=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result = {"code": done.returncode, "stderr": done.stderr}
    (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
