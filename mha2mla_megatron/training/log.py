"""One line a step: on the terminal, in log.jsonl and in TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from mha2mla_megatron.progress import format_seconds


class StepLog:
    """Writes on the rank that has it; `step` is called by rank 0 alone."""

    def __init__(self, root: Path, total_steps: int, first_step: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.total, self.first = total_steps, first_step
        self.file = _reopen(root / "log.jsonl", first_step)
        self.board = SummaryWriter(str(root / "tensorboard"), purge_step=first_step)
        self.started = self.previous = time.monotonic()

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int) -> None:
        """step counts from 1; tokens: predicted in this step over all ranks."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        rate = tokens / seconds
        left = (now - self.started) / (step - self.first) * (self.total - step)
        print(
            f"step {step}/{self.total} | loss {loss:.4f} | grad norm {grad_norm:.3f} | lr {lr:.3e} | "
            f"{rate:,.0f} tokens/s | {format_seconds(left)} left",
            flush=True,
        )
        values: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": rate}
        self.file.write(json.dumps({"step": step, **values, "tokens": tokens, "seconds": seconds}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _reopen(file: Path, first_step: int) -> IO[str]:
    """The log with the steps up to `first_step`; later ones were lost with the run that is resumed."""
    kept = [line for line in _lines(file) if json.loads(line)["step"] <= first_step]
    stream = file.open("w")
    stream.writelines(kept)
    return stream


def _lines(file: Path) -> list[str]:
    """Whole lines of the file, none where it does not exist; a killed run may have left half a line."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
