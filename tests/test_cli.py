"""The words of a command line, what --help says, and who says an error."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mha2mla_megatron import errors
from mha2mla_megatron.cli import describe_settings, split_words
from mha2mla_megatron.errors import FoundAlone, UserError
from tests.conftest import ROOT, refused, run_tool

USAGE = "tool.py IN OUT [key=value ...]"


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    """How fast."""

    name: str | None = None


@dataclass(frozen=True)
class Base:
    steps: int = 3
    """How many."""


@dataclass(frozen=True)
class Outer(Base):
    inner: Inner = field(default_factory=lambda: Inner(rate=0.25))

    flags: list[int] = field(default_factory=lambda: [1, 2])
    """Several words, so many of them that the line which describes this field is longer than
    a line of the help may be, and must be folded."""

    loud: bool = True
    undocumented: str = "word"


def test_words_are_told_apart() -> None:
    words = ["a.txt", "window=3", "./x=1.txt", "inner.rate=1e-3", "dir/y=2", "config=run.yaml", "name=a=b", "empty="]
    positionals, overrides, file = split_words(words, USAGE, 1)
    assert positionals == ["a.txt", "./x=1.txt", "dir/y=2"]
    assert overrides == ["window=3", "inner.rate=1e-3", "name=a=b", "empty="]
    assert file == Path("run.yaml")
    assert split_words([], USAGE, 0) == ([], [], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "2 positional word(s) needed, 1 given; usage: tool.py IN OUT"),
        (["a", "b", "c"], "2 positional word(s) needed, 3 given"),
        (["a", "b", "--window=3"], "'--window=3': there are no dashed options"),
        (["a", ""], "an empty word among the arguments; usage: tool.py IN OUT"),
        (["a", "b", "config="], "config=FILE.yaml"),
        (["a", "b", "config=1.yaml", "config=2.yaml"], "once"),
    ],
)
def test_refused_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        split_words(words, USAGE, 2, 2)
    assert message in str(error.value)


def test_counts_in_the_message() -> None:
    with pytest.raises(UserError, match=r"at least 2 positional"):
        split_words([], USAGE, 2)
    with pytest.raises(UserError, match=r"1 to 2 positional"):
        split_words([], USAGE, 1, 2)


def test_settings_are_described() -> None:
    lines = describe_settings(Outer).splitlines()
    assert [line for line in lines if not line.startswith("   ")] == [
        "  steps=3", "  inner.rate=0.25", "  inner.name=null", "  flags=[1, 2]", "  loud=true", "  undocumented=word"
    ]  # fmt: skip
    assert lines[:4] == ["  steps=3", "      How many.", "  inner.rate=0.25", "      How fast."]
    folded = lines[lines.index("  flags=[1, 2]") + 1 : lines.index("  loud=true")]
    assert len(folded) == 2 and max(map(len, folded)) <= 120 and all(line.startswith("      ") for line in folded)
    assert " ".join(line.strip() for line in folded).endswith("a line of the help may be, and must be folded.")


@pytest.mark.parametrize(
    ("tool", "key"),
    [
        ("preprocess_data", "overwrite=false"),
        ("evaluate_perplexity", "window=1024"),
        ("evaluate_choices", "batch_tokens=4096"),
        ("calibrate", "samples=16"),
        ("merge_statistics", "overwrite=false"),
        ("sweep", "keep_models=false"),
        ("plot_run", "overwrite=false"),
        ("cache_teacher", "top_k=32"),
        ("convert_mha_to_mla", "allocation.rank_multiple=8"),
    ],
)
def test_help(tool: str, key: str) -> None:
    for flag in ("-h", "--help"):
        done = run_tool(tool, "a", flag)
        assert done.stdout.startswith(f"usage: {tool}.py ") and f"\n  {key}\n" in done.stdout


def test_help_of_which_only_the_beginning_is_read() -> None:
    """As in `tool.py --help | head -1`, where nobody reads the rest."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "quality_table.py", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


@pytest.mark.parametrize("tool", ["preprocess_data", "evaluate_perplexity", "evaluate_choices"])
def test_wrong_words_show_the_usage(tool: str) -> None:
    done = run_tool(tool, "only_one", check=False)
    assert done.returncode == 2 and f"usage: {tool}.py" in done.stderr
    assert "at least 2 positional word(s) needed, 1 given" in refused(tool, "only_one")
    assert "unknown key 'wnidow'" in refused(tool, "a", "b", "wnidow=3")
    assert "missing.yaml: no such file" in refused(tool, "a", "b", f"config={ROOT}/missing.yaml")
    assert f"{ROOT}: a folder, not a file" in refused(tool, "a", "b", f"config={ROOT}")


def test_who_says_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several processes the first one what all meet, and each what it alone does."""

    def said(error: Exception, rank: str) -> str:
        def main(argv: list[str]) -> None:
            raise error

        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            errors.run_tool(main, [])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert [said(UserError("bad"), rank) for rank in "01"] == ["error: bad\n", ""]
    assert [said(FoundAlone("bad"), rank) for rank in "01"] == ["error: bad\n"] * 2
