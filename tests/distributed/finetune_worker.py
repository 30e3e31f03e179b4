"""One of two processes under torchrun: runs tools/finetune.py several times in one world, which is slow to start.

Its argument is a folder with runs.json, a list of {"name", "argv", "fault", "rank"}; beside it each process writes
<name>.<rank>.json with the exit code and what was written to stderr. fault: what happens on process `rank` in its
second step, a key of FAULTS, or null.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.model.parallel import shut_down_parallel
from mha2mla_megatron.ranks import join_launched_ranks
from mha2mla_megatron.training import loop
from mha2mla_megatron.training import step as step_module
from tests.conftest import ROOT

RANK = int(os.environ["RANK"])


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
        if rank == RANK and steps == 2 and fault is not None:
            FAULTS[fault]()
        return train_step(*args)

    return step


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("tools_finetune", ROOT / "tools" / "finetune.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    original = loop.train_step
    join_launched_ranks("gloo", timedelta(minutes=30))  # a run that joins a world of its own gives it back at its end
    for run in json.loads((folder / "runs.json").read_text()):
        code, errors = 0, io.StringIO()
        loop.train_step = in_second_step(run["fault"], run["rank"])
        with contextlib.redirect_stderr(errors):
            try:
                run_tool(tool.main, run["argv"])
            except SystemExit as end:
                code = int(end.code or 0)
        loop.train_step = original
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result = {"code": code, "stderr": errors.getvalue()}
        (folder / f"{run['name']}.{RANK}.json").write_text(json.dumps(result))
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
