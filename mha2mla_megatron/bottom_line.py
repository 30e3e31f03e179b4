"""A line at the bottom of a terminal that is rewritten, while other lines are printed above it."""

from __future__ import annotations

import shutil
import sys
from typing import Any


class BottomLine:
    """On the terminal that sys.stdout is; whatever this process prints before `close` takes the line's place, and the
    next `show` puts it beneath."""

    def __init__(self) -> None:
        self.width = 0
        """Columns that the line takes now."""
        self.within_a_line = False
        """Whether something was printed whose line has not ended."""
        self.streams = sys.stdout, sys.stderr
        self.terminal = sys.stdout
        sys.stdout, sys.stderr = (_Above(stream, self) if stream.isatty() else stream for stream in self.streams)

    def show(self, text: str) -> None:
        """Replace the line, cut to the terminal's width: a line that is wrapped cannot be rewritten."""
        if self.within_a_line:
            return
        columns = shutil.get_terminal_size().columns - 1
        text = text[:columns]
        self.terminal.write("\r" + text.ljust(min(self.width, columns)))
        self.terminal.flush()
        self.width = len(text)

    def clear(self) -> None:
        if self.width:
            self.terminal.write("\r" + " " * self.width + "\r")
            self.terminal.flush()
            self.width = 0

    def close(self) -> None:
        """Take the line away, and give the streams back."""
        self.clear()
        sys.stdout, sys.stderr = self.streams


class _Above:
    """A stream to the terminal that makes room for what is written to it."""

    def __init__(self, stream: Any, line: BottomLine) -> None:
        self.stream, self.line = stream, line

    def write(self, text: str) -> int:
        if text:
            self.line.clear()
            self.line.within_a_line = not text.endswith("\n")
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
