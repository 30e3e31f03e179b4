"""One model converted many ways, and the perplexity of each on one text at its cache size.

A row is a conversion; its settings are those common to all (`base`), then its own, then one combination of the grid's
values; of what is set twice, the later counts. It is measured without a cache, or through each of `caches`.
results.json, .csv and .png are written again after each measurement. Its key is a hash of all that its numbers depend
on; one whose key is there already is not made again.
"""

from __future__ import annotations

import contextlib
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
from mha2mla_megatron.evaluation.cached_perplexity import KINDS, check_options, make_cache
from mha2mla_megatron.evaluation.perplexity import PerplexitySettings, evaluate_perplexity, read_config
from mha2mla_megatron.files import file_sha256
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.ranks import require_one_process
from mha2mla_megatron.settings import load_settings, to_dict
from mha2mla_megatron.sweep_results import write_results


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

    caches: list[str] = field(default_factory=list)
    """Caches that every model is measured through: full, int8, int4, int2, hqq8, hqq4, hqq2, quanto4, quanto2; those
    that the original cannot have are left out for it. Empty: without a cache."""

    cache_options: dict[str, int] = field(default_factory=dict)
    """Settings of the quantised ones, as in `perplexity`."""

    keep_models: bool = False
    """Leave the converted folders in OUT/models."""

    def __post_init__(self) -> None:
        if self.perplexity.output is not None:
            raise UserError("perplexity.output: a sweep writes results.json into OUT; leave it unset")
        if self.perplexity.cache is not None:
            raise UserError(f"perplexity.cache: a sweep has a list of them, caches=[{self.perplexity.cache}]")
        for kind in self.caches:
            require_one_of("caches", kind, KINDS)
        check_options(self.caches, self.cache_options)

    def options_of(self, cache: str | None) -> dict[str, int]:
        """Those of `cache_options` that this cache takes: all or none."""
        return {} if cache in (None, "full") else self.cache_options


class Row(NamedTuple):
    """One conversion. group: its name without the grid's values. folder: where its model is kept, in OUT."""

    name: str
    group: str
    settings: ConvertSettings

    def folder(self, key: str) -> str:
        return f"models/{re.sub(r'[^A-Za-z0-9]+', '_', self.name)}_{key[:8]}"


class Measurement(NamedTuple):
    """One model through one cache. row: None for the original. cache: None for none."""

    row: Row | None
    cache: str | None

    @property
    def name(self) -> str:
        return self._with_cache("original" if self.row is None else self.row.name)

    @property
    def group(self) -> str:
        return self._with_cache("original" if self.row is None else self.row.group)

    def _with_cache(self, name: str) -> str:
        return name if self.cache is None else f"{name}, {self.cache}"


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

    def key_of(row: Row | None, cache: str | None) -> str:
        parts: dict[str, Any] = {} if row is None else {"settings": files.by_content(row.settings)}
        if cache is not None:
            parts["cache"] = {
                "kind": cache,
                "options": settings.options_of(cache),
                "chunk": settings.perplexity.cache_chunk,
            }
        return _hash({**inputs, **parts})

    models = _Models(source, target, {row.name: target / row.folder(key_of(row, None)) for row in rows}, settings)
    done = {entry["key"]: entry for entry in found["rows"] + found["earlier"] if "refused" not in entry}
    first, before = found["original"], original.whole_cache_elements
    if first.get("key") != key_of(None, None):
        print("== original", file=sys.stderr, flush=True)
        first = {"name": "original", "key": key_of(None, None), **_measure(source, text, settings, None)}
        first |= {"cache_elements": before, "cache_fraction": 1.0, "ratio": 1.0}
    measurements = [Measurement(None, kind) for kind in _caches_of(source, settings)]
    measurements += [Measurement(row, kind) for row in rows for kind in settings.caches or [None]]
    keys = {measurement.name: key_of(*measurement) for measurement in measurements}
    entries: dict[str, dict[str, Any]] = {}
    for measurement in measurements:
        name, key = measurement.name, keys[measurement.name]
        if key in done and (measurement.row is None or models.are_enough(measurement.row)):
            entries[name] = done[key] | {"name": name, "group": measurement.group}

    def results() -> dict[str, Any]:
        shown = [entries[measurement.name] for measurement in measurements if measurement.name in entries]
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
    missing = [measurement for measurement in measurements if measurement.name not in entries]
    progress = Progress("sweep", len(missing), "rows")
    try:
        for number, measurement in enumerate(missing, start=1):
            row, name = measurement.row, measurement.name
            print(f"== row {number} of {len(missing)}: {name}", file=sys.stderr, flush=True)
            entry = {"name": name, "group": measurement.group, "cache": measurement.cache, "key": keys[name]}
            entry["settings"] = None if row is None else to_dict(row.settings)
            entries[name] = entry
            try:
                folder, about = models.of(row)
                entry |= {"cache_elements_per_token": before * original.num_layers, **about}
                entry |= _measure(folder, text, settings, measurement.cache)
                entry["cache_elements"] = entry["cache_elements_per_token"] / original.num_layers
                entry["cache_fraction"] = entry["cache_elements"] / before
                entry["ratio"] = entry["perplexity"] / first["perplexity"]
            except UserError as error:
                entry["refused"] = str(error)
            write_results(target, results())
            progress.advance()
            gc.collect()  # models hold cycles, and with them a GPU's memory
    finally:
        models.close()
    progress.close()
    return results()


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


