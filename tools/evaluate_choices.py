"""Compare the multiple-choice accuracy of Hugging Face models, original or converted: HellaSwag or PIQA rows."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.choices import ChoicesSettings, evaluate_choices, format_choices
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_choices.py MODEL [MODEL ...] FILE.jsonl[.gz] [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (*models, rows), overrides, file = split_words(argv, USAGE, 2, schema=ChoicesSettings)
    settings = load_settings(ChoicesSettings, overrides, file)
    print(format_choices(evaluate_choices(models, Path(rows), settings)))


if __name__ == "__main__":
    run_tool(main)
