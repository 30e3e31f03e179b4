"""Convert one model many ways and compare the perplexities: a table, a picture, and results that a rerun continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.sweep import SweepSettings, sweep

USAGE = "sweep.py MODEL TEXT OUT [config=FILE.yaml] [key=value ...]"
COLUMNS = {
    "elements": ("cache_elements", ".6g"),
    "of cache": ("cache_fraction", ".2%"),
    "bytes/token": ("cache_bytes_per_token", ".6g"),
    "perplexity": ("perplexity", ".4f"),
    "std. error": ("perplexity_standard_error", ".4f"),
    "ratio": ("ratio", ".4f"),
    "convert s": ("convert_seconds", ".1f"),
    "evaluate s": ("evaluate_seconds", ".1f"),
}
"""Heading -> field of results.json and its format."""


def main(argv: list[str]) -> None:
    (model, text, target), overrides, file = split_words(argv, USAGE, 3, 3, schema=SweepSettings)
    settings = load_settings(SweepSettings, overrides, file)
    results = sweep(resolve_model(model), Path(text), Path(target), settings)
    print(table([results["original"], *results["rows"]]))


def table(entries: list[dict[str, Any]]) -> str:
    """The rows, aligned; the reason in the last column for those that were refused."""
    notes = [f"refused: {entry['refused']}" if "refused" in entry else "" for entry in entries]
    width = max(map(len, notes))  # reasons of one width begin at one column
    rows = []
    for entry, note in zip(entries, notes, strict=True):
        values = [(entry.get(field), form) for field, form in COLUMNS.values()]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        rows.append((entry["name"], *cells, note.ljust(width)))
    return format_table(("row", *COLUMNS, ""), rows)


if __name__ == "__main__":
    run_tool(main)
