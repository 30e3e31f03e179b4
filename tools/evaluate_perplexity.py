"""Compare the perplexity and the cache of Hugging Face models, original or converted, on one text."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.perplexity import PerplexitySettings, evaluate_perplexity, format_results
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_perplexity.py MODEL [MODEL ...] TEXT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (*models, text), overrides, file = split_words(argv, USAGE, 2, schema=PerplexitySettings)
    settings = load_settings(PerplexitySettings, overrides, file)
    print(format_results(evaluate_perplexity(models, Path(text), settings)))


if __name__ == "__main__":
    run_tool(main)
