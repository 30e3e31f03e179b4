"""Draw loss, validation loss, learning rate, gradient norm, speed and memory of fine-tuning runs, one colour each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.run_picture import plot_runs

USAGE = "plot_run.py RUN [RUN ...] OUT.png [key=value ...]"


@dataclass(frozen=True)
class PlotSettings:
    """Settings of tools/plot_run.py."""

    overwrite: bool = False
    """Replace OUT.png if it exists."""


def main(argv: list[str]) -> None:
    (*runs, target), overrides, file = split_words(argv, USAGE, 2, schema=PlotSettings)
    settings = load_settings(PlotSettings, overrides, file)
    plot_runs([Path(run) for run in runs], Path(target), settings.overwrite)


if __name__ == "__main__":
    run_tool(main)
