"""End conversions at random moments, start them again, and compare what comes out with what an unbroken run wrote.

    python -m tests.kill_conversion [kills=20] [seed=N] [folder=DIR]

The three converters take turns. Each run is ended by SIGINT or SIGKILL: most within a few milliseconds of a random part
of its work, some while it starts; then the same command is given again, and ended again or left to end by itself. After
each, whatever has the target's name must be complete, byte for byte, and at the end nothing else may be left. Exit code
1 and a line where anything is not so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.settings import load_settings
from tests.conftest import make_llama, run_tool
from tests.forks import exit_codes, fork

WORDS = {
    "convert_mha_to_mla": [
        "partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=48", "max_shard_size=300KB"
    ],
    "convert_hf_to_megatron": [],
    "convert_megatron_to_hf": ["max_shard_size=300KB"],
}  # fmt: skip

PARTS = 45
"""About as many parts as a conversion has; after the last one come the small files and the target's name."""

STARTUP_SHARE = 0.1
"""Of the runs, those that are ended before the first part."""


@dataclass(frozen=True)
class KillSettings:
    """Settings of this script."""

    kills: int = 20
    """How many runs are ended."""

    seed: int | None = None
    """Of the moments and signals. None: another one each time; it is printed."""

    folder: str | None = None
    """Where the models go, kept at the end. None: a temporary folder."""


def kill_conversions(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Do it all under `folder`; returns how many runs were ended by each signal, and how many went on from a part.

    Raises AssertionError where a target is not what it should be.
    """
    chance = random.Random(seed)
    source = make_llama(folder / "original", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    sources: dict[str, Path] = {}
    expected: dict[str, dict[str, bytes]] = {}
    for tool in WORDS:
        sources[tool], target = source, folder / "unbroken" / tool
        assert exit_codes([convert(tool, source, target)]) == [0]
        source, expected[tool] = target, contents(target)
    counts = {"SIGINT": 0, "SIGKILL": 0, "taken up": 0}
    for kill in range(kills):
        tool = list(WORDS)[kill % len(WORDS)]
        target, number = folder / "killed" / tool / "model", chance.choice((signal.SIGINT, signal.SIGKILL))
        journal = target.with_name(f".{target.name}.partial") / "journal.jsonl"
        parts, delay = (0 if chance.random() < STARTUP_SHARE else chance.randint(1, PARTS)), chance.uniform(0.0, 0.01)
        process = convert(tool, sources[tool], target)
        while parts and lines(journal) < parts and process.is_alive():
            time.sleep(0.0005)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process.ident or 0, number)
        (code,) = exit_codes([process])
        left = sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else []
        print(f"kill {kill + 1}/{kills}: {tool}, {number.name} after part {parts}: {code}, left: {left}", flush=True)
        assert code in (0, 130, -signal.SIGKILL), f"{tool} ended with {code}"
        counts[number.name] += code != 0
        if target.exists():
            assert contents(target) == expected[tool], f"{target} is there, but not as the unbroken run's"
            shutil.rmtree(target.parent)
            continue
        counts["taken up"] += lines(journal) > 1
        if chance.random() < 0.5:  # the others are ended again
            assert exit_codes([convert(tool, sources[tool], target)]) == [0]
            assert contents(target) == expected[tool], f"{target} differs from the unbroken run's"
            assert [path.name for path in target.parent.iterdir()] == ["model"], "something was left"
            shutil.rmtree(target.parent)
    return counts


def convert(tool: str, source: Path, target: Path, *more: str) -> BaseProcess:
    """Start a converter as a process of its own, which can be ended from now on."""
    ready, started = multiprocessing.Pipe(duplex=False)
    process = fork(_convert, started, tool, source, target, *more)
    ready.recv()
    return process


def _convert(started: Connection, tool: str, source: Path, target: Path, *more: str) -> None:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        started.send(True)
        done = run_tool(tool, source, target, *WORDS[tool], *more, check=False)
        if (code := done.returncode) not in (0, 130):
            print(done.stdout, done.stderr, file=sys.stderr)
    except KeyboardInterrupt:  # outside of the command, which says so itself
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def lines(journal: Path) -> int:
    """How many there are; 0 before there is a file."""
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main(argv: list[str]) -> None:
    _, words, file = split_words(argv, "python -m tests.kill_conversion [key=value ...]", 0, 0, schema=KillSettings)
    settings = load_settings(KillSettings, words, file)
    seed = random.SystemRandom().randrange(1 << 32) if settings.seed is None else settings.seed
    print(f"seed={seed}", flush=True)
    folder = Path(tempfile.mkdtemp() if settings.folder is None else settings.folder)
    try:
        counts = kill_conversions(folder, settings.kills, seed)
    except AssertionError as error:
        print(f"FAILED with seed={seed}, see {folder}: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{counts}: no broken target, and the same bytes as without a signal")
    if settings.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
