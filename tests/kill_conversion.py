"""End conversions at random moments, start them again, and compare what comes out with what an unbroken run wrote.

    python -m tests.kill_conversion [kills=20] [seed=N] [folder=DIR]

All routes from one format to another take turns. Each run is ended by SIGINT or SIGKILL: most at a random part of its
work, some while it starts or while it gives the finished folder its name; then the same command is given again, and
ended again or left to end by itself. After each, whatever has the target's name must be complete, byte for byte, and at
the end nothing else may be left. Exit code 1 and a line where anything is not so.
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
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mha2mla_megatron.checkpoint.resume import JOURNAL, partial_root
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.settings import load_settings
from tests.conftest import PROSE, make_llama, make_tokenizer, run_tool
from tests.forks import exit_codes, fork
from tests.nanotron_layout import write_nanotron
from tests.project_layout import write_project_model

LATENTS = ("partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=48")
BUDGET = ("statistics={statistics}", "cache_budget=0.5", "allocation.tokens=128")
HEAL = ("heal.steps=4", "heal.batch_tokens=64", "heal.sequence_length=32")
SHARDS = "max_shard_size=300KB"
MEGATRON = "ckpt_format=torch_dist"


@dataclass(frozen=True)
class Route:
    """A conversion; in `words`, {name} stands for the path of that one of the `Inputs`."""

    tool: str
    source: str
    words: tuple[str, ...] = ()


ROUTES = {
    "mha_to_mla": Route("convert_mha_to_mla", "original", (*LATENTS, SHARDS)),
    "mha_to_mla_megatron": Route("convert_mha_to_mla", "original", (*LATENTS, MEGATRON)),
    "budget": Route("convert_mha_to_mla", "original", (*BUDGET, SHARDS)),
    "healed": Route("convert_mha_to_mla", "original", (*LATENTS, "statistics={statistics}", *HEAL, SHARDS)),
    "budget_healed_megatron": Route("convert_mha_to_mla", "original", (*BUDGET, *HEAL, MEGATRON)),
    "hf_to_megatron": Route("convert_hf_to_megatron", "latents"),
    "megatron_to_hf": Route("convert_megatron_to_hf", "megatron", (SHARDS,)),
    "import_project": Route("import_mha2mla", "project", (SHARDS,)),
    "import_nanotron": Route("import_mha2mla", "nanotron", ("tokenizer={original}", SHARDS)),
    "deepseek": Route("export_deepseek", "latents", (SHARDS,)),
}


class Inputs(dict[str, Path]):
    """What the routes read, under `folder`: each is made where it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = target = self.folder / name
        match name:
            case "original":
                shape = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256}
                make_tokenizer(make_llama(target, num_hidden_layers=6, **shape))
            case "text":
                target.write_text("\n".join(PROSE * 4))
            case "statistics":
                words = ("samples=4", "sequence_length=32", "stored_samples=4")
                run_tool("calibrate", self["original"], self["text"], target, *words)
            case "latents":
                run_tool("convert_mha_to_mla", self["original"], target, *LATENTS)
            case "megatron":
                run_tool("convert_hf_to_megatron", self["latents"], target)
            case "project":
                rope = {"n_gqa_group": 2, "partial_rope_version": 2, "uniform_start_point": 0, "uniform_step": 4}
                keys = {"RoPE": rope, "SVD": {"method": 7, "low_rank": 24}}
                write_project_model(self["latents"], self["original"], target, "first", "joint", keys)
            case "nanotron":
                write_nanotron(self["original"], target, tp=2, pp=2, interleaved=True)
            case _:
                raise KeyError(name)
        return target

    def command(self, route: str, target: Path) -> list[Any]:
        """The tool of one of the ROUTES and its words."""
        taken = ROUTES[route]
        return [taken.tool, self[taken.source], target, *(word.format_map(self) for word in taken.words)]


@dataclass(frozen=True)
class Unbroken:
    """A conversion that nothing ended: what it wrote, and the seconds that each part of its work took.

    The first part ends with the journal's first line, the last one with the process.
    """

    contents: dict[str, bytes]
    seconds: list[float]


