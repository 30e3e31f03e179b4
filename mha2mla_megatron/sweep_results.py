"""The files of a sweep: results.json, and the table and the picture that are made from it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from mha2mla_megatron.files import new_files, write_json

COLUMNS = (
    "name", "group", "cache", "cache_elements", "cache_fraction", "cache_bytes_per_token", "perplexity",
    "perplexity_standard_error", "ratio", "convert_seconds", "evaluate_seconds", "refused",
)  # fmt: skip


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """All three files; results.json first, from which the others can be made again."""
    with new_files([folder / "results.json"], overwrite=True) as (file,):
        write_json(file, results)
    with new_files([folder / "results.csv", folder / "results.png"], overwrite=True) as (table, picture):
        with table.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows((results["original"], *results["rows"]))
        draw_sweep(results, picture)


def draw_sweep(results: dict[str, Any], file: Path) -> None:
    """Perplexity against the cache's bytes, a colour and marker for each row's name without the grid's values and each
    cache, as PNG."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    done = [entry for entry in results["rows"] if "refused" not in entry]
    shown = [entry["perplexity"] for entry in (results["original"], *done)]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(shown[0], color="black", linestyle="--", label="original")
    whole = results["original"]["cache_bytes_per_token"]
    for index, group in enumerate(dict.fromkeys(entry["group"] for entry in done)):
        mine = [entry for entry in done if entry["group"] == group]
        points = sorted((100 * entry["cache_bytes_per_token"] / whole, entry["perplexity"]) for entry in mine)
        # Ten colours, ten markers; from the eleventh group on, other pairs of them.
        axes.plot(*zip(*points, strict=True), f"C{index % 10}", marker="osD^vP*X<>"[index * 11 // 10 % 10], label=group)
    axes.set(xlabel="cache, % of the original's bytes", ylabel="perplexity", yscale="log")
    if any(entry.get("cache") for entry in done):  # from a few per cent on
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    # A log axis labels powers of ten only, and a sweep may lie between two of them.
    dense = ticker.MaxNLocator(8) if max(shown) < 5 * min(shown) else ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
    axes.yaxis.set_major_locator(dense)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=130, format="png")
