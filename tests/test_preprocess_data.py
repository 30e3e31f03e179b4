"""tools/preprocess_data.py: the tokens are the tokenizer's, the files are Megatron's, and bad input is refused."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mha2mla_megatron.data import documents, inputs, workers
from mha2mla_megatron.data.dataset import check_data
from mha2mla_megatron.data.documents import DocumentReader
from tests.conftest import PROSE, make_tokenizer, refused, run_tool, start_cases

TEXTS = [PROSE[0], PROSE[1] + "\n\n" + PROSE[2], "a", PROSE[3] * 50, " leading and trailing \n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def tokens_of(tokenizer: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]


def write_json_lines(file: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(packed(data, file.suffix))
    return file


def packed(data: bytes, suffix: str) -> bytes:
    """Of .zst two frames, as parallel compressors write them."""
    if suffix == ".zst":
        return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:50], data[50:]))
    return gzip.compress(data, mtime=0) if suffix.lower() == ".gz" else data


def read_megatron(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1)), "one sequence a document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def read_by_hand(prefix: Path) -> list[list[int]]:
    """Megatron's format, from its description: header, dtype code, counts, lengths, byte offsets, document ends."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, ends = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    dtype = np.dtype({4: "<i4", 8: "<u2"}[code])
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, "<i8", ends, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * ends and documents.tolist() == list(range(sequences + 1))
    data = Path(f"{prefix}.bin").read_bytes()
    assert len(data) == lengths.sum() * dtype.itemsize
    return [np.frombuffer(data, dtype, n, at).tolist() for n, at in zip(lengths, offsets, strict=True)]


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.ndjson", "CORPUS.JSONL.GZ"]
)
def test_json_lines(tmp_path: Path, tokenizer: Path, tokens_of: Any, name: str) -> None:
    rows = [{"id": 1, "text": text} for text in TEXTS]
    source = write_json_lines(tmp_path / name, [*rows, {"text": ""}, {"text": " \n"}])
    done = run_tool("preprocess_data", source, tmp_path / "out" / "c", f"tokenizer={tokenizer}", "workers=2")
    expected = [[*tokens_of(text), 2] for text in TEXTS]
    assert read_megatron(tmp_path / "out" / "c") == read_by_hand(tmp_path / "out" / "c") == expected
    count = sum(map(len, expected))
    assert f"{count} tokens (uint16) of 5 documents" in done.stdout
    report = json.loads((tmp_path / "out" / "c.json").read_text())
    assert report["tokens"] == count and report["documents"] == 5 and report["blank_documents_left_out"] == 2
    assert report["vocab_size"] == 256 and report["dtype"] == "uint16"
    assert report["eod_id"] == 2 and report["bos_id"] is None
    assert report["tokenizer_json_sha256"] == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert report["inputs"] == [{"file": str(source), "bytes": source.stat().st_size}]
    assert sorted(os.listdir(tmp_path / "out")) == ["c.bin", "c.idx", "c.json"]


