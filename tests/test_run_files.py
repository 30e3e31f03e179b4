"""The runner of the tests: what it makes of files that fail, crash and hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.run_files import Runner

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
TESTS = {
    "good": "pass",
    "bad": "assert 1 + 1 == 3",
    "once": f"import pathlib; file = pathlib.Path(__file__ + '.seen')\n    if not file.exists(): file.touch(); {CRASH}",
    "crashing": CRASH,
    "hanging": "import subprocess; subprocess.Popen(['sleep', '1000.25']).wait()",
}


def make(folder: Path, *names: str) -> list[Path]:
    files = [folder / f"test_{name}.py" for name in names]
    for file, name in zip(files, names, strict=True):
        file.write_text(f"def test_it():\n    {TESTS[name]}\n")
    return files


def test_crashes_and_hangs_are_run_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make(tmp_path, *TESTS)
    assert Runner(["-q", "-p", "no:cacheprovider"], limit=8).run(files) == 1
    lines = capsys.readouterr().out.splitlines()
    first = [line for line in lines[: lines.index("")] if re.match(r" +\d+ s  ", line)]
    ended = {name: [line.split(": ", 1)[1] for line in first if f"test_{name}.py" in line] for name in TESTS}
    assert ended["good"] == [ended["good"][0]] and ended["good"][0].startswith("1 passed")
    assert len(ended["bad"]) == 1 and ended["bad"][0].startswith("1 failed")
    assert ended["once"][0] == "ended by SIGSEGV; once more" and ended["once"][1].startswith("1 passed")
    assert ended["crashing"] == ["ended by SIGSEGV; once more", "ended by SIGSEGV"]
    assert ended["hanging"] == ["ended by SIGKILL; once more", "ended by SIGKILL"]
    assert "assert (1 + 1) == 3" in "\n".join(lines) and "Fatal Python error: Segmentation fault" in lines
    assert re.match(r"5 files in \d+ s: 3 failed, 3 run once more", lines[-4])
    failed = [re.match(r"FAILED +\d+ s  .*test_(.*)\.py: ", line) for line in lines[-3:]]
    assert [found and found[1] for found in failed] == ["bad", "crashing", "hanging"]
    assert not sleeping()


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    (file,) = make(tmp_path, "hanging")
    script = f"from pathlib import Path; from tests.run_files import Runner; Runner([]).run([Path({str(file)!r})])"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
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
            if folder.name.isdecimal() and b"sleep\x001000.25" in (folder / "cmdline").read_bytes():
                return os.stat(folder).st_uid == os.getuid()
        except OSError:  # it has ended meanwhile
            continue
    return False
