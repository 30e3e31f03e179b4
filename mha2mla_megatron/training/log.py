"""What a run says: a line a step, or a bar on a terminal; in log.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from mha2mla_megatron.bottom_line import BottomLine
from mha2mla_megatron.files import replace_text
from mha2mla_megatron.progress import format_seconds
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.flops import Utilisation
from mha2mla_megatron.training.log_lines import log_lines
from mha2mla_megatron.training.step import StepResult
from mha2mla_megatron.training.wandb_log import open_wandb


class StepLog:
    """Writes on the rank that has it; `step` is called by rank 0 alone."""

    def __init__(self, root: Path, settings: FinetuneSettings, first_step: int, utilisation: Utilisation) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.total, self.first, self.sources = settings.steps, first_step, settings.data.sources
        self.weight_of = settings.distillation_weight if settings.distillation.taught else None
        self.utilisation, self.failed = utilisation, False
        self.file = _reopen(root / "log.jsonl", first_step)
        # The steps that a run which was killed had taken since its save; those up to it stay.
        self.board = SummaryWriter(str(root / "tensorboard"), purge_step=first_step + 1)
        self.wandb = open_wandb(settings, root)
        self.steps = _Bar(settings.steps) if sys.stdout.isatty() else _Lines()
        self.started = self.previous = time.monotonic()

    def step(self, step: int, result: StepResult, lr: float) -> None:
        """step counts from 1. Values that are not finite are null in log.jsonl, which JSON has no number for."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        rate = result.tokens / seconds
        left = (now - self.started) / (step - self.first) * (self.total - step)
        mfu, memory = self.utilisation.mfu(seconds), result.peak_memory
        said = [
            f"step {step}/{self.total}",
            f"loss {result.loss:.4f}",
            *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.parts.items()),
            f"grad norm {result.grad_norm:.3f}",
            f"lr {lr:.3e}",
            f"{rate:,.0f} tokens/s",
            *([] if mfu is None else [f"MFU {mfu:.1%}"]),
            *([] if memory is None else [f"{memory / 2**30:.1f} GiB"]),
            *([] if result.updated else ["skipped"]),
        ]
        self.steps.show(step, said, f"{format_seconds(left)} left")
        found = {
            "loss": result.loss,
            **result.parts,
            "grad_norm": result.grad_norm,
            "lr": lr,
            **({} if self.weight_of is None else {"distillation_weight": self.weight_of(step)}),
            "tokens_per_second": rate,
        }
        if mfu is not None:
            found["mfu"] = mfu
        if memory is not None:
            found["peak_memory_gib"] = memory / 2**30
        more = {"tokens": result.tokens, "seconds": seconds} | ({} if result.updated else {"skipped": True})
        seen = [(name, *values) for name, values in zip(self.sources, result.sources, strict=True) if values[1]]
        if seen:
            more["sources"] = {
                name: {"loss": loss if math.isfinite(loss) else None, "tokens": tokens} for name, loss, tokens in seen
            }
        self._write(step, found, more)
        for name, loss, _ in seen:
            if math.isfinite(loss):
                self._show(f"loss of {name}", loss, step)

    def held_out(self, step: int, name: str, loss: float) -> None:
        """The loss over held-out samples after this step (name: validation or test); its time counts for no step."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        print(f"step {step}/{self.total} | {name} loss {loss:.4f} | {format_seconds(seconds)}", flush=True)
        self._write(step, {f"{name}_loss": loss}, {"seconds": seconds})

    def _write(self, step: int, found: dict[str, float], more: dict[str, Any]) -> None:
        """A line of both to log.jsonl, what was `found` to TensorBoard and W&B."""
        values: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in found.items()}
        line = {"step": step, **values, **more}
        with self._may_fail():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        for name, value in values.items():
            if value is not None:
                self._show(name, value, step)

    def _show(self, name: str, value: float, step: int) -> None:
        with self._may_fail():
            self.board.add_scalar(name, value, step)
            if self.wandb is not None:
                self.wandb.log({name: value}, step=step)

    def close(self) -> None:
        self.steps.close()
        for stream in (self.file, self.board):
            with self._may_fail():
                stream.close()
        if self.wandb is not None:
            self.wandb.finish()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """A log that cannot be written, as on a full disk, is no reason to lose the steps since the last save."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.failed = True
                print(f"warning: {self.file.name} or tensorboard: not written ({error.strerror})", file=sys.stderr)


class _Lines:
    """Each step's line, printed."""

    def show(self, step: int, said: list[str], left: str) -> None:
        print(" | ".join((*said, left)), flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A bar with the newest step's line on a terminal, where the line of the last step stays."""

    INTERVAL = 0.2
    """Seconds between two steps that are shown, at least."""

    CELLS = 20

    def __init__(self, total: int) -> None:
        self.total, self.line = total, BottomLine()
        self.last, self.shown = "", -math.inf

    def show(self, step: int, said: list[str], left: str) -> None:
        self.last = " | ".join((*said, left))
        now = time.monotonic()
        if now - self.shown < self.INTERVAL:
            return
        self.shown = now
        done = self.CELLS * step // self.total
        title, *values = said
        bar = "#" * done + "-" * (self.CELLS - done)
        # What is cut off on a narrow terminal is the end: the time left comes first.
        self.line.show(" | ".join((f"{title} [{bar}] {left}", *values)))

    def close(self) -> None:
        self.line.close()
        if self.last:
            print(self.last, flush=True)


def _reopen(file: Path, first_step: int) -> IO[str]:
    """The log with the steps up to `first_step`; later ones were lost with the run that is resumed.

    A damaged line, such as a machine that lost its power leaves, is no reason not to go on: it is left out.
    """
    kept, damaged = [], []
    for number, line, values in log_lines(file) if file.exists() else ():
        if values is None:
            damaged.append(number)
        elif values["step"] <= first_step:
            kept.append(line)
    if damaged:
        what = f"damaged lines are left out: {len(damaged)}, the first of them line {damaged[0]}"
        print(f"warning: {file}: {what}", file=sys.stderr, flush=True)
    replace_text(file, "".join(kept))
    return file.open("a", encoding="utf-8")
