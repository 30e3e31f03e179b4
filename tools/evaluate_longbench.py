"""LongBench v1 with a Hugging Face model, original or converted: generate, score, average; a rerun goes on."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.longbench.run import LongBenchSettings, evaluate_longbench, format_results
from mha2mla_megatron.settings import load_settings

USAGE = "evaluate_longbench.py MODEL DATA OUT [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (model, data, target), overrides, file = split_words(argv, USAGE, 3, 3, schema=LongBenchSettings)
    settings = load_settings(LongBenchSettings, overrides, file)
    results = evaluate_longbench(model, data, Path(target), settings)
    if results is not None:
        print(format_results(results))


if __name__ == "__main__":
    run_tool(main)
