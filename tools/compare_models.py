"""Compare two models of one vocabulary by position in a text: KL, top-1 agreement, logit error, log-likelihood."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.by_position import CompareSettings, compare_models, format_comparison
from mha2mla_megatron.settings import load_settings

USAGE = "compare_models.py A B TEXT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (a, b, text), overrides, file = split_words(argv, USAGE, 3, 3, schema=CompareSettings)
    settings = load_settings(CompareSettings, overrides, file)
    print(format_comparison(compare_models(a, b, Path(text), settings)))


if __name__ == "__main__":
    run_tool(main)