AT_THE_START, AT_THE_END = 0.1, 0.15
"""Of the runs, those that are ended in their first and in their last part."""

POLL = 0.0005
"""Seconds between two looks at a journal."""


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
    chance, inputs, unbroken = random.Random(seed), Inputs(folder / "inputs"), dict[str, Unbroken]()
    inputs.folder.mkdir(parents=True)
    turns, counts = chance.sample(list(ROUTES), len(ROUTES)), {"SIGINT": 0, "SIGKILL": 0, "taken up": 0}

    def complete(route: str) -> None:
        target = folder / "killed" / route / "model"
        assert exit_codes([convert(*inputs.command(route, target))]) == [0], f"{route}: started again, it failed"
        assert contents(target) == unbroken[route].contents, f"{target} differs from the unbroken run's"
        assert [path.name for path in target.parent.iterdir()] == ["model"], f"{target}: something else was left"
        shutil.rmtree(target.parent)

    for kill in range(kills):
        route, number = turns[kill % len(turns)], chance.choice((signal.SIGINT, signal.SIGKILL))
        place, share, again = chance.random(), chance.random(), chance.random() < 0.5
        if route not in unbroken:
            unbroken[route] = run_unbroken(inputs, route, folder / "unbroken" / route)
        target, seconds = folder / "killed" / route / "model", unbroken[route].seconds
        begun = min(lines(target), len(seconds) - 1)  # an unbroken run may end before its last line is seen
        part = 0 if place < AT_THE_START else len(seconds) - 1
        if AT_THE_START <= place < 1 - AT_THE_END:
            part = begun + int((place - AT_THE_START) / (1 - AT_THE_START - AT_THE_END) * (len(seconds) - begun))
        process = convert(*inputs.command(route, target))
        while lines(target) < part and process.is_alive():
            time.sleep(POLL)
        time.sleep(share * max(seconds[part], 0.01))
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process.ident or 0, number)
        (code,) = exit_codes([process])
        left = sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else []
        print(
            f"kill {kill + 1}/{kills}: {route}, {number.name} in part {part} of {len(seconds)}, from {begun}: {code}, "
            f"left: {left}", flush=True,
        )  # fmt: skip
        assert code in (0, 130, -signal.SIGKILL), f"{route} ended with {code}"
        assert code != 130 or len(left) < 2, f"{target} is complete, but the interrupted command has said otherwise"
        counts[number.name] += code != 0
        if target.exists():
            assert contents(target) == unbroken[route].contents, f"{target} is there, but not as the unbroken run's"
            shutil.rmtree(target.parent)
            continue
        counts["taken up"] += lines(target) > 1
        if again:  # the others are ended again
            complete(route)
    for route in turns:
        if (folder / "killed" / route).exists():
            complete(route)
    return counts


def run_unbroken(inputs: Inputs, route: str, target: Path) -> Unbroken:
    """Convert without an interrupt, and watch the parts being done."""
    process, ends = convert(*inputs.command(route, target)), [time.monotonic()]
    while process.is_alive():
        ends += [time.monotonic()] * (lines(target) + 1 - len(ends))  # none where it is gone again
        time.sleep(POLL)
    ends.append(time.monotonic())
    assert exit_codes([process]) == [0], f"{route} failed"
    return Unbroken(contents(target), [end - start for start, end in pairwise(ends)])


def convert(tool: str, *words: object) -> BaseProcess:
    """Start a converter as a process of its own, which can be ended from now on."""
    ready, started = multiprocessing.Pipe(duplex=False)
    process = fork(_convert, started, tool, *words)
    ready.recv()
    return process


def _convert(started: Connection, tool: str, *words: object) -> None:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        started.send(True)
        done = run_tool(tool, *words, check=False)
        if (code := done.returncode) not in (0, 130):
            print(done.stdout, done.stderr, file=sys.stderr)
    except KeyboardInterrupt:  # outside of the command, which says so itself
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def lines(target: Path) -> int:
    """How many there are in the journal of the work for `target`; 0 before and after there is one."""
    try:
        return (partial_root(target) / JOURNAL).read_bytes().count(b"\n")
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
