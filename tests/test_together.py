"""A lost process where NCCL waits for it; gloo: tests/distributed; on two GPUs: tools/benchmarks/multi_gpu.py."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = """
import sys, time
from mha2mla_megatron import together

together.NCCL_INTERVAL = 0.05
looks = iter([None, None, "NCCL, DATA_PARALLEL_GROUP: TIMEOUT"])
together.nccl_error = lambda: next(looks)
with together.names_lost_processes("another process has died", "go on"):
    time.sleep(30)
print("not reached")
"""


def test_a_thread_ends_a_process_that_nccl_keeps_waiting() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    line = "error: rank not known yet: another process has died (NCCL, DATA_PARALLEL_GROUP: TIMEOUT); go on"
    assert done.stderr.splitlines()[-1] == line
