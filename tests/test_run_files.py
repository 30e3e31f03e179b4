"""The runner of the tests: what it makes of files that fail, crash and hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

NAP = f"1000.{os.getpid()}"
"""Seconds, by which this process's sleepers are known."""
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
TESTS = {
    "good": "pass",
    "bad": "assert 1 + 1 == 3",
    "once": f"import pathlib; file = pathlib.Path(__file__ + '.seen')\n    if not file.exists(): file.touch(); {CRASH}",
    "crashing": CRASH,
    "hanging": f"import subprocess; subprocess.Popen(['sleep', '{NAP}']).wait()",
}


def make(folder: Path, *names: str) -> list[Path]:
    files = [folder / f"test_{name}.py" for name in names]
    for file, name in zip(files, names, strict=True):
        file.write_text(f"def test_it():\n    {TESTS[name]}\n")
    return files


def command(files: list[Path], limit: float) -> list[str]:
    script = f"""if True:
        import pathlib, sys
        from tests.run_files import Runner
        files = map(pathlib.Path, {[str(file) for file in files]})
        sys.exit(Runner(["-q", "-p", "no:cacheprovider"], {limit}).run([*files]))
    """
    return [sys.executable, "-c", script]


def run(files: list[Path], limit: float) -> tuple[int, list[str]]:
    done = subprocess.run(command(files, limit), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout.splitlines()


def test_failing_and_crashing_files(tmp_path: Path) -> None:
    names = ["good", "bad", "once", "crashing"]
    code, lines = run(make(tmp_path, *names), 120)
    first = [line for line in lines[: lines.index("")] if re.match(r" +\d+ s  ", line)]
    ended = {name: [line.split(": ", 1)[1] for line in first if f"test_{name}.py" in line] for name in names}
    assert len(ended["good"]) == 1 and ended["good"][0].startswith("1 passed")
    assert len(ended["bad"]) == 1 and ended["bad"][0].startswith("1 failed")
    assert ended["once"][0] == "ended by SIGSEGV; once more" and ended["once"][1].startswith("1 passed")
    assert ended["crashing"] == ["ended by SIGSEGV; once more", "ended by SIGSEGV"]
    assert "assert (1 + 1) == 3" in "\n".join(lines) and "Fatal Python error: Segmentation fault" in lines
    assert code == 1 and re.match(r"4 files in \d+ s: 2 failed, 2 run once more", lines[-3])
    failed = [re.match(r"FAILED +\d+ s  .*test_(.*)\.py: ", line) for line in lines[-2:]]
    assert [found and found[1] for found in failed] == ["bad", "crashing"]


def test_a_hanging_file_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code, lines = run(make(tmp_path, "hanging"), 6)
    assert lines[0].endswith("ended by SIGKILL; once more") and lines[1].endswith("ended by SIGKILL")
    assert code == 1 and "1 failed, 1 run once more" in lines[-2]
    end = time.monotonic() + 10  # a killed process is there until it has had a turn to end
    while sleeping() and time.monotonic() < end:
        time.sleep(0.1)
    assert not sleeping()


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    files = make(tmp_path, "hanging")
    process = subprocess.Popen(command(files, 120), cwd=ROOT, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not sleeping() and time.monotonic() < end:
        time.sleep(0.1)
    assert sleeping()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors and not sleeping()


def sleeping() -> bool:
    """Whether a process that a hanging test started is there."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and f"sleep\x00{NAP}".encode() in (folder / "cmdline").read_bytes():
                return os.stat(folder).st_uid == os.getuid()
        except OSError:  # it has ended meanwhile
            continue
    return False
