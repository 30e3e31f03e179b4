"""Worlds of processes, one for each GPU, that are told what to do job by job.

The processes are a script's, started with torchrun's variables and a folder as their only word; they import what they
need, call `serve_jobs`, and wait there, without a GPU, until the first job comes on their standard input. So worlds of
several sizes can be started at once, and cost seconds less when their turn comes. A world that fails or hangs in a job
is ended; the script goes on with another one.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import first_line
from mha2mla_megatron.files import replace_text

GRACE = 5.0
"""Seconds in which the others may fail too, once a process has; those that do not are waiting for it."""


class JobFailed(Exception):
    """Why a job has no result: the last line of a process's traceback, or what became of the process."""


class World:
    """`size` processes that run the same jobs at the same time."""

    def __init__(self, script: Path, size: int, folder: Path) -> None:
        """folder: for answers and output (log.RANK) of the processes; made here."""
        self.size, self.folder, self.number = size, folder, 0
        folder.mkdir(parents=True)
        self.logs = [(folder / f"log.{rank}").open("w") for rank in range(size)]
        command = [sys.executable, str(script), str(folder)]
        self.processes = start_processes(command, size, self.logs)

    def run(self, job: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        """The result on rank 0 of this job. Raises JobFailed, after which `usable` says whether the world goes on."""
        self.number += 1
        message = json.dumps({"number": self.number, "job": job, "arguments": arguments}) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended, which is found below
        end = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            answers |= {rank: found for rank in range(self.size) if (found := self._answer(rank)) is not None}
            failed = any(answer["error"] for answer in answers.values())
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            if failed or ended:
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        errors = [f"rank {rank}: {answers[rank]['error']}" for rank in sorted(answers) if answers[rank]["error"]]
        missing = [rank for rank in range(self.size) if rank not in answers]
        if missing:
            codes = {rank: self.processes[rank].poll() for rank in missing}
            dead = [f"rank {rank} ended with {code}: {self._last_line(rank)}" for rank, code in codes.items() if code]
            self.stop()
            errors = dead + errors or [f"no answer of rank {missing[0]} after {timeout:.0f} s"]
        if errors:
            raise JobFailed(errors[0])
        return answers[0]["result"]

    @property
    def usable(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self, patience: float = 20.0) -> None:
        """Let the processes end, and end those that do not."""
        for process in self.processes:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        end = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.stop()

    def stop(self) -> None:
        """End the processes at once."""
        for process in self.processes:
            process.kill()
        for process, log in zip(self.processes, self.logs, strict=True):
            process.wait()
            log.close()

    def _answer(self, rank: int) -> dict[str, Any] | None:
        file = self.folder / f"answer.{self.number}.{rank}"
        return json.loads(file.read_text()) if file.exists() else None

    def _last_line(self, rank: int) -> str:
        lines = (self.folder / f"log.{rank}").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"


def start_processes(command: Sequence[str], size: int, logs: Sequence[Any]) -> list[subprocess.Popen[str]]:
    """One process a GPU with the environment that torchrun gives, output to `logs`, standard input open to be written
    to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip


def serve_jobs(folder: Path, jobs: Mapping[str, Callable[..., Any]], clean_up: Callable[[], None]) -> None:
    """In a process of a world: do what it is told until it is told no more."""
    rank = os.environ["RANK"]
    for line in sys.stdin:
        message = json.loads(line)
        answer: dict[str, Any] = {"result": None, "error": None}
        try:
            answer["result"] = jobs[message["job"]](**message["arguments"])
        except Exception as error:
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {first_line(error)}"[:300]
        sys.stdout.flush()
        gc.collect()  # models and their wrappers refer to each other; a failed job's traceback holds them until here
        clean_up()
        replace_text(folder / f"answer.{message['number']}.{rank}", json.dumps(answer))
