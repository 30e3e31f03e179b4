"""Perplexity by length of context, through any cache, of models original or converted; a rerun goes on."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.context_length import ContextSettings, evaluate_context, format_rows
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_context.py MODEL [MODEL ...] TEXT OUT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (*models, text, target), overrides, file = split_words(argv, USAGE, 3, schema=ContextSettings)
    settings = load_settings(ContextSettings, overrides, file)
    print(format_rows(evaluate_context(models, Path(text), Path(target), settings)))


if __name__ == "__main__":
    run_tool(main)
