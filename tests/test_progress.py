"""The line that long work shows: rate and time left, as a terminal and as a file have it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mha2mla_megatron import progress
from mha2mla_megatron.bottom_line import BottomLine
from mha2mla_megatron.progress import Progress, format_seconds
from tests.conftest import ROOT, make_llama
from tests.finetune_cases import make_workspace, run_words


class Screen(io.StringIO):
    """What is written to stderr, and what a terminal would show of it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        return visible(self.getvalue())


def visible(written: str) -> list[str]:
    """The lines that a terminal is left with: a carriage return goes to the start of a line, and what is written from
    there covers what stood there."""
    shown = []
    for line in written.removesuffix("\n").split("\n"):
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


def watch_both(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 40 columns that is stdout and stderr."""
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    return screen


def test_other_lines_stand_above_the_bottom_line(monkeypatch: pytest.MonkeyPatch) -> None:
    both = watch_both(monkeypatch)
    line = BottomLine()
    line.show("step 1, a long one")
    line.show("step 2")
    assert [found.rstrip() for found in both.lines()] == ["step 2"]
    print("saved")
    print("warning: x", file=sys.stderr)
    line.show("step 3")
    assert [found.rstrip() for found in both.lines()] == ["saved", "warning: x", "step 3"]
    print("not yet", end="")
    line.show("step 4")  # would cover it
    print(" done")
    line.show("step 5" + "." * 100)
    assert [found.rstrip() for found in both.lines()[2:]] == ["not yet done", "step 5" + "." * 33]
    line.close()
    assert sys.stdout is both and sys.stderr is both
    print("end")
    assert [found.rstrip() for found in both.lines()] == ["saved", "warning: x", "not yet done", "end"]


def test_errors_that_go_to_a_file_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    both, file = watch_both(monkeypatch), Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", file)
    line = BottomLine()
    line.show("step 1")
    print("warning", file=sys.stderr)
    assert file.getvalue() == "warning\n" and both.lines() == ["step 1"]
    line.close()


def test_a_training_on_a_terminal(tmp_path: Path) -> None:
    """Validations, a warning and saves are whole lines, above a bar; the last step's line stays."""
    workspace = make_workspace(tmp_path)
    words = run_words(
        workspace, "mla", tmp_path / "run", "steps=6", "save_interval=2", f"validation.data={workspace / 'text'}",
        "validation.interval=2", "validation.samples=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=1",
        "optimizer.spike_factor=1", "optimizer.spike_window=1", "keep_last=1",
    )  # fmt: skip
    ours, theirs = pty.openpty()
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                written.append(data)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, str(ROOT / "tools" / "finetune.py"), *words]
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, check=True, env={**os.environ, "COLUMNS": "70"})
    os.close(theirs)
    reader.join()
    os.close(ours)
    text = b"".join(written).decode().replace("\r\n", "\n")
    bars = re.findall(r"\r(step (\d)/6 \[(#*)-*\] \S+ left \| loss [^\r\n]*)", text)
    assert bars and all(len(bar) <= 69 and len(cells) == 20 * int(step) // 6 for bar, step, cells in bars), text
    start = text.index("\rstep 1/6")  # before it, libraries say in processes of their own what is not installed
    assert "/run: from step 0 to 6" in text[:start]
    lines = [line.rstrip() for line in visible(text[start:])]
    kinds = {
        "validation": r"step \d/6 \| validation loss \d\.\d{4} \| \d+\.\ds",
        "warning": r"warning: step \d: loss .* the median .*: left out \(\d so far\)",
        "end": r"step 6/6 \| loss \d.* tokens/s \|.* left",
    }
    found = [next((kind for kind, form in kinds.items() if re.fullmatch(form, line)), line) for line in lines]
    assert found[-1] == "end", lines
    assert found.count("validation") == 3 and "warning" in found and set(found) == set(kinds), text
