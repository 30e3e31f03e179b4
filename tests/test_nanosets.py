"""Nanosets as inputs of tools/preprocess_data.py: files in datatrove's layout, written here by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mha2mla_megatron.data import nanosets
from mha2mla_megatron.data.dataset import check_data
from tests.conftest import make_tokenizer, refused, run_tool

EOS, VOCABULARY = 2, 256
DOCUMENTS = [[5, 6, EOS], [7] * 40 + [EOS], [8, 9], [255, EOS, 10, EOS], [11, 12, 13]]
"""Two of them do not end with an eos token, one has another inside."""
ENDED = [[5, 6, EOS], [7] * 40 + [EOS], [8, 9, EOS], [255, EOS, 10, EOS], [11, 12, 13, EOS]]
SPLIT = [[5, 6, EOS], [7] * 40 + [EOS], [8, 9, 255, EOS], [10, EOS], [11, 12, 13, EOS]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer", VOCABULARY)


def write(
    file: Path, documents: list[list[int]], width: int = 2, index: bool = True, metadata: str | None = "gpt2"
) -> Path:
    tokens = [token for document in documents for token in document]
    file.write_bytes(struct.pack(f"<{len(tokens)}{'H' if width == 2 else 'I'}", *tokens))
    ends = [sum(map(len, documents[: n + 1])) for n in range(len(documents))]
    if index:
        Path(f"{file}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata is not None:
        Path(f"{file}.metadata").write_text(f"{metadata}|{width}\n{len(tokens)}\n{len(tokens)} T")
    return file


def read(prefix: Path) -> list[list[int]]:
    check_data("data", str(prefix), VOCABULARY, eod=EOS)
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("width", "index", "metadata"),
    [
        (2, True, "owner/name|of|a tokenizer"), (2, True, None), (2, False, "gpt2"), (2, False, None),
        (4, True, "gpt2"), (4, True, None), (4, False, "gpt2"),
    ],
)  # fmt: skip
def test_documents_are_those_of_the_files(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, width: int, index: bool, metadata: str | None
) -> None:
    """Read in pieces that cut documents in two; two files, the second one without anything beside it."""
    monkeypatch.setattr(nanosets, "TOKENS", 7)
    monkeypatch.setattr(nanosets, "DOCUMENTS", 2)
    first = write(tmp_path / "a.ds", DOCUMENTS, width, index, metadata)
    second = write(tmp_path / "b.ds", [[3, EOS]], index=False, metadata=None)
    done = run_tool("preprocess_data", first, second, tmp_path / "out" / "c", f"tokenizer={tokenizer}")
    expected = [*(ENDED if index else SPLIT), [3, EOS]]
    assert read(tmp_path / "out" / "c") == expected
    tokens = sum(map(len, expected))
    assert done.stdout == f"{tmp_path / 'out' / 'c'}: {tokens} tokens (uint16) of 6 documents\n"
    report = json.loads((tmp_path / "out" / "c.json").read_text())
    assert report["inputs"] == [{"file": str(f), "bytes": f.stat().st_size} for f in (first, second)]


def test_empty_documents_and_most_tokens(tmp_path: Path, tokenizer: Path) -> None:
    file = write(tmp_path / "a.ds", [[], *DOCUMENTS, []])
    words = (file, tmp_path / "c", f"tokenizer={tokenizer}")
    run_tool("preprocess_data", *words)
    assert read(tmp_path / "c") == ENDED
    assert json.loads((tmp_path / "c.json").read_text())["blank_documents_left_out"] == 2
    run_tool("preprocess_data", *words, "max_tokens=4", "overwrite=true")
    assert read(tmp_path / "c") == ENDED[:2]
    run_tool("preprocess_data", *words, "append_eod=false", "overwrite=true")
    dataset: Any = IndexedDataset(str(tmp_path / "c"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS


BAD = {
    "missing": ("a.ds", None, [], "a.ds: no such file"),
    "index": ("a.ds.index", struct.pack("<2Q", 4, 3), [], "a.ds.index: damaged"),
    "odd index": ("a.ds.index", b"123", [], "a.ds.index: damaged"),
    "short index": ("a.ds.index", struct.pack("<Q", 54), [], "a.ds: 106 bytes; "),
    "metadata": ("a.ds.metadata", b"gpt2\n53", [], "a.ds.metadata: damaged"),
    "width": ("a.ds.metadata", b"gpt2|8\n53", [], "tokens of 8 bytes; valid: 2, 4"),
    "count": ("a.ds.metadata", b"gpt2|2\n54", [], "a.ds.metadata says 54 tokens, of 2 bytes each"),
    "vocabulary": ("a.ds", struct.pack("<53H", *[3] * 52, 256), [], "a.ds: token 52 is id 256, beyond the vocab"),
    "loss": ("a.ds.loss", b"\1" * 53, [], "a.ds.loss: a mask of the loss"),
    "bos": ("a.ds.x", b"", ["prepend_bos=true"], "prepend_bos: not possible with "),
    "text": ("a.txt", b"text", ["{tmp}/a.txt"], "a.ds: holds tokens, other inputs text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path: Path, tokenizer: Path, case: str) -> None:
    name, data, words, message = BAD[case]
    file = write(tmp_path / "a.ds", DOCUMENTS)
    if data is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(data)
    inputs = [file, *(word.format(tmp=tmp_path) for word in words if "=" not in word)]
    line = refused(
        "preprocess_data", *inputs, tmp_path / "c", f"tokenizer={tokenizer}", *(w for w in words if "=" in w)
    )
    assert message in line, line
    assert not list(tmp_path.glob("*c.*"))


def test_without_an_index_the_eos_token_is_needed(tmp_path: Path, tokenizer: Path) -> None:
    words = (tmp_path / "c", f"tokenizer={tokenizer}")
    file = write(tmp_path / "a.ds", DOCUMENTS, index=False)
    assert "a.ds.index" in refused("preprocess_data", file, *words, "append_eod=false")
    file.write_bytes(file.read_bytes() + b"\0")
    Path(f"{file}.metadata").unlink()
    assert "107 bytes are no whole number of tokens of 2 bytes" in refused("preprocess_data", file, *words)
    file.write_bytes(b"")
    assert "no text" in refused("preprocess_data", file, *words)
