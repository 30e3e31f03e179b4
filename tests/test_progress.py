"""The line that long work shows: rate and time left, as a terminal and as a file have it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mha2mla_megatron import progress
from mha2mla_megatron.progress import Progress, format_seconds
from tests.conftest import ROOT, make_llama


class Screen(io.StringIO):
    """What is written to stderr, and what a terminal would show of it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        """A carriage return goes to the start of a line; what is written from there covers what stood there."""
        shown = []
        for line in self.getvalue().removesuffix("\n").split("\n"):
            text = ""
            for part in line.split("\r"):
                text = part + text[len(part) :]
            shown.append(text)
        return shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the progress is told, in an item that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def watch(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Screen:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("RANK", raising=False)
    return screen


def test_on_a_terminal_one_line_is_rewritten(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=True)
    shown = Progress("HF -> Megatron", 8e9, "GB", scale=1e9)
    clock[0] += 0.1
    shown.advance(1e8)
    assert screen.getvalue() == ""  # five times a second at most
    clock[0] += 1.9
    shown.advance(9e8)
    # 1 GB in 2 s, so 7 GB more in 14 s.
    assert screen.getvalue().endswith("\r") and "\n" not in screen.getvalue()
    assert screen.getvalue().rstrip("\r") == "HF -> Megatron: 1/8 GB, 0.5 GB/s, 14.0s left"
    clock[0] += 2
    shown.advance(5e9)
    clock[0] += 1
    shown.advance(2e9)  # the end is shown by `close`
    shown.close()
    assert [line.rstrip() for line in screen.lines()] == ["HF -> Megatron: 8/8 GB, 1.6 GB/s in 5.0s"]


def test_a_shorter_line_covers_a_longer_one(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=True)
    shown = Progress("import", 2e9, "GB", scale=1e9)
    clock[0] += 7.7
    shown.advance(1.234e6)
    first = screen.lines()[-1]
    assert first == "import: 0.001234/2 GB, 0.00016 GB/s, 3h27m left"
    clock[0] += 0.3
    shown.advance(1e9 - 1.234e6)
    second = screen.lines()[-1]
    assert second.rstrip() == "import: 1/2 GB, 0.125 GB/s, 8.0s left" and len(second) == len(first)


def test_in_a_file_plain_lines_stand_five_seconds_apart(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=False)
    shown = Progress("import", 100, "tensors")
    for _ in range(12):
        clock[0] += 1
        shown.advance(2)
    assert screen.getvalue() == (
        "import: 10/100 tensors, 2 tensors/s, 45.0s left\nimport: 20/100 tensors, 2 tensors/s, 40.0s left\n"
    )
    shown.close()  # ended early, as by an error
    assert screen.getvalue().endswith("\nimport: 24/100 tensors, 2 tensors/s, 38.0s left\n")


def test_work_of_an_earlier_run_is_not_in_the_rate(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=False)
    shown = Progress("import", 100, "tensors")
    shown.skip(80)
    clock[0] += 10
    shown.advance(5)
    assert screen.getvalue() == "import: 85/100 tensors, 0.5 tensors/s, 30.0s left\n"


def test_unknown_ends_and_no_work_yet(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=False)
    shown = Progress("tokens", float("inf"), "tokens")
    clock[0] += 5
    shown.advance(50)
    assert screen.getvalue() == "tokens: 50 tokens, 10 tokens/s\n"
    Progress("import", 3, "tensors").close()
    assert screen.getvalue().endswith("import: 0/3 tensors, 0 tensors/s, ? left\n")
    assert [format_seconds(s) for s in (9.96, 73, 3600, 86399)] == ["10.0s", "1m13s", "1h00m", "23h59m"]


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    screen = watch(monkeypatch, terminal=False)
    monkeypatch.setenv("RANK", "1")
    shown = Progress("import", 2, "tensors")
    clock[0] += 6
    shown.advance(1)
    shown.close()
    assert screen.getvalue() == ""


def test_a_converter_in_a_pipe_and_on_a_terminal(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "llama")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6
    command = [sys.executable, str(ROOT / "tools" / "convert_hf_to_megatron.py"), str(source)]
    line = r"HF -> Megatron: (\S+)/\1 MB, \S+ MB/s in \d+\.\ds *"
    in_a_pipe = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True).stderr
    found = re.fullmatch(line + "\n", in_a_pipe)
    assert found is not None and float(found[1]) == pytest.approx(size, rel=0.1), in_a_pipe
    ours, theirs = pty.openpty()
    subprocess.run([*command, str(tmp_path / "b")], stderr=theirs, check=True)
    on_a_terminal = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    # Whatever was rewritten ends with the same line; a terminal's line end is of two characters.
    assert on_a_terminal.count("\n") == 1
    assert re.fullmatch(line, on_a_terminal.removesuffix("\r\n").rpartition("\r")[2]), on_a_terminal
