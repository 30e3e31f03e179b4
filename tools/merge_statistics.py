"""Add up the statistics of several calibration runs over one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mha2mla_megatron.calibration.statistics import merge_statistics
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.files import new_files
from mha2mla_megatron.settings import load_settings

USAGE = "merge_statistics.py OUT.safetensors FILE.safetensors [FILE.safetensors ...] [key=value ...]"


@dataclass(frozen=True)
class MergeSettings:
    overwrite: bool = False
    """Replace OUT if it exists."""


def main(argv: list[str]) -> None:
    (target, *files), overrides, config = split_words(argv, USAGE, 2, schema=MergeSettings)
    settings = load_settings(MergeSettings, overrides, config)
    with new_files([Path(target)], settings.overwrite) as (scratch,):
        provenance = merge_statistics([Path(file) for file in files], scratch)
    print(f"{target}: statistics of {provenance['tokens']} tokens from {len(files)} files")


if __name__ == "__main__":
    run_tool(main)
