"""Convert a Hugging Face MHA/GQA model into a multi-head latent attention model, for Hugging Face or Megatron."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.convert import ConvertSettings, convert_model
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "convert_mha_to_mla.py SRC DST [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (source, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=ConvertSettings)
    settings = load_settings(ConvertSettings, overrides, file)
    report = convert_model(resolve_model(source), Path(target), settings)
    if report is not None:
        elements = report["cache_elements_per_token"]
        folder = "hf/" if settings.ckpt_format == "torch_dist" else ""
        print(f"{target}: {elements['after']} cached elements per token instead of {elements['before']} "
              f"(-{elements['saved']:.2%}); report in {folder}conversion_report.json")  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