def test_as_a_user_runs_it(tmp_path: Path, tokenizer: Path, tokens_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command; its worker, which starts with the command's own imports, loads neither torch nor transformers."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # both processes print their imports on stderr
    source = write_json_lines(tmp_path / "corpus.jsonl", [{"body": PROSE[0]}])
    (tmp_path / "run.yaml").write_text(f"tokenizer: {tokenizer}\ntext_key: body\nworkers: 1\n")
    done = run_tool(
        "preprocess_data", source, tmp_path / "c", f"config={tmp_path}/run.yaml", "append_eod=false", own_process=True
    )
    assert read_megatron(tmp_path / "c") == [tokens_of(PROSE[0])]
    assert "tokens/s" in done.stderr and "MB/s" in done.stderr
    imported = re.findall(r"import time: +\d+ \| +\d+ \| +(\S+)", done.stderr)
    modules = ("mha2mla_megatron.data.workers", "tokenizers", "torch", "transformers")
    assert [imported.count(module) for module in modules] == [2, 2, 1, 1]


def test_workers_start_together(tmp_path: Path) -> None:
    out, err = start_cases("start_workers", 4, tmp_path).communicate()
    assert out == "4 workers\n", out + err


def test_plain_text(tmp_path: Path, tokenizer: Path, tokens_of: Any) -> None:
    text = "".join(PROSE[:2]) + "\r\n" + PROSE[2] + "\n \n\n" + PROSE[3] + "\n" + PROSE[4]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(PROSE[1].encode(), mtime=0))
    paragraphs, lines = ["".join(PROSE[:2]) + "\r\n" + PROSE[2], PROSE[3] + "\n" + PROSE[4]], text.splitlines()
    for separator, expected in (
        ("none", [text]),
        ("newline", [line for line in lines if line.strip()]),
        ("blank_line", paragraphs),
    ):
        run_tool(
            "preprocess_data", tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c", f"tokenizer={tokenizer}",
            f"document_separator={separator}", "prepend_bos=true", "workers=1", "overwrite=true",
        )  # fmt: skip
        assert read_megatron(tmp_path / "c") == [[1, *tokens_of(document), 2] for document in [*expected, PROSE[1]]]


def test_worker_count_changes_nothing(tmp_path: Path, tokenizer: Path) -> None:
    generator = random.Random(0)
    rows = [{"text": "".join(generator.choices(PROSE, k=generator.choice((1, 2, 100))))} for _ in range(150)]
    rows.insert(7, {"text": PROSE[4] * 8_000})  # one line of 0.8 MB among short ones
    source = write_json_lines(tmp_path / "corpus.jsonl", rows)
    files = []
    for count in (1, 3):
        out = tmp_path / f"{count}"
        run_tool("preprocess_data", source, source, out, f"tokenizer={tokenizer}", f"workers={count}")
        files.append([Path(f"{out}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")])
    assert files[0] == files[1]
    assert len(read_megatron(tmp_path / "3")) == 2 * len(rows)


def test_no_special_tokens_of_the_tokenizers_own(tmp_path: Path, tokenizer: Path, tokens_of: Any) -> None:
    """A tokenizer that adds BOS by itself, and truncates, does neither here; `<eos>` in the text is the token."""
    from tokenizers.processors import TemplateProcessing

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    loaded.backend_tokenizer.enable_truncation(4)
    PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer, eos_token="<eos>", bos_token="<bos>", model_max_length=4
    ).save_pretrained(tmp_path / "adds_bos")
    (tmp_path / "a.txt").write_text(PROSE[0] + "<eos>")
    run_tool("preprocess_data", tmp_path / "a.txt", tmp_path / "c", f"tokenizer={tmp_path / 'adds_bos'}", "workers=1")
    assert read_megatron(tmp_path / "c") == [[*tokens_of(PROSE[0]), 2, 2]]


def test_large_vocabulary_is_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(tmp_path / "big")
    (tmp_path / "a.txt").write_text("w69999 w3 w65536")
    run_tool("preprocess_data", tmp_path / "a.txt", tmp_path / "c", f"tokenizer={tmp_path / 'big'}", "workers=1")
    assert read_megatron(tmp_path / "c") == read_by_hand(tmp_path / "c") == [[69999, 3, 65536, 1]]
    assert json.loads((tmp_path / "c.json").read_text())["dtype"] == "int32"


def test_documents_do_not_depend_on_where_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    pieces = ["é", "word ", "\n", "\n\n", "\r\n", " \n", "x", "\n \t\n", "\u00a0\n", "\f"]
    for trial in range(60):
        text = "".join(generator.choices(pieces, k=60))
        file = tmp_path / f"{trial}.txt"
        file.write_bytes(text.encode())
        lines = text.removesuffix("\n").split("\n")
        expected = {
            "newline": [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()],
            "blank_line": [
                (text.count("\n", 0, match.start()) + 1, match.group().rstrip("\n").removesuffix("\r"))
                for match in re.finditer(r"(?:^(?=[^\n]*\S)[^\n]*\n?)+", text, re.MULTILINE)
            ],
        }
        for separator, wanted in expected.items():
            for size in (1, 5, 17, 1000):
                monkeypatch.setattr(documents, "BLOCK_BYTES", size)
                reader = DocumentReader([file], separator)
                found = [(d.line, d.text) for block in reader for d in block.documents() if d.text.strip()]
                assert found == wanted, (text, separator, size)
                assert reader.position == reader.size == len(text.encode())


