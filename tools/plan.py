"""On paper: GPU memory and messages of a fine-tuning run at a parallel layout, and the smallest layout that fits."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.layout_plan.report import format_plan, make_plan, require_fit
from mha2mla_megatron.layout_plan.settings import PlanSettings
from mha2mla_megatron.settings import load_settings

USAGE = "plan.py CONFIG.yaml [key=value ...]"


def main(argv: list[str]) -> None:
    (config,), overrides, _ = split_words(argv, USAGE, 1, 1, schema=PlanSettings)
    settings = load_settings(PlanSettings, overrides, Path(config))
    found = make_plan(settings)
    print(format_plan(found, settings), flush=True)
    require_fit(found, settings)


if __name__ == "__main__":
    run_tool(main)
