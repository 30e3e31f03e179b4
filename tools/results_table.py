"""Results of evaluate_choices.py, evaluate_longbench.py and lighteval side by side: caches, scores, differences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, run_tool
from mha2mla_megatron.evaluation.comparison import compare, draw, latex, markdown, read_runs
from mha2mla_megatron.files import new_files
from mha2mla_megatron.settings import load_settings

USAGE = "results_table.py RUN [RUN ...] [key=value ...]"


@dataclass(frozen=True)
class TableSettings:
    names: list[str] | None = None
    """What to call the runs. null: by their models."""

    latex: str | None = None
    """A .tex file for the table, replaced if it exists."""

    png: str | None = None
    """A picture of the scores, replaced if it exists."""


def main(argv: list[str]) -> None:
    sources, overrides, config = split_words(argv, USAGE, 1, schema=TableSettings)
    settings = load_settings(TableSettings, overrides, config)
    runs = [run for source in sources for run in read_runs(Path(source))]
    if settings.names is not None:
        if len(settings.names) != len(runs):
            raise UserError(f"names: {len(settings.names)} names for {len(runs)} runs")
        runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, settings.names, strict=True)]
    table = compare(runs)
    if settings.latex is not None:
        with new_files([Path(settings.latex)], overwrite=True) as (file,):
            file.write_text(latex(runs, table) + "\n", encoding="utf-8")
    if settings.png is not None:
        with new_files([Path(settings.png)], overwrite=True) as (file,):
            draw(runs, table, file)
    print(markdown(runs, table))


if __name__ == "__main__":
    run_tool(main)