ROW = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file"),
        ("a.json", b"[]", "a.json: plain text or JSON lines are needed"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n", "no text"),
        ("a.jsonl", b"\n", "no text"),
        ("a.txt", b"fine\nfine\xff\n", "a.txt: not valid UTF-8 at byte 9"),
        ("a.jsonl", ROW * 20_000 + b'{"text": "\xe9"}', "a.jsonl: not valid UTF-8 at byte 340010"),
        ("a.jsonl", ROW * 20_000 + b'{"text": "x}', "a.jsonl, line 20001: not valid JSON (Unterminated string"),
        ("a.jsonl", ROW + b"\n[1]", "a.jsonl, line 3: a JSON list, not an object"),
        ("a.jsonl", ROW + b'{"body": "x", "id": 1}', "a.jsonl, line 2: no 'text' field; it has: 'body', 'id'"),
        ("a.jsonl", ROW + b'{"text": 3}', "a.jsonl, line 2: 'text' is a int, not a string"),
        ("a.jsonl", ROW + b'{"text": "a\\ud800"}', "a.jsonl, line 2: 'text' has an unpaired surrogate at character 1"),
        ("a.jsonl.gz", ROW, "a.jsonl.gz: damaged gzip data"),
        ("a.txt.gz", gzip.compress(ROW * 9, mtime=0)[:-9], "a.txt.gz: damaged gzip data"),
        ("a.jsonl.zst", ROW, "a.jsonl.zst: damaged zstd data"),
        ("a.jsonl.zst", packed(ROW * 9, ".zst")[:-9], "a.jsonl.zst: damaged zstd data"),
        ("a.parquet", ROW, "a.parquet: cannot be read as parquet"),
        (
            "a.jsonl",
            ROW + b'{"text": "' + b"x" * 50_000_000 + b'"}\n',
            "a.jsonl, line 2: a document of more than 16 MB",
        ),
        ("a.txt", b"\n" + b"x" * 50_000_000, "a.txt, line 1: a document of more than 16 MB"),
    ],
)
def test_bad_input(tmp_path: Path, tokenizer: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    words = (tmp_path / name, tmp_path / "out" / "c", f"tokenizer={tokenizer}", "workers=1")
    assert message in refused("preprocess_data", *words)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def write_table(file: Path, texts: list[str | None], name: str = "text") -> Path:
    """Two row groups, and a column before the texts."""
    table = pyarrow.table({"id": list(range(len(texts))), name: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, file, row_group_size=max(1, len(texts) // 2))
    return file


def test_parquet(tmp_path: Path, tokenizer: Path, tokens_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "ROWS", 2)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 100)
    table = write_table(tmp_path / "a.parquet", [*TEXTS, "", " "], "body")
    lines = write_json_lines(tmp_path / "b.jsonl", [{"body": "é after"}])
    words = (table, lines, table, tmp_path / "c", f"tokenizer={tokenizer}", "text_key=body", "workers=1")
    run_tool("preprocess_data", *words)
    expected = [[*tokens_of(text), 2] for text in TEXTS]
    assert read_megatron(tmp_path / "c") == [*expected, [*tokens_of("é after"), 2], *expected]
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["blank_documents_left_out"] == 4
    assert report["inputs"][0] == {"file": str(table), "bytes": table.stat().st_size}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("layout", ["parquet", "jsonl.gz"])
def test_data_set_folder(tmp_path: Path, tokenizer: Path, tokens_of: Any, layout: str, streaming: bool) -> None:
    """A folder as the hub has them: a configuration in a folder of its own, and files of two splits."""
    folder = tmp_path / "set"
    (folder / "english").mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("test", ["held out"])):
        file = folder / "english" / f"{split}-00000.{layout}"
        if layout == "parquet":
            write_table(file, list(texts))
        else:
            write_json_lines(file, [{"id": 1, "text": text} for text in texts])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: english/train-*\n"
        "  - split: test\n    path: english/test-*\n---\n"
    )
    words = (folder, tmp_path / "c", f"tokenizer={tokenizer}", "subset=en", f"streaming={streaming}", "workers=1")
    run_tool("preprocess_data", *words)
    assert read_megatron(tmp_path / "c") == [[*tokens_of(text), 2] for text in TEXTS]
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["inputs"] == [{"dataset": str(folder), "subset": "en", "split": "train", "rows_read": len(TEXTS)}]
    run_tool("preprocess_data", *words, "split=test", "overwrite=true")
    assert read_megatron(tmp_path / "c") == [[*tokens_of("held out"), 2]]
    assert "set (subset en, split none): cannot be read" in refused(
        "preprocess_data", *words, "split=none", "overwrite=true"
    )
    assert "no 'body' column; it has: 'id', 'text'" in refused(
        "preprocess_data", *words, "text_key=body", "overwrite=true"
    )


def test_bad_tables(tmp_path: Path, tokenizer: Path) -> None:
    def line(texts: Any, *words: str) -> str:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        return refused("preprocess_data", tmp_path / "a.parquet", tmp_path / "c", f"tokenizer={tokenizer}", *words)

    assert "a.parquet: no 'body' column; it has: 'text'" in line(["a"], "text_key=body")
    assert "a.parquet, row 3: 'text' is null" in line(["a", "b", None])
    assert "a.parquet: 'text' is of type int64" in line([1, 2])
    assert "a.parquet, row 2: a document of more than 1 MB" in line(["a", "b" * 1_000_001], "max_document_mb=1")
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    assert "a.parquet, row 1: not valid UTF-8 at byte 1" in line(broken, "workers=1")
    assert not list(tmp_path.glob("c*"))
    assert "no such file" in refused("preprocess_data", "some/corpus.jsonl", tmp_path / "c", f"tokenizer={tokenizer}")


@pytest.mark.parametrize("count", [1, 2])
def test_max_tokens_ends_with_the_document_that_reaches_it(
    tmp_path: Path, tokenizer: Path, tokens_of: Any, count: int
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 300])
    expected = [[*tokens_of(text), 2] for text in TEXTS]
    wanted = sum(map(len, expected[:2])) - 1
    words = (source, tmp_path / "c", f"tokenizer={tokenizer}", f"workers={count}", f"max_tokens={wanted}")
    run_tool("preprocess_data", *words)
    assert read_megatron(tmp_path / "c") == expected[:2]


