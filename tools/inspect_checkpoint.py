"""Say what is in a Megatron checkpoint, and whether every tensor of it is complete, readable and finite."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.inspect import InspectSettings, format_inspection, inspect_checkpoint
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "inspect_checkpoint.py FOLDER [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (folder,), overrides, file = split_words(argv, USAGE, 1, 1, schema=InspectSettings)
    print(format_inspection(inspect_checkpoint(Path(folder), load_settings(InspectSettings, overrides, file))))


if __name__ == "__main__":
    run_tool(main)
