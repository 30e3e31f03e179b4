"""Runs of one or several models side by side: what their caches take, scores, and differences to the first run from the
rows they share.

The standard error of a difference is that of the mean of the rows' differences: rows that are hard for one model are
mostly hard for the other, so it is smaller than the errors of the two scores suggest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.longbench.scores import AVERAGES
from mha2mla_megatron.evaluation.means import Mean, mean, weighted
from mha2mla_megatron.evaluation.table import format_markdown

COST, RATE = "cache bytes/token", "decode tokens/s"
"""What the table calls them."""

COST_FILE = "cost.json"
"""Beside lighteval's results."""

Scores = dict[Hashable, float]
"""What tells a row, the data included -> its score, from 0 to 100."""


@dataclass(frozen=True)
class Run:
    """One model on some tasks."""

    name: str

    scores: dict[str, Scores]
    """Task (and metric, where there are several) -> scores."""

    averages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Name -> the weights of tasks."""

    cache_bytes_per_token: float | None = None
    """None where the results do not say it, as the next."""

    decode_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Cell:
    """One run's score on a task or an average, and its difference to the first run's."""

    score: Mean

    difference: Mean | None
    """None for the first run, and where one of the two has no such score."""


def read_runs(source: Path) -> list[Run]:
    """The runs in a file of evaluate_choices.py, or in a folder of evaluate_longbench.py or of lighteval.

    Raises UserError for anything else, and for lighteval without details of the rows.
    """
    file = source / "results.json" if source.is_dir() else source
    try:
        if (source / "details").is_dir():
            runs = [_lighteval(source)]
        else:
            found = json.loads(file.read_text(encoding="utf-8"))
            runs = [_longbench(found)] if "averages" in found else [_choices(found, one) for one in found["results"]]
    except OSError as error:
        raise UserError(f"{source}: no results here ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{file}: not results of evaluate_choices.py, evaluate_longbench.py or lighteval (with --save-details)"
        ) from None
    if not runs or not all(rows for run in runs for rows in (run.scores, *run.scores.values())):
        raise UserError(f"{source}: holds no scores")
    return runs


def compare(runs: Sequence[Run]) -> dict[str, list[Cell | None]]:
    """Task or average -> a cell for each run, None where it has no such score.

    Raises UserError where a run scored other rows of a task than the first run.
    """
    table: dict[str, list[Cell | None]] = {}
    for number, run in enumerate(runs):
        means = {task: mean(list(scores.values())) for task, scores in run.scores.items()}
        apart = {
            task: mean(_differences(runs[0], run, task))
            for task in run.scores
            if run is not runs[0] and task in runs[0].scores
        }
        cells = {task: Cell(score, apart.get(task)) for task, score in means.items()}
        for name, weights in run.averages.items():
            average = weighted(means, weights)
            if average is not None:
                cells[name] = Cell(average, weighted(apart, weights))
        for name in cells:
            table.setdefault(name, [None] * len(runs))
        for name, cell in cells.items():
            table[name][number] = cell
    return table


def markdown(runs: Sequence[Run], table: Mapping[str, Sequence[Cell | None]]) -> str:
    """The table as Markdown."""
    return format_markdown(("", *(run.name for run in runs)), _rows(runs, table, "±", str))


def latex(runs: Sequence[Run], table: Mapping[str, Sequence[Cell | None]]) -> str:
    """The table as a LaTeX tabular."""

    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}

    def escape(text: str) -> str:
        return "".join(f"\\{letter}" if letter in "#$%&_{}" else words.get(letter, letter) for letter in text)

    lines = [
        f"\\begin{{tabular}}{{l{'r' * len(runs)}}}",
        " & ".join(("", *(escape(run.name) for run in runs))) + r" \\ \hline",
        *(" & ".join(row) + r" \\" for row in _rows(runs, table, r"$\pm$", escape)),
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def draw(runs: Sequence[Run], table: Mapping[str, Sequence[Cell | None]], file: Path) -> None:
    """Bars of all scores with their standard errors, as PNG; the legend says what the caches take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.25 * len(table) * (len(runs) + 0.5)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(runs)
    labels = [
        run.name if cost is None else f"{run.name}, {cost} {COST}"
        for run, cost in zip(runs, _of_first([run.cache_bytes_per_token for run in runs]), strict=True)
    ]
    for number, label in enumerate(labels):
        shown = [(place, row[number]) for place, row in enumerate(table.values())]
        bars = [(place + number * height, cell.score) for place, cell in shown if cell is not None]
        axes.barh(
            [place for place, _ in bars], [score.value for _, score in bars], height * 0.95, label=label,
            xerr=[score.error or 0 for _, score in bars],
        )  # fmt: skip
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(table))], list(table))
    axes.invert_yaxis()
    axes.set_xlabel("score, %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper left", fontsize="small")
    figure.savefig(file, dpi=130, format="png")


