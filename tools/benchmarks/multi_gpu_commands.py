"""The parts of multi_gpu.py that run commands as users do: a killed rank and the resume, calibration and conversion."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from job_worlds import JobFailed, start_processes
from safetensors import safe_open

from mha2mla_megatron.checkpoint.megatron import read_latest

TOOLS = Path(__file__).resolve().parents[1]
START_LIMIT = 180
"""Seconds that a command may take to start and do its first steps."""

KILL_AFTER, SAVE_INTERVAL = 25, 10
NOTICE_MINUTES = 0.5
"""parallel.timeout_minutes of the run whose rank is killed."""

NOTICE_SLACK = 60.0
"""Seconds beyond it that the others may take to end: a watchdog looks at intervals, and writes down what it saw."""


def kill_a_rank(folder: Path, size: int, timeout: float) -> dict[str, Any]:
    """tools/finetune.py in `size` processes; the last one gets SIGKILL; then the same command once more.

    folder: of the job make_run. Raises JobFailed where the others do not end in time, or the run does not go on.
    """
    save = folder / "killed"
    command = [sys.executable, str(TOOLS / "finetune.py"), *_words(folder, save, size)]
    with _Started(command, size, folder / "kill") as processes:
        _wait(lambda: _steps(save) >= KILL_AFTER, START_LIMIT, processes.check)
        kept, killed = read_latest(save), time.monotonic()
        processes.all[-1].send_signal(signal.SIGKILL)
        limit = min(timeout, 60 * NOTICE_MINUTES + NOTICE_SLACK)
        codes = [process.wait(max(0.0, killed + limit - time.monotonic())) for process in processes.all[:-1]]
        seconds, text = time.monotonic() - killed, processes.text(0)
    said = [line for line in text.splitlines() if "another process has died" in line]
    else_said = [line for line in text.splitlines() if "Watchdog" in line or "Error" in line] or [_last(text)]
    result = {"seconds": seconds, "codes": codes, "said": said[-1] if said else None, "else_said": else_said[0][:300]}
    if 0 in codes:
        raise JobFailed(f"a rank ended with 0 after another one was killed: {result}")
    latest = read_latest(save)
    assert latest is not None and kept is not None and latest >= kept
    more = latest + SAVE_INTERVAL
    started = time.monotonic()
    with _Started([*command, f"steps={more}"], size, folder / "resume") as processes:
        for process in processes.all:
            if process.wait(START_LIMIT) != 0:
                raise JobFailed(f"the resume ended with {process.returncode}: {_last(processes.text(0))}")
    _check_log(save, more)
    return {**result, "resumed_from": latest, "resumed_to": more, "resume_seconds": time.monotonic() - started}


def kill_under_torchrun(folder: Path, size: int, timeout: float) -> dict[str, Any]:
    """The same under torchrun with one restart: it ends the others and starts all again, which resume by themselves."""
    save, steps = folder / "restarted", KILL_AFTER + 5 * SAVE_INTERVAL
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    words = [str(TOOLS / "finetune.py"), *_words(folder, save, size), f"steps={steps}"]
    started = time.monotonic()
    command = [*launcher, "--max-restarts=1", *words]
    with _Started(command, 1, folder / "torchrun") as processes:
        _wait(lambda: _steps(save) >= KILL_AFTER, START_LIMIT, processes.check)
        kept, killed = read_latest(save), time.monotonic()
        os.kill(_child_of_rank(processes.all[0].pid, size - 1), signal.SIGKILL)
        code = processes.all[0].wait(max(0.0, started + timeout - time.monotonic()))
        if code != 0:
            raise JobFailed(f"torchrun ended with {code}: {_last(processes.text(0))}")
        resumed = [int(step) for step in re.findall(r"from step (\d+) to", processes.text(0))]
    _check_log(save, steps)
    if len(resumed) < 2 or kept is None or resumed[-1] < kept:
        raise JobFailed(f"started from steps {resumed}, while {kept} was saved")
    return {"resumed_from": resumed[-1], "resumed_to": steps, "seconds": time.monotonic() - killed}


def calibrate(folder: Path, size: int, timeout: float) -> dict[str, Any]:
    """tools/calibrate.py on one GPU and on all, what their statistics differ by, and the conversion with them.

    folder: of the job make_original.
    """
    words = [str(folder / "original"), str(folder / "text.txt")]
    config = json.loads((folder / "original" / "config.json").read_text())
    head_dim, length = config["hidden_size"] // config["num_attention_heads"], min(1024, config["hidden_size"])
    settings = ["samples=16", "stored_samples=4", f"sequence_length={length}", "overwrite=true"]
    seconds = {}
    for processes in (1, size):
        target = str(folder / f"statistics-{processes}.safetensors")
        command = [sys.executable, str(TOOLS / "calibrate.py"), *words, target, *settings]
        started = time.monotonic()
        with _Started(command, processes, folder / f"calibrate-{processes}") as world:
            for process in world.all:
                if process.wait(max(0.0, timeout - (time.monotonic() - started))) != 0:
                    raise JobFailed(f"calibrate.py ended with {process.returncode}: {_last(world.text(0))}")
            rates = re.findall(r"([\d,.]+) tokens/s", world.text(0))
        seconds[processes] = {"seconds": time.monotonic() - started, "rank_0_rate": rates[-1] if rates else None}
    command = [
        sys.executable, str(TOOLS / "convert_mha_to_mla.py"), words[0], str(folder / "mla"),
        f"statistics={folder / f'statistics-{size}.safetensors'}", f"partial_rope.qk_rope_head_dim={head_dim // 8}",
        f"low_rank.d_kv={head_dim // 2}", "overwrite=true",
    ]  # fmt: skip
    started = time.monotonic()
    with _Started(command, 1, folder / "convert") as world:
        if world.all[0].wait(timeout) != 0:
            raise JobFailed(f"convert_mha_to_mla.py ended with {world.all[0].returncode}: {_last(world.text(0))}")
    error = _largest_difference(*(folder / f"statistics-{processes}.safetensors" for processes in (1, size)))
    return {"calibrate": seconds, "error": error, "convert_seconds": time.monotonic() - started}


class _Started:
    """Processes of one command, ended at the end of the block; what they wrote is in files named `log`.RANK."""

    def __init__(self, command: Sequence[str], size: int, log: Path) -> None:
        self.files = [log.with_name(f"{log.name}.{rank}") for rank in range(size)]
        self.streams = [file.open("w") for file in self.files]
        self.all = start_processes(command, size, self.streams)

    def __enter__(self) -> _Started:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for process, stream in zip(self.all, self.streams, strict=True):
            # Its own session: also what it started itself.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stream.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise JobFailed(f"no end after {error.timeout:.0f} s: {_last(self.text(0))}") from None

    def text(self, rank: int) -> str:
        return self.files[rank].read_text(errors="replace")

    def check(self) -> None:
        for rank, process in enumerate(self.all):
            if process.poll() is not None:
                raise JobFailed(f"rank {rank} ended with {process.returncode} too early: {_last(self.text(rank))}")


def _words(folder: Path, save: Path, size: int) -> list[str]:
    """Those of tools/finetune.py, for a run that lasts until it is ended."""
    (folder / "settings.yaml").write_text("")
    return [
        str(folder / "settings.yaml"), f"load={folder / 'megatron'}", f"save={save}", f"data.train={folder / 'text'}",
        "data.sequence_length=64", "micro_batch_size=1", f"global_batch_size={2 * size}", "steps=1000000",
        f"save_interval={SAVE_INTERVAL}", "keep_last=2", "optimizer.warmup_steps=1", "optimizer.decay_steps=1",
        f"parallel.timeout_minutes={NOTICE_MINUTES}",
    ]  # fmt: skip


def _wait(condition: Callable[[], bool], limit: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + limit
    while not condition():
        check()
        if time.monotonic() > end:
            raise JobFailed(f"did not do its first steps in {limit:.0f} s")
        time.sleep(0.05)


def _steps(save: Path) -> int:
    log = save / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def _check_log(save: Path, steps: int) -> None:
    found = [json.loads(line)["step"] for line in (save / "log.jsonl").read_text().splitlines()]
    if found != list(range(1, steps + 1)) or read_latest(save) != steps:
        raise JobFailed(f"the log has steps {found[:1]} to {found[-1:]}, {len(found)} of {steps}")


def _child_of_rank(parent: int, rank: int) -> int:
    """The process of this rank that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) != parent:
                continue
            if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue  # it has ended meanwhile
    raise JobFailed(f"torchrun has no process of rank {rank}")


def _largest_difference(one: Path, other: Path) -> float:
    """Over all tensors, the largest difference relative to the tensor's largest number."""
    largest = 0.0
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():  # noqa: SIM118 (not a dict)
            a, b = first.get_tensor(name).double(), second.get_tensor(name).double()
            largest = max(largest, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return largest


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "no output"
