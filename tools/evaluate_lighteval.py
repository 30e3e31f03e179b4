"""The MHA2MLA paper's benchmarks in lighteval, with a Hugging Face model, original or converted."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.lighteval_run import LightevalSettings, evaluate_lighteval
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_lighteval.py MODEL OUT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (model, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=LightevalSettings)
    evaluate_lighteval(model, Path(target), load_settings(LightevalSettings, overrides, file))


if __name__ == "__main__":
    run_tool(main)