def _of_first(costs: Sequence[float | None], digits: int = 6) -> list[str | None]:
    """Each run's number and behind it its share of the first run's; None where not known."""
    shares = ["", *(f" ({100 * cost / costs[0]:.2f} %)" if cost and costs[0] else "" for cost in costs[1:])]
    return [None if cost is None else f"{cost:.{digits}g}{share}" for cost, share in zip(costs, shares, strict=True)]


def _rows(
    runs: Sequence[Run],
    table: Mapping[str, Sequence[Cell | None]],
    plus_minus: str,
    escape: Callable[[str], str],
) -> list[tuple[str, ...]]:
    def number(value: Mean, sign: str = "") -> str:
        error = "" if value.error is None else f" {plus_minus} {value.error:.2f}"
        return f"{value.value:{sign}.2f}{error}"

    def text(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        return number(cell.score) + (f" ({number(cell.difference, '+')})" if cell.difference is not None else "")

    costs = {
        COST: _of_first([run.cache_bytes_per_token for run in runs]),
        RATE: _of_first([run.decode_tokens_per_second for run in runs], 4),
    }
    return [
        *((name, *(escape(cost or "-") for cost in own)) for name, own in costs.items() if any(own)),
        *((escape(name), *map(text, cells)) for name, cells in table.items()),
    ]


def _differences(first: Run, other: Run, task: str) -> list[float]:
    """other - first, row by row."""
    before, now = first.scores[task], other.scores[task]
    if before.keys() != now.keys():
        raise UserError(
            f"{other.name}: {task}: {len(now)} rows, {len(before.keys() & now.keys())} of them among the {len(before)} "
            f"of {first.name}; a difference needs the same rows"
        )
    return [now[row] - before[row] for row in before]


def _longbench(found: dict[str, Any]) -> Run:
    scores: dict[str, Scores] = {
        task: {(entry["data_sha256"], number): float(value) for number, value in enumerate(entry["scores"])}
        for task, entry in found["tasks"].items()
    }
    cache = found["settings"]["cache"]
    rate = found.get("decode_tokens_per_second")
    return Run(found["model"] + (f" ({cache})" if cache else ""), scores, AVERAGES, _cost(found), rate)


def _choices(found: dict[str, Any], one: dict[str, Any]) -> Run:
    scores: dict[str, Scores] = {
        f"{one['task']} {metric}": {
            (found["file_sha256"], row): 100.0 * right for row, right in enumerate(one[f"right{metric[3:]}"])
        }
        for metric in ("acc", "acc_norm")
    }
    return Run(one["model"], scores, cache_bytes_per_token=_cost(one))


def _cost(found: dict[str, Any]) -> float | None:
    size = found.get("cache_bytes_per_token")
    return None if size is None else float(size)


def _lighteval(folder: Path) -> Run:
    """The newest details of each task; the model is the part of their path between details/ and the time."""
    import pyarrow.parquet

    newest: dict[str, Path] = {}
    for file in sorted((folder / "details").glob("**/details_*.parquet"), key=lambda file: file.parent.name):
        newest[file.name.removeprefix("details_").split("|")[0]] = file
    if not newest:
        raise UserError(f"{folder}: holds no details of rows; lighteval writes them with --save-details")
    scores: dict[str, Scores] = {}
    for task, file in sorted(newest.items()):
        try:
            for row in pyarrow.parquet.read_table(file, columns=["doc", "metric"]).to_pylist():
                for metric, value in row["metric"].items():
                    scores.setdefault(f"{task} {metric}", {})[row["doc"]["id"], row["doc"]["query"]] = 100.0 * value
        except (ValueError, KeyError, TypeError, AttributeError):  # pyarrow's errors are ValueErrors
            raise UserError(f"{file}: not details of lighteval 0.13") from None
    headline = [name for name in scores if not name.endswith(" acc")]
    model = next(iter(newest.values())).parent.parent.relative_to(folder / "details")
    averages = {f"Average of {len(headline)}": {name: 1 / len(headline) for name in headline}} if headline else {}
    return Run(str(model).removeprefix("models/"), scores, averages, _lighteval_cost(folder))


def _lighteval_cost(folder: Path) -> float | None:
    """None for a run of lighteval by itself."""
    file = folder / COST_FILE
    if not file.exists():
        return None
    try:
        return _cost(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: not written by evaluate_lighteval.py") from None
