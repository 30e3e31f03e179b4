"""Tokenise text, JSON lines, parquet or a data set of the `datasets` library into Megatron's OUT.bin and OUT.idx, or
convert nanosets (.ds)."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.data.preprocess import PreprocessSettings, preprocess
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "preprocess_data.py INPUT [INPUT ...] OUT tokenizer=MODEL [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (*inputs, output), overrides, file = split_words(argv, USAGE, 2, schema=PreprocessSettings)
    settings = load_settings(PreprocessSettings, overrides, file)
    report = preprocess(inputs, Path(output), settings)
    print(f"{output}: {report['tokens']} tokens ({report['dtype']}) of {report['documents']} documents")


if __name__ == "__main__":
    run_tool(main)
