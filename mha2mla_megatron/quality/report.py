"""The quality table as Markdown, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mha2mla_megatron.evaluation.comparison import Cell, Run, compare
from mha2mla_megatron.evaluation.table import format_markdown
from mha2mla_megatron.quality.settings import KINDS
from mha2mla_megatron.training.run_picture import picture_label

Results = Sequence[dict[str, Any]]
"""Of each line of the table, what `Quality.results` has."""


def markdown(results: Results) -> str:
    """A line a model: perplexities with standard errors and as multiples of the reference's, accuracies (acc_norm, %)
    with standard errors and paired differences to the reference. The reference is the fine-tuned original where there
    is one, else the original."""
    shown = [found for found in results if found["texts"] or found["tasks"]]
    if not shown:
        return "No results yet."
    reference = _reference(shown)
    texts = list(dict.fromkeys(name for found in shown for name in found["texts"]))
    tasks = list(dict.fromkeys(name for found in shown for name in found["tasks"]))
    runs = [_run(found) for found in (reference, *(found for found in shown if found is not reference))]
    cells = compare(runs) if tasks else {}
    columns = {run.name: number for number, run in enumerate(runs)}
    rows = []
    for found in shown:
        row = [found["name"], f"{100 * found['cache_fraction']:.2f}", f"{found['tokens'] / 1e6:.4g}"]
        row += [_perplexity(found, reference, text) for text in texts]
        row += [_accuracy(cells[task][columns[found["name"]]]) for task in tasks]
        rows.append(row)
    named = {file: values["task"] for found in shown for file, values in found["tasks"].items()}
    titles = [named[t] if list(named.values()).count(named[t]) == 1 else t for t in tasks]
    header = [
        "model",
        "cache, %",
        "tokens, M",
        *(f"perplexity, {text}" for text in texts),
        *(f"{t}, %" for t in titles),
    ]
    devices = ", ".join(sorted({found["device"] for found in shown}))
    note = f"x: times the perplexity of '{reference['name']}'; in brackets: paired differences to it. On {devices}."
    return f"{format_markdown(header, rows)}\n\n{note}"


def draw(results: Results, file: Path) -> None:
    """Perplexity of the first text against cache, and of the validation samples against tokens, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    text = next((name for found in results for name in found["texts"]), None)
    styles = dict(zip(KINDS, (":", "-", "--"), strict=True))
    series = list(dict.fromkeys(found["series"] for found in results))
    for found in results:
        if found["row"] == "original" and text in found["texts"]:
            value = found["texts"][text]["perplexity"]
            left.axhline(value, color="black", linestyle=styles[found["kind"]], label=picture_label(found["name"]))
    for number, name in enumerate(name for name in series if name != "original"):
        for kind, style in styles.items():
            points = sorted(
                (100 * found["cache_fraction"], found["texts"][text]["perplexity"])
                for found in results
                if found["series"] == name and found["kind"] == kind and text in found["texts"]
            )
            if points:
                label = name if kind == KINDS[0] else f"{name}, {kind}"
                colour = f"C{number % 10}"
                left.plot(*zip(*points, strict=True), style, color=colour, marker="o", label=picture_label(label))
    for number, found in enumerate(found for found in results if found.get("curves")):
        curve = found["curves"]["validation_loss"] or found["curves"]["loss"]
        if curve:
            tokens, losses = zip(*curve, strict=True)
            perplexities = [math.exp(min(loss, 700)) for loss in losses]
            style = styles[found["kind"]]
            label = picture_label(found["name"])
            right.plot([t / 1e6 for t in tokens], perplexities, style, color=f"C{number % 10}", label=label)
    left.set(xlabel="cache, % of the original's", ylabel=f"perplexity, {picture_label(str(text))}", yscale="log")
    right.set(xlabel="tokens of fine-tuning, millions", ylabel="perplexity, validation samples", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=130, format="png")


def _reference(results: Results) -> dict[str, Any]:
    trained = [found for found in results if found["row"] == "original" and found["kind"] == KINDS[1]]
    return (trained or list(results))[0]


def _perplexity(found: dict[str, Any], reference: dict[str, Any], text: str) -> str:
    if text not in found["texts"]:
        return "-"
    values = found["texts"][text]
    error = values["perplexity_standard_error"]
    shown = f"{values['perplexity']:.4g}" + ("" if error is None else f" ± {error:.2g}")
    if text in reference["texts"] and found is not reference:
        shown += f" (x {values['perplexity'] / reference['texts'][text]['perplexity']:.4f})"
    return shown


def _accuracy(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    shown = f"{cell.score.value:.2f}" + ("" if cell.score.error is None else f" ± {cell.score.error:.2f}")
    if cell.difference is not None:
        error = "" if cell.difference.error is None else f" ± {cell.difference.error:.2f}"
        shown += f" ({cell.difference.value:+.2f}{error})"
    return shown


def _run(found: dict[str, Any]) -> Run:
    return Run(
        found["name"],
        {
            file: {(values["file_sha256"], row): 100.0 * int(right) for row, right in enumerate(values["right_norm"])}
            for file, values in found["tasks"].items()
        },
    )
