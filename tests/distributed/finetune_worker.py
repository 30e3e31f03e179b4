"""One of two processes under torchrun: runs tools/finetune.py several times in one world, which is slow to start.

Its argument is a folder with runs.json, a list of {"name", "argv", "stop"}; beside it each process writes
<name>.<rank>.json with the exit code and what was written to stderr. stop: the process that gets a SIGTERM in its
second step, or null.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.model.parallel import shut_down_parallel
from mha2mla_megatron.training import loop
from tests.conftest import ROOT

RANK = int(os.environ["RANK"])


def stop_in_second_step(rank: int | None) -> Any:
    """`train_step` that, on that rank, gets a SIGTERM before its second step."""
    steps, train_step = 0, loop.train_step

    def step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if rank == RANK and steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    return step


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("tools_finetune", ROOT / "tools" / "finetune.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    original = loop.train_step
    for run in json.loads((folder / "runs.json").read_text()):
        code, errors = 0, io.StringIO()
        loop.train_step = stop_in_second_step(run["stop"])
        with contextlib.redirect_stderr(errors):
            try:
                run_tool(tool.main, run["argv"])
            except SystemExit as end:
                code = int(end.code or 0)
        loop.train_step = original
        result = {"code": code, "stderr": errors.getvalue()}
        (folder / f"{run['name']}.{RANK}.json").write_text(json.dumps(result))
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
