"""Write a converted model in DeepSeek-V2's layout, for what runs that layout (docs/serving.md)."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.deepseek_layout import DeepseekSettings, export_deepseek
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "export_deepseek.py MLA DST [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (source, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=DeepseekSettings)
    settings = load_settings(DeepseekSettings, overrides, file)
    config = export_deepseek(resolve_model(source), Path(target), settings)
    rope = config["rope_parameters"]["rope_type"]
    print(f"{target}: kv_lora_rank {config['kv_lora_rank']}, qk_rope_head_dim {config['qk_rope_head_dim']}, {rope}")


if __name__ == "__main__":
    run_tool(main)
