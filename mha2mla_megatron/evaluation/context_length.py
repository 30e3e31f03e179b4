"""Perplexity by length of context, through a cache: whether tokens far back are of use to a model, or harm it.

The text is cut into windows of the longest length, which do not overlap. In each, the same last tokens are predicted at
every length L, from the last L tokens of the window; so the lengths differ in nothing but how far back the model sees.
A sound model gets better with L, or stays; one that has lost rotations that it needs at long range gets worse.

Standard errors take windows as independent samples. Differences are paired: between lengths, and between models, the
same tokens are compared.

Shape letters: w windows, L tokens of context (the predicted ones included).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mha2mla_megatron.checkpoint.folders import model_sha256
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.evaluation.cached_perplexity import make_cache, window_nll_through
from mha2mla_megatron.evaluation.journal import append_lines, claim, cut_torn_line, read_lines
from mha2mla_megatron.evaluation.long_context import LongContextSettings, Plan, Run, plan_runs, running, write_results
from mha2mla_megatron.evaluation.means import Mean, mean
from mha2mla_megatron.evaluation.perplexity import PerplexitySettings, cut_windows
from mha2mla_megatron.evaluation.table import format_markdown
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import to_dict


@dataclass(frozen=True)
class ContextSettings(LongContextSettings):
    """Settings of tools/evaluate_context.py."""

    predicted: int = 512
    """Tokens predicted in each window, the last ones; less than the shortest length."""

    max_windows: int | None = 16
    """Use only the first so many windows of the longest length. null: all of the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("predicted", self.predicted, 1)
        if self.max_windows is not None:
            require_at_least("max_windows", self.max_windows, 1)


class Place(NamedTuple):
    """One measurement: a run, a length and a window, by its number."""

    model: str
    cache: str
    length: int
    window: int


class Measured(NamedTuple):
    nll: float
    """Mean negative log-likelihood of the predicted tokens, in nats."""

    bytes_per_token: float
    """All that the cache stores at the end, over L."""


@dataclass(frozen=True)
class Row:
    """One run at one length."""

    model: str
    cache: str
    length: int
    nll: Mean
    """Nats per token; its exponential is the perplexity."""

    over_shortest: Mean | None
    """nll less that of the same run at the shortest length, paired; None for the shortest."""

    over_first: Mean | None
    """nll less that of the first run at the same length, paired; None for the first run."""

    cache_bytes_per_token: float


