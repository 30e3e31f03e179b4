"""Two models on one text, by position in the window: how far an original and its conversion are apart, and where.

The windows, and the tokens predicted in them, are those of `perplexity`: the tokens 2 to N of each window, from 1 to
N - 1 tokens of context (a BOS token not counted). The contexts are cut into bins of equal width; each number is the
mean over a bin's positions and all windows, its standard error that of the windows' means, windows being independent
samples.

Shape letters: w windows, N tokens in a window, t = N (or N + 1 with BOS).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, pick_device
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.evaluation.agreement import PositionScores, compare_windows
from mha2mla_megatron.evaluation.cache import cache_bytes_per_token
from mha2mla_megatron.evaluation.means import Mean, mean
from mha2mla_megatron.evaluation.perplexity import (
    DTYPES,
    PerplexitySettings,
    check_config,
    check_windows,
    cut_windows,
    read_config,
)
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.settings import to_dict


@dataclass(frozen=True)
class CompareSettings:
    """Settings of tools/compare_models.py."""

    window: int = 1024
    """N, tokens in a window."""

    max_windows: int | None = 32
    """Use only the first so many windows of the text. null: all of them."""

    bins: int = 8
    """Ranges of positions, of equal width, in the table and the picture; at most N - 1."""

    batch_size: int = 1
    """Windows in a forward pass."""

    dtype: str = "float32"
    """Type that both models run in: float32, bfloat16 or auto (as stored). All that is compared is float32."""

    device: str = "auto"
    """Where the models run, both at once: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""

    bos: bool | None = None
    """true: put the tokenizer's BOS token before each window."""

    output: str | None = None
    """A .json file for the results; the picture gets the same name with .png. Both are replaced if they exist."""

    def __post_init__(self) -> None:
        check_windows(self.window, self.max_windows, self.batch_size, self.dtype, self.device)
        require_at_least("bins", self.bins, 1)
        if self.bins > self.window - 1:
            raise UserError(f"bins: {self.bins} are more than the {self.window - 1} positions of window={self.window}")
        if self.output is not None and not self.output.endswith(".json"):
            raise UserError(f"output: '{self.output}' must end in .json; the picture gets the same name with .png")


@dataclass(frozen=True)
class Bin:
    """Means over some positions of all windows. Nats are per predicted token."""

    first: int
    """Tokens of context at the first position of the bin."""

    last: int

    kl: Mean
    """KL(A || B) of the next-token distributions, nats."""

    top1: Mean
    """The part of the positions at which both have the same most likely token."""

    logit_error: Mean
    """Root mean square, over the vocabulary, of the difference of the logits."""

    nll_a: Mean
    """Negative log-likelihood under A, nats."""

    nll_b: Mean

    nll_difference: Mean
    """B - A, paired: its error is that of the windows' differences."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was found."""

    a: str
    b: str
    windows: int
    whole: Bin
    """All positions."""

    bins: list[Bin]
    cache_bytes_per_token: tuple[float, float]
    """Of A and of B."""


def compare_models(a: str, b: str, text: Path, settings: CompareSettings) -> Comparison:
    """Compare two models (folders or hub ids) of one vocabulary on a text file or the `text` fields of a .jsonl[.gz].

    Converted models run the code in their folders. Writes `settings.output` and the picture if that is set. Raises
    UserError for bad input; what can be found without reading weights is found before any are read.
    """
    outputs = []
    if settings.output is not None:
        outputs = [Path(settings.output).with_suffix(".png"), Path(settings.output)]
    with new_files(outputs, overwrite=True) as scratch:
        content = read_text(text)
        names = {"A": a, "B": b}
        folders = {label: resolve_model(name) for label, name in names.items()}
        sizes = {label: read_config(names[label], folder).vocab_size for label, folder in folders.items()}
        if sizes["A"] != sizes["B"]:
            raise UserError(f"{b}: vocab_size {sizes['B']}, but {a} has {sizes['A']}; logits need one vocabulary")
        run = PerplexitySettings(
            window=settings.window, max_windows=settings.max_windows, dtype=settings.dtype, bos=settings.bos
        )
        windows = cut_windows(content, {f"{label} ({names[label]})": folders[label] for label in names}, text, run)
        for label, folder in folders.items():
            check_config(names[label], folder, windows, run)
        device = pick_device(settings.device)
        models = [load_causal_lm(names[label], folders[label], DTYPES[settings.dtype], device) for label in names]
        scores = [
            _finite(one, names) for one in compare_windows(models[0], models[1], windows, settings.batch_size)
        ]  # numbers by position, not logits: 6 (N - 1) a window
        edges = torch.linspace(1, settings.window, settings.bins + 1).round().long().tolist()
        found = Comparison(
            a=a,
            b=b,
            windows=len(windows),
            whole=_bin(scores, settings.window, 1, settings.window),
            bins=[_bin(scores, settings.window, *pair) for pair in itertools.pairwise(edges)],
            cache_bytes_per_token=(cache_bytes_per_token(models[0]), cache_bytes_per_token(models[1])),
        )
        if scratch:
            picture, file = scratch
            draw(found, picture)
            report = {
                **dataclasses.asdict(found, dict_factory=_named),
                "text": str(text),
                "text_sha256": hashlib.sha256(content.encode("utf-8")).hexdigest(),
                "settings": to_dict(settings),
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            }
            write_json(file, report)
    return found


