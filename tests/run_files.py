"""Run each test file in a process of its own, two at a time:  python -m tests.run_files [pytest's arguments]

A file then finds no threads, process groups or freed memory that another one left, and a crash or a hang costs that
file alone. One whose process was killed (it crashed, or took longer than LIMIT) is run once more, and named at the end
with what it printed before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
AT_ONCE = 2
LIMIT = 1200
"""Seconds: five times what the longest file takes on two cores."""
NO_TESTS = 5
"""pytest's exit code where its arguments select none in a file."""


@dataclass(frozen=True)
class Result:
    file: Path
    code: int
    """The process's exit code, or minus the signal that ended it."""
    output: str
    seconds: float

    @property
    def well(self) -> bool:
        return self.code in (0, NO_TESTS)

    def __str__(self) -> str:
        last = (self.output.strip().splitlines() or [""])[-1].strip("= ")
        ended = f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else last
        return f"{self.seconds:5.0f} s  {os.path.relpath(self.file, FOLDER.parent)}: {ended}"


class Runner:
    """words: pytest's. limit: seconds for a file."""

    def __init__(self, words: Sequence[str], limit: float = LIMIT) -> None:
        self.words, self.limit = list(words), limit
        self.running: set[subprocess.Popen[bytes]] = set()
        self.killed: list[Result] = []
        self.interrupted = False

    def run(self, files: Sequence[Path]) -> int:
        """Print a line for each file when it has ended, at last what went wrong; 1 if anything did, otherwise 0."""
        started = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(self._attempt, file) for file in files]
            try:
                results = [future.result() for future in futures]
            except BaseException:  # an interrupt, which processes in sessions of their own do not get
                self.interrupted = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    _kill(process)
                raise
        bad = [result for result in results if not result.well]
        for result in [*self.killed, *bad]:
            print(f"\n== {result}\n{result.output}")
        seconds = time.monotonic() - started
        print(f"{len(files)} files in {seconds:.0f} s: {len(bad)} failed, {len(self.killed)} run once more")
        for result in bad:
            print(f"FAILED {result}")
        return 1 if bad else 0

    def _attempt(self, file: Path) -> Result:
        result = self._process(file)
        if result.code < 0 and not self.interrupted:
            self.killed.append(result)
            print(f"{result}; once more", flush=True)
            result = self._process(file)
        print(result, flush=True)
        return result

    def _process(self, file: Path) -> Result:
        started = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", str(file), "--color=no", *self.words],
                stdout=output, stderr=subprocess.STDOUT, cwd=FOLDER.parent, start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                _kill(process)
                self.running.remove(process)
            output.seek(0)
            return Result(file, code, output.read().decode(errors="replace"), time.monotonic() - started)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those that it started and has left."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _takes_longer(file: Path) -> tuple[bool, int]:
    """To be begun early, or it would run alone at the end: what starts several processes, then what is long."""
    text = file.read_bytes()
    return b"tests.distributed" in text or b"subprocess" in text, len(text)


if __name__ == "__main__":
    found = sorted(FOLDER.rglob("test_*.py"), key=_takes_longer, reverse=True)
    sys.exit(Runner(sys.argv[1:]).run(found))
