"""tools/results_table.py: means, standard errors and paired differences of runs, against a calculation by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.test_evaluate_choices import PIQA, write


def longbench(
    folder: Path,
    model: str,
    scores: dict[str, list[float]],
    data: str = "d",
    cost: float | None = None,
    rate: float | None = None,
) -> Path:
    """What evaluate_longbench.py leaves, as far as the table reads it."""
    folder.mkdir()
    tasks = {task: {"data_sha256": data, "scores": values} for task, values in scores.items()}
    results: dict[str, Any] = {"model": model, "settings": {"cache": None}, "tasks": tasks, "averages": {}}
    results |= {} if cost is None else {"cache_bytes_per_token": cost, "decode_tokens_per_second": rate}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def details(folder: Path, time: str, task: str, values: list[dict[str, Any]]) -> Path:
    """Details as lighteval 0.13 writes them."""
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = [
        {"doc": {"id": str(row), "query": f"q{row}", "choices": ["x"]}, "metric": value, "model_response": {"text": []}}
        for row, value in enumerate(values)
    ]
    file = folder / "details" / "some" / "model" / time / f"details_{task}|0_{time}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return folder


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def test_longbench_runs_by_hand(tmp_path: Path) -> None:
    """Differences are paired: their error is that of the rows' differences, also in the average of a group."""
    first = {"lcc": [10.0, 50.0, 90.0], "repobench-p": [0.0, 40.0], "trec": [100.0]}
    other = {"lcc": [12.0, 51.0, 93.0], "repobench-p": [5.0, 41.0], "trec": [0.0]}
    a, b = longbench(tmp_path / "a", "orig_1", first), longbench(tmp_path / "b", "mla", other)
    done = run_tool("results_table", a, b, f"latex={tmp_path / 't.tex'}", f"png={tmp_path / 't.png'}")
    found = cells(done.stdout)
    assert found[""] == ["orig_1", "mla"]
    assert found["lcc"] == [
        f"50.00 ± {error(first['lcc']):.2f}",
        f"52.00 ± {error(other['lcc']):.2f} (+2.00 ± {error([2, 1, 3]):.2f})",
    ]
    assert found["trec"] == ["100.00", "0.00 (-100.00)"]
    spread = (error([2, 1, 3]) ** 2 + error([5, 1]) ** 2) ** 0.5 / 2
    own = (error(other["lcc"]) ** 2 + error(other["repobench-p"]) ** 2) ** 0.5 / 2
    assert found["Code completion (en)"][1] == f"37.50 ± {own:.2f} (+2.50 ± {spread:.2f})"
    assert "Average of all 21 tasks" not in found  # most are missing
    text = (tmp_path / "t.tex").read_text()
    assert r" & orig\_1 & mla \\ \hline" in text and r"50.00 $\pm$ " in text
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert cells(run_tool("results_table", a, b, "names=[x, y]").stdout)[""] == ["x", "y"]


def test_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes a token and their share of the first run's, in all three forms; from all three tools' results. Decoded
    tokens a second, from LongBench's."""
    from matplotlib.figure import Figure

    labels: list[str] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, file, **_: labels.extend(self.axes[0].get_legend_handles_labels()[1])
    )
    scores = {"lcc": [1.0, 2.0]}
    a = longbench(tmp_path / "a", "orig", scores, cost=46080.0, rate=304.26)
    b = longbench(tmp_path / "b", "mla", scores, cost=14400, rate=1234.56)
    c, old = longbench(tmp_path / "c", "int4", scores, cost=4233.625), longbench(tmp_path / "old", "old", scores)
    words = [f"latex={tmp_path / 't.tex'}", f"png={tmp_path / 't.png'}"]
    done = run_tool("results_table", a, b, c, old, *words)
    assert cells(done.stdout)["cache bytes/token"] == ["46080", "14400 (31.25 %)", "4233.62 (9.19 %)", "-"]
    assert done.stdout.splitlines()[2].startswith("| cache bytes/token |")
    assert done.stdout.splitlines()[3] == "| decode tokens/s | 304.3 | 1235 (405.76 %) | - | - |"
    assert (
        r"cache bytes/token & 46080 & 14400 (31.25 \%) & 4233.62 (9.19 \%) & - \\" in (tmp_path / "t.tex").read_text()
    )
    assert labels == [
        "orig, 46080 cache bytes/token",
        "mla, 14400 (31.25 %) cache bytes/token",
        "int4, 4233.62 (9.19 %) cache bytes/token",
        "old",
    ]
    assert cells(run_tool("results_table", old, a).stdout)["cache bytes/token"] == ["-", "46080"]
    assert {"cache bytes/token", "decode tokens/s"}.isdisjoint(cells(run_tool("results_table", old).stdout))

    run = details(tmp_path / "lighteval", "2026", "piqa_cf", [{"acc": 1}])
    (run / "cost.json").write_text('{"cache_bytes_per_token": 768.0}')
    assert cells(run_tool("results_table", run).stdout)["cache bytes/token"] == ["768"]
    for wrong in ("{", "[]", '{"cache_bytes_per_token": "x"}'):
        (run / "cost.json").write_text(wrong)
        assert "cost.json: not written by evaluate_lighteval.py" in refused("results_table", run)
    (a / "results.json").write_text((a / "results.json").read_text().replace("46080.0", "[]"))
    assert "not results of evaluate_choices.py" in refused("results_table", a)


