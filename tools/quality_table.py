"""One model, original and converted at several cache sizes, before and after fine-tuning: perplexities and tasks.

Stages that are finished are kept, an interrupted fine-tuning goes on from its checkpoint, and minutes=9 ends in time.
"""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.files import new_files
from mha2mla_megatron.model.parallel import own_world
from mha2mla_megatron.quality.settings import QualitySettings
from mha2mla_megatron.settings import load_settings

USAGE = "quality_table.py CONFIG.yaml [key=value ...]"


def main(argv: list[str]) -> None:
    (config,), overrides, _ = split_words(argv, USAGE, 1, 1, schema=QualitySettings)
    settings = load_settings(QualitySettings, overrides, Path(config))
    from mha2mla_megatron.quality.report import draw, markdown
    from mha2mla_megatron.quality.stages import Quality

    quality = Quality(settings)
    out = Path(str(settings.out))
    try:
        with own_world():
            left = quality.run()
    finally:
        results = [quality.results[entry.name] for entry in quality.entries]
        table = markdown(results)
        with new_files([out / "table.md", out / "table.png"], overwrite=True) as (text, picture):
            text.write_text(table + "\n", encoding="utf-8")
            draw(results, picture)
    print(table)
    if left:
        print(f"\nNot complete yet: {'; '.join(left)}. The same command goes on.")


if __name__ == "__main__":
    run_tool(main)