def format_comparison(found: Comparison) -> str:
    """The bins and the whole as an aligned table, and what each caches."""

    def cell(value: Mean, form: str) -> str:
        return f"{value.value:{form}}" + ("" if value.error is None else f" ± {value.error:{form.lstrip('+')}}")

    rows = [
        (
            name,
            cell(one.kl, ".4f"),
            cell(one.top1, ".4f"),
            cell(one.logit_error, ".4f"),
            f"{one.nll_a.value:.4f}",
            f"{one.nll_b.value:.4f}",
            cell(one.nll_difference, "+.4f"),
        )
        for name, one in [*((f"{one.first}-{one.last}", one) for one in found.bins), ("all", found.whole)]
    ]
    header = ("context", "KL(A||B), nats", "same top-1", "logit error", "A, nats", "B, nats", "B - A, nats")
    caches = [
        f"{label}  {name}: {size:.12g} cache bytes/token"
        for label, name, size in zip("AB", (found.a, found.b), found.cache_bytes_per_token, strict=True)
    ]
    return "\n".join([*caches, f"{found.windows} windows", "", format_table(header, rows)])


def draw(found: Comparison, file: Path) -> None:
    """The four curves by position, with bars of one standard error, as PNG."""
    from matplotlib.figure import Figure

    panels = {
        "KL(A || B), nats": [("", lambda one: one.kl)],
        "same most likely token": [("", lambda one: one.top1)],
        "logit error (root mean square)": [("", lambda one: one.logit_error)],
        "negative log-likelihood, nats": [("A", lambda one: one.nll_a), ("B", lambda one: one.nll_b)],
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    places = [(one.first + one.last) / 2 for one in found.bins]
    for axes, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for label, get in lines:
            means = [get(one) for one in found.bins]
            axes.errorbar(
                places, [m.value for m in means], [m.error or 0 for m in means], marker=".", capsize=2, label=label
            )
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
        axes.set_xlabel("tokens of context")
    figure.suptitle(f"A: {found.a}\nB: {found.b}", fontsize="medium")
    figure.savefig(file, dpi=120, format="png")


def _bin(scores: Sequence[PositionScores], window: int, start: int, stop: int) -> Bin:
    """Over contexts of start to stop - 1 tokens."""

    def over(rows: Sequence[torch.Tensor]) -> Mean:
        """rows: [t - 1] of each window, or [t]; with BOS the first place is not a context of the text's tokens."""
        return mean([row[start - 1 : stop - 1].mean().item() for row in rows])

    # The window's last N - 1 predictions: places t - N to t - 2.
    skip = len(scores[0].kl) - window
    kl, top1, logit = ([getattr(one, key)[skip:-1] for one in scores] for key in ("kl", "same_top1", "logit_rms"))
    nll_a, nll_b = ([one.nll[side, skip:] for one in scores] for side in (0, 1))
    apart = [b - a for a, b in zip(nll_a, nll_b, strict=True)]
    return Bin(start, stop - 1, *map(over, (kl, top1, logit, nll_a, nll_b, apart)))


def _finite(scores: PositionScores, names: dict[str, str]) -> PositionScores:
    for name, nll in zip(names.values(), scores.nll, strict=True):
        if not nll.isfinite().all():
            raise UserError(f"{name}: gives log-likelihoods that are not finite")
    if not scores.kl.isfinite().all():
        raise UserError(f"{names['A']} and {names['B']}: their KL divergence is not finite")
    return scores


def _named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass as a dict, its means as {value, error}."""
    return {key: value._asdict() if isinstance(value, Mean) else value for key, value in pairs}