def test_bad_settings(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE[0])
    words = (tmp_path / "a.txt", tmp_path / "c")
    assert "tokenizer is not set" in refused("preprocess_data", *words)
    assert "document_separator: unknown value 'tab'" in refused("preprocess_data", *words, "document_separator=tab")
    assert "workers: 0 is too few" in refused("preprocess_data", *words, "workers=0")
    assert "no such folder" in refused("preprocess_data", *words, f"tokenizer={tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "its tokenizer cannot be loaded" in refused("preprocess_data", *words, f"tokenizer={tmp_path}/empty")
    make_tokenizer(tmp_path / "bare", bos_token=None, eos_token=None)
    bare = f"tokenizer={tmp_path}/bare"
    assert "has no eos_token; set append_eod=false" in refused("preprocess_data", *words, bare)
    assert "has no bos_token" in refused("preprocess_data", *words, bare, "append_eod=false", "prepend_bos=true")
    assert "a.txt: a file; the last word is the prefix" in refused("preprocess_data", *words[:1], *words[:1], bare)


def test_model_with_fewer_embeddings_than_tokens(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100}))
    (tmp_path / "a.txt").write_text("a a a\n" * 50_000 + PROSE[0])
    line = refused(
        "preprocess_data", tmp_path / "a.txt", tmp_path / "c", f"tokenizer={tmp_path}/model",
        "document_separator=newline", "workers=2",
    )  # fmt: skip
    assert "a.txt, line 50001: the tokenizer gives id" in line and "beyond the vocabulary of 100" in line