def evaluate_context(models: Sequence[str], text: Path, target: Path, settings: ContextSettings) -> list[Row]:
    """Measure what `target` does not hold yet, and write results.json, results.md and results.png there.

    Raises UserError for bad input; what can be found without reading weights is found before any are read.
    """
    content = read_text(text)
    plan = plan_runs(models, settings)
    longest, shortest = plan.lengths[-1], plan.lengths[0]
    if settings.predicted >= shortest:
        raise UserError(f"predicted: {settings.predicted} tokens leave nothing of a context of {shortest}")
    bos = bool(settings.bos)  # takes the place of the first token: L counts it
    cut = PerplexitySettings(window=longest - bos, max_windows=settings.max_windows, bos=settings.bos)
    windows = cut_windows(content, plan.folders, text, cut)  # int64 [w, longest]
    if int(windows.max()) >= plan.vocab_size:
        raise UserError(f"{text}: token id {int(windows.max())} is beyond the models' vocabulary {plan.vocab_size}")
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    _claim(target, plan, digest, settings)
    journal = target / "windows.jsonl"
    cut_torn_line(journal)
    found = _read(journal)
    wanted = [
        Place(*run, length, window) for run in plan.runs for length in plan.lengths for window in range(len(windows))
    ]
    _measure(plan, windows, [place for place in wanted if place not in found], journal, settings)
    measured = _read(journal)
    rows = _rows(plan, {place: measured[place] for place in wanted}, len(windows))
    report = {
        "text": str(text),
        "text_sha256": digest,
        "windows": len(windows),
        "settings": to_dict(settings),
        "results": [_entry(row) for row in rows],
    }
    write_results(target, format_rows(rows), partial(draw, rows), report)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The results as Markdown."""

    def difference(value: Mean | None) -> str:
        if value is None:
            return "-"
        return f"{value.value:+.4f}" + ("" if value.error is None else f" ± {value.error:.4f}")

    lines = []
    for row in rows:
        perplexity = math.exp(row.nll.value)
        error = "-" if row.nll.error is None else f"{perplexity * row.nll.error:.3f}"
        lines.append(
            (
                row.model,
                row.cache,
                str(row.length),
                f"{perplexity:.3f}",
                error,
                difference(row.over_shortest),
                difference(row.over_first),
                f"{row.cache_bytes_per_token:.6g}",
            )
        )
    header = ("model", "cache", "context", "perplexity", "std. error", f"nats over {rows[0].length}",
              "nats over first run", "cache bytes/token")  # fmt: skip
    return format_markdown(header, lines, text_columns=2)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Perplexity by length, and the difference to the first run, with bars of one standard error, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in dict.fromkeys(Run(row.model, row.cache) for row in rows):
        own = [row for row in rows if (row.model, row.cache) == run]
        lengths, label = [row.length for row in own], f"{run.model} ({run.cache})"
        values = [math.exp(row.nll.value) for row in own]
        errors = [value * (row.nll.error or 0) for value, row in zip(values, own, strict=True)]
        left.errorbar(lengths, values, errors, marker="o", capsize=3, label=label)
        apart = [row.over_first or Mean(0.0, None) for row in own]
        right.errorbar(lengths, [m.value for m in apart], [m.error or 0 for m in apart], marker="o", capsize=3)
    left.set_ylabel("perplexity")
    right.set_ylabel("nats a token over the first run")
    ticks = sorted({row.length for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", fontsize="small")
    figure.savefig(file, dpi=120, format="png")


def _claim(target: Path, plan: Plan, text_sha256: str, settings: ContextSettings) -> None:
    made_of = {
        "text_sha256": text_sha256,
        "longest": plan.lengths[-1],
        **{key: getattr(settings, key) for key in ("predicted", "bos", "cache_chunk", "cache_options", "dtype")},
    }
    claim(target, made_of, "models", {name: model_sha256(folder) for name, folder in plan.folders.items()}, "model")


def _measure(
    plan: Plan, windows: torch.Tensor, missing: Sequence[Place], journal: Path, settings: ContextSettings
) -> None:
    progress = Progress("context", sum(place.length for place in missing), "tokens")
    for place, model in running(plan, missing, settings):
        window = windows[place.window]
        ids = window[-place.length :].clone()
        if settings.bos:
            ids[0] = window[0]
        cache = make_cache(place.model, model.config, place.cache, settings.cache_options)
        nll, held = window_nll_through(
            cache, model, ids[None].to(model.device), settings.predicted, settings.cache_chunk
        )
        if not nll.isfinite().all():
            raise UserError(f"{place.model}: gives log-likelihoods that are not finite, dtype {model.dtype}")
        values = {"nll": nll.item() / settings.predicted, "bytes_per_token": held / place.length}
        append_lines(journal, [{**place._asdict(), **values}])
        progress.advance(place.length)
    if missing:
        progress.close()


def _read(journal: Path) -> dict[Place, Measured]:
    def parse(row: dict[str, Any]) -> tuple[Place, Measured]:
        place = Place(str(row["model"]), str(row["cache"]), int(row["length"]), int(row["window"]))
        return place, Measured(float(row["nll"]), float(row["bytes_per_token"]))

    return dict(read_lines(journal, parse, "a window's result"))


def _rows(plan: Plan, measured: dict[Place, Measured], windows: int) -> list[Row]:
    def nll(run: Run, length: int) -> list[float]:
        return [measured[Place(*run, length, window)].nll for window in range(windows)]

    def apart(values: list[float], base: list[float]) -> Mean:
        return mean([value - other for value, other in zip(values, base, strict=True)])

    first, shortest = plan.runs[0], plan.lengths[0]
    return [
        Row(
            *run,
            length=length,
            nll=mean(nll(run, length)),
            over_shortest=None if length == shortest else apart(nll(run, length), nll(run, shortest)),
            over_first=None if run == first else apart(nll(run, length), nll(first, length)),
            cache_bytes_per_token=measured[Place(*run, length, 0)].bytes_per_token,
        )
        for run in plan.runs
        for length in plan.lengths
    ]


def _entry(row: Row) -> dict[str, Any]:
    def plain(value: Mean | None) -> dict[str, float | None] | None:
        return None if value is None else value._asdict()

    return {
        "model": row.model,
        "cache": row.cache,
        "length": row.length,
        "perplexity": math.exp(row.nll.value),
        "nll": plain(row.nll),
        "over_shortest": plain(row.over_shortest),
        "over_first": plain(row.over_first),
        "cache_bytes_per_token": row.cache_bytes_per_token,
    }
