"""Fine-tune an original, partial-RoPE or MLA model on Megatron-core, as plain python or under torchrun."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.config import FinetuneSettings

USAGE = "finetune.py CONFIG.yaml [key=value ...]"


def main(argv: list[str]) -> None:
    (config,), overrides, _ = split_words(argv, USAGE, 1, 1, schema=FinetuneSettings)
    settings = load_settings(FinetuneSettings, overrides, Path(config))
    # After the settings: megatron takes seconds to import.
    from mha2mla_megatron.model.parallel import resumable_job
    from mha2mla_megatron.training.loop import finetune

    with resumable_job(settings.parallel, "goes on from the newest complete step"):
        finetune(settings)


if __name__ == "__main__":
    run_tool(main)
