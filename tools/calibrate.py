"""Measure what flows through a model's attention: the statistics that data-aware conversion needs."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.calibration.run import CalibrateSettings, calibrate
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "calibrate.py MODEL TEXT OUT.safetensors [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (model, text, target), overrides, file = split_words(argv, USAGE, 3, 3, schema=CalibrateSettings)
    settings = load_settings(CalibrateSettings, overrides, file)
    summary = calibrate(resolve_model(model), Path(text), Path(target), settings)
    if summary is not None:
        print(f"{target}: statistics of {summary['tokens']} tokens, {summary['stored_sequences']} sequences stored")


if __name__ == "__main__":
    run_tool(main)
