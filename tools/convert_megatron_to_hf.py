"""Export a Megatron checkpoint, saved at any parallel layout, as a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.convert_hf_megatron import ToHFSettings, megatron_to_hf
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "convert_megatron_to_hf.py SRC DST [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (source, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=ToHFSettings)
    megatron_to_hf(Path(source), Path(target), load_settings(ToHFSettings, overrides, file))


if __name__ == "__main__":
    run_tool(main)
