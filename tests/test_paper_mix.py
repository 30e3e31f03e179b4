"""examples/data: the paper's mix, on local folders laid out as those of the hub."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mha2mla_megatron import errors
from tests.conftest import PROSE, ROOT, load_script, make_tokenizer

MIX = ROOT / "examples" / "data" / "paper_mix.yaml"
PAPER = {
    "fineweb-edu-dedup": 0.70, "cosmopedia-v2": 0.15, "python-edu": 0.08, "open-web-math": 0.06,
    "stackoverflow-clean": 0.01,
}  # fmt: skip


def prepare(*words: object) -> None:
    errors.run_tool(load_script(ROOT / "examples" / "data" / "prepare.py").main, [str(word) for word in words])


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The mix with local folders in the place of hub ids: the same subsets, splits and columns."""
    make_tokenizer(tmp_path / "tokenizer")
    mix: dict[str, Any] = yaml.safe_load(MIX.read_text())
    chance = random.Random(0)
    for name, source in mix["sources"].items():
        folder = tmp_path / "hub" / source["dataset"]
        subset = source.get("subset", "data")
        (folder / subset).mkdir(parents=True)
        texts = ["".join(chance.choices(PROSE, k=chance.randint(1, 9))) for _ in range(400)]
        table = pyarrow.table({"id": [f"{name}-{i}" for i in range(400)], source.get("text_key", "text"): texts})
        pyarrow.parquet.write_table(table, folder / subset / "train-00000-of-00001.parquet")
        configs = [
            {"config_name": found.name, "data_files": [{"split": "train", "path": f"{found.name}/train-*"}]}
            for found in sorted(folder.iterdir())
            if found.is_dir()
        ]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        source["dataset"] = str(folder)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix, sort_keys=False))
    return tmp_path


def test_the_mix_is_the_papers() -> None:
    sources = yaml.safe_load(MIX.read_text())["sources"]
    assert {name: source["weight"] for name, source in sources.items()} == PAPER


def test_each_source_gives_its_share(local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (local / "mix.yaml", local / "out", f"tokenizer={local / 'tokenizer'}", "tokens=20000", "workers=1")
    prepare(*words)
    for name, weight in PAPER.items():
        found = json.loads((local / "out" / f"{name}.json").read_text())
        share = 1.01 * weight * 20000
        assert share <= found["tokens"] <= share + 9 * max(map(len, PROSE))  # and the rest of its last document
    blend = yaml.safe_load((local / "out" / "blend.yaml").read_text())
    assert blend == {"data": {"train": {str(local / "out" / name): weight for name, weight in PAPER.items()}}}
    before = {file: file.stat().st_mtime_ns for file in (local / "out").glob("*.bin")}
    capsys.readouterr()
    prepare(*words)
    assert capsys.readouterr().out.count("kept") == 5
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize(
    "change", [{}, {"document_separator": "newline"}, {"append_eod": False}, {"text": "new"}], ids=str
)
def test_a_source_that_is_a_file_is_kept_as_long_as_it_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "prose.txt").write_text("\n".join(PROSE))
    source = {"weight": 1.0, "dataset": str(tmp_path / "prose.txt")}
    words = (tmp_path / "mix.yaml", tmp_path / "out", f"tokenizer={tmp_path / 'tokenizer'}", "tokens=100", "workers=1")
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": {"prose": source}}))
    prepare(*words)
    capsys.readouterr()
    if "text" in change:
        (tmp_path / "prose.txt").write_text(change.pop("text"))
        changed = True
    else:
        changed = bool(change)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": {"prose": {**source, **change}}}))
    if not changed:
        prepare(*words)
        assert "prose: kept, " in capsys.readouterr().out
        (tmp_path / "out" / "prose.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        prepare(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and ("made of another text or with other settings" in error) == changed, error
    assert changed or "prose.json: cannot be read as JSON" in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": 0.2}, ["sources", "1.12"]),
        ({"colum": "x"}, ["python-edu", "colum"]),
        ({"dataset": None}, ["python-edu", "dataset"]),
        ({"text_key": "text"}, ["'text'", "'content'"]),
    ],
    ids=["sum", "key", "dataset", "column"],
)
def test_bad_mixes_are_refused(
    local: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: list[str]
) -> None:
    mix = yaml.safe_load((local / "mix.yaml").read_text())
    mix["sources"]["python-edu"] |= change
    if change.get("dataset", "") is None:
        del mix["sources"]["python-edu"]["dataset"]
    (local / "mix.yaml").write_text(yaml.safe_dump(mix, sort_keys=False))
    with pytest.raises(SystemExit) as end:
        prepare(local / "mix.yaml", local / "out", f"tokenizer={local / 'tokenizer'}", "tokens=2000", "workers=1")
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(line) == 1 and all(part in line[0] for part in named), line
