"""The jobs of the worlds in tests/test_multi_gpu.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "benchmarks"))
from job_worlds import serve_jobs


def add(a: int, b: int) -> int:
    return a + b + int(os.environ["RANK"])


def fail(ranks: list[int]) -> None:
    if int(os.environ["RANK"]) in ranks:
        raise ValueError("no such layout")
    time.sleep(60)


def die() -> None:
    if os.environ["RANK"] == "1":
        print("about to end", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    serve_jobs(Path(sys.argv[1]), {"add": add, "fail": fail, "die": die}, lambda: None)