def test_choices_runs(tmp_path: Path) -> None:
    """Two models of one file of evaluate_choices.py."""
    models = [make_tokenizer(make_llama(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    run_tool("evaluate_choices", *models, write(tmp_path / "p.jsonl", PIQA), f"output={tmp_path / 'out.json'}")
    first, other = json.loads((tmp_path / "out.json").read_text())["results"]
    found = cells(run_tool("results_table", tmp_path / "out.json").stdout)
    assert found["cache bytes/token"] == ["768", "768 (100.00 %)"]  # float32: 3 layers of 2 groups of two times 16
    for metric, rows in (("acc", "right"), ("acc_norm", "right_norm")):
        change = [100 * (now - before) for before, now in zip(first[rows], other[rows], strict=True)]
        assert first[metric] == pytest.approx(mean(first[rows]))
        assert found[f"piqa {metric}"] == [
            f"{100 * first[metric]:.2f} ± {100 * first[f'{metric}_standard_error']:.2f}",
            f"{100 * other[metric]:.2f} ± {100 * other[f'{metric}_standard_error']:.2f} "
            f"({mean(change):+.2f} ± {error(change):.2f})",
        ]


def test_lighteval_runs(tmp_path: Path) -> None:
    """The newest details of a task, rows told apart by number and query."""
    a, b = tmp_path / "a", tmp_path / "b"
    details(a, "2026-01-01T00-00-00.0", "piqa_cf", [{"acc": 0, "acc_norm": 0}] * 3)
    details(a, "2026-01-02T00-00-00.0", "piqa_cf", [{"acc": 1, "acc_norm": 0}, {"acc": 0, "acc_norm": 1}] * 2)
    details(a, "2026-01-02T00-00-00.0", "triviaqa_em", [{"em": 1}, {"em": 0}])
    details(b, "2026-01-03T00-00-00.0", "piqa_cf", [{"acc": 1, "acc_norm": 1}, {"acc": 0, "acc_norm": 1}] * 2)
    found = cells(run_tool("results_table", a, b).stdout)
    assert found[""] == ["some/model", "some/model"]
    assert found["piqa_cf acc_norm"] == [
        f"50.00 ± {error([0, 100] * 2):.2f}",
        f"100.00 ± 0.00 (+50.00 ± {error([100, 0] * 2):.2f})",
    ]
    assert found["triviaqa_em em"] == [f"50.00 ± {error([100, 0]):.2f}", "-"]
    assert found["Average of 2"][0].startswith("50.00 ± ") and found["Average of 1"][1].startswith("100.00")


def test_names_in_latex(tmp_path: Path) -> None:
    run_tool("results_table", longbench(tmp_path / "a", "m", {"lcc": [1.0]}), r"names=['~a^b\c']",
             f"latex={tmp_path / 't.tex'}")  # fmt: skip
    assert r" & \textasciitilde{}a\textasciicircum{}b\textbackslash{}c \\" in (tmp_path / "t.tex").read_text()


def test_no_average_of_acc_alone(tmp_path: Path) -> None:
    found = cells(run_tool("results_table", details(tmp_path, "2026", "piqa_cf", [{"acc": 1}])).stdout)
    assert list(found) == ["", "---", "piqa_cf acc"]


def test_refusals(tmp_path: Path) -> None:
    a = longbench(tmp_path / "a", "orig", {"lcc": [1.0, 2.0]})
    b = longbench(tmp_path / "b", "mla", {"lcc": [1.0, 2.0, 3.0]})
    c = longbench(tmp_path / "c", "mla", {"lcc": [1.0, 2.0]}, data="other")
    assert "mla: lcc: 3 rows, 2 of them among the 2 of orig; a difference needs the same rows" in refused(
        "results_table", a, b
    )
    assert "mla: lcc: 2 rows, 0 of them" in refused("results_table", a, c)
    assert "names: 1 names for 2 runs" in refused("results_table", a, a, "names=[x]")
    assert "no results here" in refused("results_table", tmp_path / "none")
    (tmp_path / "x.json").write_text('{"results": [{"perplexity": 3}]}')
    assert "x.json: not results of evaluate_choices.py" in refused("results_table", tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"results": []}')
    for empty in (tmp_path / "x.json", longbench(tmp_path / "e", "m", {}), longbench(tmp_path / "f", "m", {"lcc": []})):
        assert f"{empty}: holds no scores" in refused("results_table", empty)
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert "x.json: not results of" in refused("results_table", tmp_path / "x.json")
    for number, rows in enumerate(([{"acc": None}], [{"acc": "x"}])):
        wrong = details(tmp_path / f"wrong{number}", "2026", "piqa_cf", rows)
        assert "details_piqa_cf|0_2026.parquet: not details of lighteval" in refused("results_table", wrong)
    next(wrong.glob("**/*.parquet")).write_bytes(b"cut short")
    assert "details_piqa_cf|0_2026.parquet: not details of lighteval" in refused("results_table", wrong)
    (tmp_path / "d" / "details").mkdir(parents=True)
    assert "holds no details of rows; lighteval writes them with --save-details" in refused(
        "results_table", tmp_path / "d"
    )
