"""Retrieval of a needle from long contexts, by depth and length, through any cache; a picture; a rerun goes on."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.needle import NeedleSettings, evaluate_needle, format_results
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_needle.py MODEL [MODEL ...] TEXT OUT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (*models, text, target), overrides, file = split_words(argv, USAGE, 3, schema=NeedleSettings)
    settings = load_settings(NeedleSettings, overrides, file)
    print(format_results(evaluate_needle(models, Path(text), Path(target), settings)))


if __name__ == "__main__":
    run_tool(main)
