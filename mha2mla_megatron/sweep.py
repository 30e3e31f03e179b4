"""One model converted many ways, and the perplexity of each on one text at its cache size.

A row is a conversion; its settings are those common to all (`base`), then its own, then one combination of the grid's
values; of what is set twice, the later counts. results.json, .csv and .png are written again after each row. Its key is
a hash of all that its numbers depend on; a row whose key is there already is not run again.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import hashlib
import importlib.metadata
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mha2mla_megatron import __version__
from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.calibration.statistics import Statistics, model_fingerprint
from mha2mla_megatron.checkpoint.folders import model_sha256
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.convert import OF_THE_OUTPUT, ConvertSettings, convert_model
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.errors import UserError, require_one_of
from mha2mla_megatron.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
from mha2mla_megatron.files import file_sha256, new_files, write_json
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.ranks import require_one_process
from mha2mla_megatron.settings import load_settings, to_dict

COLUMNS = (
    "name", "group", "cache_elements", "cache_fraction", "perplexity", "perplexity_standard_error", "ratio",
    "convert_seconds", "evaluate_seconds", "refused",
)  # fmt: skip


@dataclass(frozen=True)
class SweepSettings:
    """Settings of tools/sweep.py."""

    rows: dict[str, Any] = field(default_factory=dict)
    """Name -> settings of tools/convert_mha_to_mla.py, nested or dotted; `grid` among them is a grid of this row's own.
    None: one row of base alone."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> list of values. Every row is run with every combination of them."""

    base: dict[str, Any] = field(default_factory=lambda: {"dtype": "float32"})
    """Conversion settings common to all rows, such as the statistics file."""

    perplexity: PerplexitySettings = field(default_factory=lambda: PerplexitySettings(dtype="float32"))
    """Of all models, the original's too: in one type, so that rounding is not taken for an effect of the conversion."""

    keep_models: bool = False
    """Leave the converted folders in OUT/models."""

    def __post_init__(self) -> None:
        if self.perplexity.output is not None:
            raise UserError("perplexity.output: a sweep writes results.json into OUT; leave it unset")


class Row(NamedTuple):
    """One conversion. group: its name without the grid's values. folder: where its model is kept, in OUT."""

    name: str
    group: str
    settings: ConvertSettings

    def folder(self, key: str) -> str:
        return f"models/{re.sub(r'[^A-Za-z0-9]+', '_', self.name)}_{key[:8]}"


def expand_rows(settings: SweepSettings) -> list[Row]:
    """Every row with every combination of its grid. Raises UserError for conversion settings that are refused."""
    base = dict(leaves("base", settings.base))
    rows: dict[str, Row] = {}
    for group, values in (settings.rows or {"base": {}}).items():
        own = dict(leaves(f"rows.{group}", values))
        grid = dict(leaves("grid", settings.grid))
        grid |= {key.removeprefix("grid."): own.pop(key) for key in list(own) if key.startswith("grid.")}
        for key, choices in grid.items():
            if not isinstance(choices, list) or not choices:
                raise UserError(f"grid: {key}: {choices!r} is not a list of values to try")
        for combination in itertools.product(*grid.values()):
            picked = dict(zip(grid, combination, strict=True))
            shown = {k.rpartition(".")[2]: v if isinstance(v, str) else json.dumps(v) for k, v in picked.items()}
            name = group + ", " * bool(picked) + " ".join(f"{key}={value}" for key, value in shown.items())
            if name in rows:
                raise UserError(f"row '{name}': there twice")
            rows[name] = Row(name, group, conversion_settings(name, {**base, **own, **picked}))
    return list(rows.values())


