"""Run each test file in a process of its own, two at a time:  python -m tests.run_files [pytest's arguments]

A file then finds no threads, process groups or freed memory that another one left, and a crash or a hang costs that
file alone. One whose process was killed (it crashed, or took longer than LIMIT) is run once more, and named at the end
with what it printed before.

The processes are forks of this one, which has imported LIBRARIES: for most files that would take longer than the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

FOLDER = Path(__file__).parent
AT_ONCE = 2
LIMIT = 1200
"""Seconds: five times what the longest file takes on two cores."""
LIBRARIES = ("transformers.models.llama.modeling_llama", "megatron.core")


@dataclass(frozen=True)
class Result:
    file: Path
    code: int
    """The process's exit code, or minus the signal that ended it."""
    output: str
    seconds: float

    @property
    def well(self) -> bool:
        return self.code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    def __str__(self) -> str:
        last = (self.output.strip().splitlines() or [""])[-1].strip("= ")
        ended = f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else last
        return f"{self.seconds:5.0f} s  {os.path.relpath(self.file, FOLDER.parent)}: {ended}"


@dataclass(frozen=True)
class Attempt:
    """A file whose tests are being run. process: its id, which is also that of its group."""

    file: Path
    process: int
    output: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    def result(self, limit: float) -> Result | None:
        """None while it goes on, which it may for `limit` seconds."""
        seconds = time.monotonic() - self.started
        ended = os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None and seconds < limit:
            return None
        code = self.end()
        self.output.seek(0)
        return Result(self.file, code, self.output.read().decode(errors="replace"), seconds)

    def end(self) -> int:
        """End the process, if it has not ended, and those that it started and has left; the exit code."""
        for kill in (os.killpg, os.kill):  # it has no group of its own before it has run at all
            with contextlib.suppress(ProcessLookupError):
                kill(self.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


class Runner:
    """words: pytest's. limit: seconds for a file."""

    def __init__(self, words: Sequence[str], limit: float = LIMIT) -> None:
        self.words, self.limit = list(words), limit
        self.running: list[Attempt] = []
        self.killed: list[Result] = []

    def run(self, files: Sequence[Path]) -> int:
        """Print a line for each file when it has ended, at last what went wrong; 1 if anything did, otherwise 0."""
        started, waiting, results = time.monotonic(), list(files), list[Result]()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < AT_ONCE:
                    self._start(waiting.pop(0))
                time.sleep(0.05)
                results += self._ended()
        finally:  # an interrupt, which processes in sessions of their own do not get
            for attempt in self.running:
                attempt.end()
        bad = [result for result in results if not result.well]
        for result in [*self.killed, *bad]:
            print(f"\n== {result}\n{result.output}")
        seconds = time.monotonic() - started
        print(f"{len(files)} files in {seconds:.0f} s: {len(bad)} failed, {len(self.killed)} run once more")
        for result in bad:
            print(f"FAILED {result}")
        return 1 if bad else 0

    def _ended(self) -> list[Result]:
        """Of the files that have ended since the last call, but for those that are started once more."""
        results = []
        for attempt in list(self.running):
            if (result := attempt.result(self.limit)) is None:
                continue
            self.running.remove(attempt)
            once_more = result.code < 0 and all(before.file != result.file for before in self.killed)
            print(f"{result}; once more" if once_more else result, flush=True)
            if once_more:
                self.killed.append(result)
                self._start(result.file)
            else:
                results.append(result)
        return results

    def _start(self, file: Path) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        if process := os.fork():
            self.running.append(Attempt(file, process, output))
            return
        code = 1
        try:
            code = _run_pytest([str(file), "--color=no", *self.words], output)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # the callers are the parent's


def _run_pytest(words: list[str], output: IO[bytes]) -> int:
    """In a session of its own, and with what it prints in `output`; the exit code."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(FOLDER.parent)
    code = pytest.main(words)
    sys.stdout.flush()
    return int(code)


def _import_libraries() -> None:
    """Where there is a GPU, nothing: forks could not use it if one of the libraries has looked for it."""
    import torch

    if torch.cuda.device_count() == 0:  # which asks the driver alone
        with warnings.catch_warnings(action="ignore"):
            for name in LIBRARIES:
                importlib.import_module(name)


def _takes_longer(file: Path) -> tuple[bool, int]:
    """To be begun early, or it would run alone at the end: what starts several processes, then what is long."""
    text = file.read_bytes()
    return b"tests.distributed" in text or b"subprocess" in text, len(text)


if __name__ == "__main__":
    _import_libraries()
    found = sorted(FOLDER.rglob("test_*.py"), key=_takes_longer, reverse=True)
    sys.exit(Runner(sys.argv[1:]).run(found))