def test_a_tokenizer_with_more_tokens_than_embeddings_is_no_obstacle(tmp_path: Path) -> None:
    """As long as the text uses none of them: the files are for models of that many embeddings, and say so."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "model"))
    rows = len(tokenizer)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    (tmp_path / "a.txt").write_text(PROSE[0])
    words = tmp_path / "c", f"tokenizer={tmp_path}/model", "workers=1", "overwrite=true"
    run_tool("preprocess_data", tmp_path / "a.txt", *words)
    assert json.loads((tmp_path / "c.json").read_text())["vocab_size"] == rows
    check_data("data.train", str(tmp_path / "c"), rows)
    (tmp_path / "a.txt").write_text("<extra 8>")
    assert "beyond the vocabulary" in refused("preprocess_data", tmp_path / "a.txt", *words)


def test_two_at_once_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    """They would write into one another's file. A scratch file that a killed process left is no obstacle."""
    (tmp_path / "a.txt").write_text(PROSE[0])
    words = tmp_path / "a.txt", tmp_path / "c", f"tokenizer={tokenizer}", "workers=1"
    with (tmp_path / ".c.idx.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "c.idx: another process is writing it" in refused("preprocess_data", *words)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".c.idx.partial", "a.txt"]
    run_tool("preprocess_data", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.bin", "c.idx", "c.json"]


def test_existing_output(tmp_path: Path, tokenizer: Path, tokens_of: Any) -> None:
    (tmp_path / "a.txt").write_text(PROSE[0])
    words = (tmp_path / "a.txt", tmp_path / "c", f"tokenizer={tokenizer}", "workers=1")
    run_tool("preprocess_data", *words)
    (tmp_path / "a.txt").write_text(PROSE[1])
    assert "c.bin: exists; give overwrite=true" in refused("preprocess_data", *words)
    assert read_megatron(tmp_path / "c") == [[*tokens_of(PROSE[0]), 2]]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    refused("preprocess_data", *words, "overwrite=true")
    assert read_megatron(tmp_path / "c") == [[*tokens_of(PROSE[0]), 2]]
    (tmp_path / "a.txt").write_text(PROSE[1])
    run_tool("preprocess_data", *words, "overwrite=true")
    assert read_megatron(tmp_path / "c") == [[*tokens_of(PROSE[1]), 2]]


@pytest.mark.parametrize("accident", ["interrupt", "killed worker"])
def test_accidents(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, accident: str) -> None:
    """Half way through: nothing is left, neither files nor processes."""
    (tmp_path / "a.txt").write_text("".join(PROSE) * 5_000)
    others = set(multiprocessing.active_children())
    add = IndexedDatasetBuilder.add_document

    def add_and_fail(*arguments: Any) -> None:
        add(*arguments)
        if accident == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", add_and_fail)
    monkeypatch.setattr(workers, "BYTES_IN_FLIGHT", 1)
    words = (*[tmp_path / "a.txt"] * 4, tmp_path / "out" / "c", f"tokenizer={tokenizer}", "workers=1")
    if accident == "interrupt":
        done = run_tool("preprocess_data", *words, check=False)
        assert done.returncode == 130 and "interrupted" in done.stderr
    else:
        assert "a tokenising process was killed" in refused("preprocess_data", *words)
    assert os.listdir(tmp_path / "out") == []
    for process in set(multiprocessing.active_children()) - others:
        process.join(10)
        assert process.pid is not None
        with pytest.raises(ProcessLookupError):  # its exit code may still be in the hands of the pool's thread
            os.kill(process.pid, 0)