def sweep(source: Path, text: Path, target: Path, settings: SweepSettings) -> dict[str, Any]:
    """Run what is not in `target`/results.json yet; returns what that file then holds.

    Raises UserError before any work for bad input. A row that is refused later is recorded as such and tried again.
    """
    require_one_process("sweep.py")
    rows, found = expand_rows(settings), _read_results(target)
    original = read_architecture(source)
    if original.mla is not None:
        raise UserError(f"{source}: is converted already; a sweep starts from the original")
    files = _Files(source, original, rows)
    inputs = {
        "model_sha256": files.model,
        "text_sha256": hashlib.sha256(read_text(text).encode("utf-8")).hexdigest(),
        # The others change no number but in its last digits.
        "perplexity": {name: getattr(settings.perplexity, name) for name in ("window", "max_windows", "dtype", "bos")},
    }
    keys = {row.name: _hash({**inputs, "settings": files.by_content(row.settings)}) for row in rows}
    done = {entry["key"]: entry for entry in found["rows"] + found["earlier"] if "refused" not in entry}
    first, before = found["original"], original.whole_cache_elements
    if first.get("key") != _hash(inputs):
        print("== original", file=sys.stderr, flush=True)
        first = {"name": "original", "key": _hash(inputs), **_measure(source, text, settings)}
        first |= {"cache_elements": before, "cache_fraction": 1.0, "ratio": 1.0}
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = keys[row.name]
        if key in done and (not settings.keep_models or (target / row.folder(key)).is_dir()):
            entries[row.name] = done[key] | {"name": row.name, "group": row.group}

    def results() -> dict[str, Any]:
        shown = [entries[row.name] for row in rows if row.name in entries]
        return {
            "source": str(source),
            "text": str(text),
            **inputs,
            "statistics": files.provenance,
            "settings": to_dict(settings),
            "versions": {"mha2mla_megatron": __version__}
            | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "original": first,
            "rows": shown,
            # Rows of other settings or another text: not shown, but not run again when they come back.
            "earlier": [done[key] for key in done if key not in {entry["key"] for entry in shown}],
        }

    write_results(target, results())
    missing = [row for row in rows if row.name not in entries]
    progress = Progress("sweep", len(missing), "rows")
    for number, row in enumerate(missing, start=1):
        print(f"== row {number} of {len(missing)}: {row.name}", file=sys.stderr, flush=True)
        entry = {"name": row.name, "group": row.group, "key": keys[row.name], "settings": to_dict(row.settings)}
        entries[row.name] = entry
        try:
            entry |= _run(source, text, target, row, keys[row.name], settings)
            entry["cache_elements"] = entry["cache_elements_per_token"] / original.num_layers
            entry["cache_fraction"] = entry["cache_elements"] / before
            entry["ratio"] = entry["perplexity"] / first["perplexity"]
        except UserError as error:
            entry["refused"] = str(error)
        write_results(target, results())
        progress.advance()
        gc.collect()  # models hold cycles, and with them a GPU's memory
    progress.close()
    return results()


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
    """Perplexity against cache, a colour and marker for each row's name without the grid's values, as PNG."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    done = [entry for entry in results["rows"] if "refused" not in entry]
    shown = [entry["perplexity"] for entry in (results["original"], *done)]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(shown[0], color="black", linestyle="--", label="original")
    for index, group in enumerate(dict.fromkeys(entry["group"] for entry in done)):
        points = sorted((100 * e["cache_fraction"], e["perplexity"]) for e in done if e["group"] == group)
        # Ten colours, ten markers; from the eleventh group on, other pairs of them.
        axes.plot(*zip(*points, strict=True), f"C{index % 10}", marker="osD^vP*X<>"[index * 11 // 10 % 10], label=group)
    axes.set(xlabel="cache, % of the original's", ylabel="perplexity", yscale="log")
    # A log axis labels powers of ten only, and a sweep may lie between two of them.
    dense = ticker.MaxNLocator(8) if max(shown) < 5 * min(shown) else ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
    axes.yaxis.set_major_locator(dense)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=130, format="png")


def leaves(where: str, values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings; None is an empty one."""
    if not isinstance(values, dict | None):
        raise UserError(f"{where}: {values!r} is not a mapping of settings")
    for key, value in (values or {}).items():
        name = f"{prefix}{key}"
        yield from leaves(where, value, f"{name}.") if isinstance(value, dict) else [(name, value)]


def conversion_settings(name: str, leaves: dict[str, Any]) -> ConvertSettings:
    words = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in leaves.items()]
    try:
        settings = load_settings(ConvertSettings, words)
        require_one_of("ckpt_format", settings.ckpt_format, ("hf",))  # which is what can be evaluated
        return settings
    except UserError as error:
        raise UserError(f"row '{name}': {error}") from None


class _Files:
    """What the sweep reads, by content; `provenance`: what each statistics file says of itself.

    Raises UserError for files that are missing, and for statistics that are not this model's.
    """

    def __init__(self, source: Path, original: Architecture, rows: list[Row]) -> None:
        self.model = model_sha256(source)
        fingerprint = model_fingerprint(HFReader(source, original), original)
        self.digests: dict[str | None, str | None] = {None: None}
        self.provenance: dict[str, Any] = {}
        for settings in (row.settings for row in rows):
            for file in {settings.partial_rope.scores, settings.low_rank.statistics} - self.digests.keys():
                self.digests[file] = file_sha256(Path(str(file)))
            statistics = settings.low_rank.statistics
            if statistics is not None and statistics not in self.provenance:
                about = Statistics(Path(statistics), original, fingerprint).metadata
                self.provenance[statistics] = {"sha256": self.digests[statistics], **about}

    def by_content(self, settings: ConvertSettings) -> dict[str, Any]:
        """The settings that the weights depend on, with hashes in the place of file names."""
        others = ("statistics", *OF_THE_OUTPUT)  # statistics: passed on to the next two
        values = {name: value for name, value in to_dict(settings).items() if name not in others}
        values["partial_rope"]["scores"] = self.digests[settings.partial_rope.scores]
        values["low_rank"]["statistics"] = self.digests[settings.low_rank.statistics]
        return values


def _read_results(target: Path) -> dict[str, Any]:
    """What an earlier run left in `target`, which may not be there or be empty; anything else is refused."""
    file = target / "results.json"
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a folder")
    if not file.exists():
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{target}: exists, is not empty and holds no results.json of a sweep")
        return {"original": {}, "rows": [], "earlier": []}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("original", "rows", "earlier")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not the results of a sweep") from None


def _run(source: Path, text: Path, target: Path, row: Row, key: str, settings: SweepSettings) -> dict[str, Any]:
    """Convert and measure one row."""
    scratch = target / ".scratch"
    folder = target / row.folder(key) if settings.keep_models else scratch / "model"
    try:
        start = time.monotonic()
        report = convert_model(source, folder, dataclasses.replace(row.settings, overwrite=True))
        assert report is not None
        return {
            "mha2mla": report["mha2mla"],
            "cache_elements_per_token": report["cache_elements_per_token"]["after"],
            "convert_seconds": round(time.monotonic() - start, 3),
            **_measure(folder, text, settings),
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(folder: Path, text: Path, settings: SweepSettings) -> dict[str, Any]:
    start = time.monotonic()
    figures = dataclasses.asdict(evaluate_perplexity([str(folder)], text, settings.perplexity)[0])
    del figures["model"]  # a scratch folder
    return {**figures, "evaluate_seconds": round(time.monotonic() - start, 3)}


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
