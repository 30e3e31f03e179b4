"""Progress of long work on stderr: a line rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time


class Progress:
    """Counts work done and says the rate and the time left; under torchrun on rank 0 only.

    total: amount of work (layers, bytes, tokens), infinite where it is not known; unit: its name; scale: divides what
    is shown (1e9 for "GB").
    """

    def __init__(self, what: str, total: float, unit: str, scale: float = 1.0) -> None:
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.done = self.skipped = 0.0
        self.started = time.monotonic()
        self.shows = os.environ.get("RANK", "0") == "0"
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else 5.0
        self.shown = self.started
        self.width = 0
        """Columns of a terminal that the line before took, and that this one has to cover."""

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= self.interval and self.done < self.total:
            self.shown = now
            self._show(now, end="\r" if self.terminal else "\n", over=False)

    def skip(self, amount: float) -> None:
        """Count work that an earlier run did; the rate leaves it out."""
        self.skipped += amount
        self.done += amount

    def close(self) -> None:
        """Show the final count and rate."""
        self._show(time.monotonic(), end="\n", over=self.done >= self.total or math.isinf(self.total))

    def _show(self, now: float, end: str, over: bool) -> None:
        if not self.shows:
            return
        seconds = max(now - self.started, 1e-9)
        rate = (self.done - self.skipped) / seconds
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        of = "" if math.isinf(self.total) else f"/{self.total / self.scale:.4g}"
        eta = f" in {format_seconds(seconds)}" if over else f", {format_seconds(left)} left" if of else ""
        line = f"{self.what}: {self.done / self.scale:.4g}{of} {self.unit}, {rate / self.scale:.3g} {self.unit}/s{eta}"
        print(f"{line:<{self.width}}", end=end, file=sys.stderr, flush=True)
        self.width = len(line) if self.terminal else 0


def format_seconds(seconds: float) -> str:
    """73 -> '1m13s'."""
    if seconds == float("inf"):
        return "?"
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m" if whole >= 3600 else f"{whole // 60}m{whole % 60:02d}s"
