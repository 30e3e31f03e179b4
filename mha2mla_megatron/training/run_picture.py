"""A picture of one or several runs, from their log.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import new_files
from mha2mla_megatron.training.log_lines import log_lines

PANELS = {
    "loss": ("loss", "lm_loss", "kl", "attention_loss", "z_loss"),
    "validation loss": ("validation_loss",),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "tokens/s": ("tokens_per_second",),
    "MFU": ("mfu",),
    "peak memory [GiB]": ("peak_memory_gib",),
}
"""Title of each panel, and the keys of log.jsonl that it shows."""

STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Of the lines of a panel's keys."""


def plot_runs(roots: Sequence[Path], target: Path, overwrite: bool) -> None:
    """Draw every panel that any run has values for, a colour for each run, as PNG.

    Raises UserError for a run without a log or with a damaged one, and a target that cannot be written.
    """
    from matplotlib.figure import Figure

    if target.suffix.lower() != ".png":
        raise UserError(f"{target}: the last word is the picture to write; its name ends with .png")
    logs = [read_log(root) for root in roots]
    shown = [
        title for title, keys in PANELS.items() if any(key in line for key in keys for log in logs for line in log)
    ]
    if not shown:
        raise UserError(f"{', '.join(map(str, roots))}: log.jsonl holds nothing that could be drawn")
    figure = Figure(figsize=(9, 2.4 * len(shown)), layout="constrained")
    for axes, title in zip(figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0], shown, strict=True):
        for index, (root, log) in enumerate(zip(roots, logs, strict=True)):
            for key, style in zip(PANELS[title], STYLES, strict=False):
                steps, values = series(log, key)
                if steps:
                    label = picture_label(f"{root}" if key == PANELS[title][0] else f"{root}: {key}")
                    marker = "." * (len(steps) < 50)
                    axes.plot(steps, values, linestyle=style, color=f"C{index % 10}", marker=marker, label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
        axes.set_xlabel("step" if title == shown[-1] else "")
    with new_files([target], overwrite) as (file,):
        figure.savefig(file, dpi=120, format="png")


def picture_label(name: str) -> str:
    """As matplotlib shows it: no formula between dollar signs, and not left out for its first letter."""
    return name.replace("$", r"\$").replace("_", "\N{ZERO WIDTH SPACE}_", int(name.startswith("_")))


def read_log(root: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; half a line at the end, which a killed run may leave, is left out."""
    file = root / "log.jsonl"
    try:
        found = list(log_lines(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the save folder of a run") from None
    lines = []
    for number, _, values in found:
        if values is None:
            raise UserError(f"{file}: line {number} is not one of tools/finetune.py")
        lines.append(values)
    if not lines:
        raise UserError(f"{file}: holds no step yet")
    return lines


def series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one key; a value that was not finite is a gap."""
    found = [(line["step"], math.nan if line[key] is None else line[key]) for line in log if key in line]
    return [step for step, _ in found], [value for _, value in found]
