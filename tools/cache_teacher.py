"""Run a teacher over the samples of a run and keep its most probable tokens in distillation.cache, for many epochs."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "cache_teacher.py CONFIG.yaml teacher=CHECKPOINT distillation.cache=FOLDER [key=value ...]"


def main(argv: list[str]) -> None:
    # With the settings, which stand beside what they are for: megatron takes seconds to import.
    from mha2mla_megatron.model.parallel import resumable_job
    from mha2mla_megatron.training.cache_teacher import CacheTeacherSettings, cache_teacher

    (config,), overrides, _ = split_words(argv, USAGE, 1, 1, schema=CacheTeacherSettings)
    settings = load_settings(CacheTeacherSettings, overrides, Path(config))
    with resumable_job(settings.parallel, "goes on with the files that are missing"):
        cache_teacher(settings)


if __name__ == "__main__":
    run_tool(main)
