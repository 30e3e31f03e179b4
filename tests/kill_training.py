"""Kill a training at random moments, resume it each time, and compare what it ends with with a run that nobody killed.

    python -m tests.kill_training [kills=10] [seed=N] [save_async=true] [folder=DIR]

Each kill is a SIGKILL to tools/finetune.py. Most fall within a quarter of a second of one of its first steps, where
with a save every second step about half of them interrupt one; some fall while it starts and loads. After each, every
folder that is called a saved step must pass tools/inspect_checkpoint.py. At the end the weights, the optimizer's
moments and the log of losses must equal the unbroken run's bit for bit. Exit code 1 and a line where anything does not.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mha2mla_megatron.checkpoint.megatron import read_latest
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.settings import load_settings
from tests.conftest import ROOT, run_tool
from tests.finetune_cases import checkpoint_tensors, finetune, log_text, make_workspace, run_words

STEPS_PER_KILL = 8
STARTUP_SHARE = 0.2
"""Of the kills, those that come before the first step."""


@dataclass(frozen=True)
class KillSettings:
    """Settings of this script."""

    kills: int = 10
    """How many times the run is killed."""

    seed: int | None = None
    """Of the moments. None: another one each time; it is printed."""

    save_async: bool = False
    """Whether the killed run writes its checkpoints while it trains on; the unbroken run never does."""

    folder: str | None = None
    """Where the runs go, kept at the end. None: a temporary folder."""


def kill_training(folder: Path, kills: int, seed: int, save_async: bool) -> dict[str, int]:
    """Run it all under `folder`; returns how many kills interrupted a save or deletion, and how many broke a step.

    Raises AssertionError where a saved step is broken or the ends differ.
    """
    chance = random.Random(seed)
    steps = STEPS_PER_KILL * kills
    schedule = [f"steps={steps}", "save_interval=2", "keep_last=2", "optimizer.warmup_steps=2"]
    workspace = make_workspace(folder / "workspace")
    whole = finetune(workspace, "mla", folder / "unbroken", *schedule)
    broken = folder / "killed"
    command = [
        sys.executable,
        str(ROOT / "tools" / "finetune.py"),
        *run_words(workspace, "mla", broken, *schedule, f"save_async={save_async}"),
    ]
    interrupted = 0
    for kill in range(kills):
        starting = chance.random() < STARTUP_SHARE
        after, delay = (0, chance.uniform(0.0, 6.0)) if starting else (chance.randint(1, 6), chance.uniform(0.0, 0.25))
        ended = run_and_kill(command, after, delay)
        latest = read_latest(broken) if broken.is_dir() else None
        hidden = [path.name for path in broken.glob(".*")] if broken.is_dir() else []
        interrupted += bool(hidden)
        moment = f"{delay:.2f} s after {f'its step number {after}' if after else 'the start'}"
        print(f"kill {kill + 1}/{kills}, {moment}: latest {latest}, left: {', '.join(hidden) or 'nothing'}", flush=True)
        assert not ended, "the run ended before it could be killed"
        for step in saved_steps(broken) if broken.is_dir() else []:
            done = run_tool("inspect_checkpoint", broken, f"iteration={step}", check=False)
            assert (broken / "hf" / "config.json").is_file() and done.returncode == 0, f"step {step}: {done.stderr}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compare(whole, broken, steps)
    return {"kills": kills, "interrupted": interrupted}


def run_and_kill(command: list[str], after: int, delay: float) -> bool:
    """Start the run, kill it `delay` seconds after it did so many steps; whether it had ended by itself."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    done = 0
    while done < after and (line := process.stdout.readline()):
        done += line.startswith("step ")
    time.sleep(delay)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return ended


def compare(whole: Path, broken: Path, steps: int) -> None:
    assert log_text(broken) == log_text(whole), "the losses differ"
    expected, found = checkpoint_tensors(whole, steps), checkpoint_tensors(broken, steps)
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"
    assert saved_steps(broken) == saved_steps(whole) == [steps - 2, steps]
    assert not list(broken.glob(".*")), "leftovers were not removed"


def main(argv: list[str]) -> None:
    _, words, file = split_words(argv, "python -m tests.kill_training [key=value ...]", 0, 0, schema=KillSettings)
    settings = load_settings(KillSettings, words, file)
    seed = random.SystemRandom().randrange(1 << 32) if settings.seed is None else settings.seed
    print(f"seed={seed}", flush=True)
    folder = Path(tempfile.mkdtemp() if settings.folder is None else settings.folder)
    started = time.monotonic()
    try:
        result = kill_training(folder, settings.kills, seed, settings.save_async)
    except (AssertionError, UserError) as error:
        print(f"FAILED with seed={seed}, see {folder}: {error}", file=sys.stderr)
        sys.exit(1)
    print(
        f"{result['kills']} kills, {result['interrupted']} of them in a save or deletion: no broken step, and the same "
        f"bits at the end ({time.monotonic() - started:.0f} s)"
    )
    if settings.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
