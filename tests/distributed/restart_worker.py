"""tools/finetune.py under torchrun; process 1 dies in the second step of the first start, and hangs in the next's."""

from __future__ import annotations

import os
import runpy
import signal
import time
from typing import Any

from mha2mla_megatron.training import loop
from tests.conftest import ROOT

START, RANK = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
train_step, steps = loop.train_step, 0


def step(*args: Any) -> Any:
    global steps
    steps += 1
    if RANK == 1 and steps == 2 and START == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 1 and steps == 2 and START == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun waits half a minute before it kills the process
        time.sleep(600)
    return train_step(*args)


loop.train_step = step
runpy.run_path(str(ROOT / "tools" / "finetune.py"), run_name="__main__")