class _Models:
    """Converted models, one at a time: the last row's stays until another is asked for.

    kept: where each row's is left, with `keep_models`.
    """

    def __init__(self, source: Path, target: Path, kept: dict[str, Path], settings: SweepSettings) -> None:
        self.source, self.kept, self.keep = source, kept, settings.keep_models
        self.scratch = target / ".scratch"
        self.row: Row | None = None
        self.last: tuple[Path, dict[str, Any]] | UserError

    def are_enough(self, row: Row) -> bool:
        """Whether a row that has been measured needs no model, or has it."""
        return not self.keep or self.kept[row.name].is_dir()

    def of(self, row: Row | None) -> tuple[Path, dict[str, Any]]:
        """(the row's model, what its conversion says); for None the original. Raises UserError for what is refused."""
        if row is None:
            return self.source, {}
        if row != self.row:
            self.close()
            self.row, self.last = row, self._convert(row)
        if isinstance(self.last, UserError):
            raise self.last
        return self.last

    def close(self) -> None:
        self.row = None
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _convert(self, row: Row) -> tuple[Path, dict[str, Any]] | UserError:
        start = time.monotonic()
        folder = self.kept[row.name] if self.keep else self.scratch / "model"
        try:
            report = convert_model(self.source, folder, dataclasses.replace(row.settings, overwrite=True))
        except UserError as error:
            return error
        assert report is not None
        return folder, {
            "mha2mla": report["mha2mla"],
            "cache_elements_per_token": report["cache_elements_per_token"]["after"],
            "convert_seconds": round(time.monotonic() - start, 3),
        }


def _caches_of(source: Path, settings: SweepSettings) -> list[str]:
    """The caches that the original is measured through beside its own."""
    if not settings.caches:
        return []
    found, config = [], read_config(str(source), source)
    for kind in dict.fromkeys(settings.caches):
        with contextlib.suppress(UserError):
            make_cache(str(source), config, kind, settings.options_of(kind))
            found.append(kind)
    return found


def _measure(folder: Path, text: Path, settings: SweepSettings, cache: str | None) -> dict[str, Any]:
    start = time.monotonic()
    wanted = dataclasses.replace(settings.perplexity, cache=cache, cache_options=settings.options_of(cache))
    figures = dataclasses.asdict(evaluate_perplexity([str(folder)], text, wanted)[0])
    del figures["model"]  # a scratch folder
    return {**figures, "evaluate_seconds": round(time.monotonic() - start, 3)}


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
