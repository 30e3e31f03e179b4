"""Signals that end a run well."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch


class StopRequest:
    """SIGINT and SIGTERM end the run after the current step, which is saved; a later one ends it at once.

    One that comes within GRACE seconds is the same request: a launcher passes on what its processes got already.
    """

    GRACE = 5.0

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.asked: float | None = None
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: Any) -> None:
        now = time.monotonic()
        self.asked = now if self.asked is None else self.asked
        if now - self.asked > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer."""
        self.flag.fill_(self.asked is not None)
        torch.distributed.all_reduce(self.flag, op=torch.distributed.ReduceOp.MAX)
        return bool(self.flag.item())
