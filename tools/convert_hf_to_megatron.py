"""Turn a Hugging Face model folder, original or converted to MLA, into a Megatron torch_dist checkpoint."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.convert_hf_megatron import ToMegatronSettings, hf_to_megatron
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "convert_hf_to_megatron.py SRC DST [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (source, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=ToMegatronSettings)
    hf_to_megatron(resolve_model(source), Path(target), load_settings(ToMegatronSettings, overrides, file))


if __name__ == "__main__":
    run_tool(main)
