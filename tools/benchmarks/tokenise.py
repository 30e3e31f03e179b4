"""Tokens/s of tools/preprocess_data.py against the tokenizers library's own encode_batch, over the same cores.

    python tools/benchmarks/tokenise.py MODEL [TEXT ...] [key=value ...]

TEXT: files as preprocess_data.py takes them (default: Python's standard library). Each of the two runs in a process of
its own; encode_batch gets all texts at once, in memory. Neither time has the loading of libraries and tokenizer in it
(some seconds); that of preprocess_data.py, which it shows itself, includes starting its
processes, reading, and writing the .bin and .idx files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mha2mla_megatron.checkpoint.folders import resolve_folder
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.data.documents import DocumentReader
from mha2mla_megatron.errors import UserError, run_tool
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.settings import load_settings

USAGE = "tokenise.py MODEL [TEXT ...] [key=value ...]"
TOOL = Path(__file__).resolve().parents[1] / "preprocess_data.py"


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of tools/benchmarks/tokenise.py."""

    megabytes: float = 50.0
    """Of text, the same files again until there are so many."""

    workers: int | None = None
    """Processes, and threads of encode_batch. null: as many as there are CPU cores."""

    rounds: int = 1
    """How often both are timed, in turn; the fastest of each counts."""


def main(argv: list[str]) -> None:
    if argv[:1] == ["--encode-batch"]:
        print(json.dumps(encode_batch(Path(argv[1]), Path(argv[2]))))
        return
    (model, *texts), overrides, file = split_words(argv, USAGE, 1, schema=BenchmarkSettings)
    settings = load_settings(BenchmarkSettings, overrides, file)
    workers = settings.workers or len(os.sched_getaffinity(0))
    folder = resolve_folder(model)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        write_corpus(corpus, [Path(text) for text in texts] or standard_library(), settings.megabytes)
        runs = [timed(corpus, folder, workers, Path(scratch) / "out") for _ in range(settings.rounds)]
    ours, theirs = (min((run[i] for run in runs), key=lambda found: found[0]) for i in (0, 1))
    assert ours[1] == theirs[1] + theirs[2], "the same tokens, and an end token for each document"
    rows = [
        (name, f"{seconds:.1f}", f"{tokens / seconds / 1e6:.2f}")
        for name, (seconds, tokens) in (("preprocess_data.py", ours[:2]), ("encode_batch", theirs[:2]))
    ]
    print(format_table((f"{workers} cores, {theirs[2]} documents", "seconds", "M tokens/s"), rows))
    print(f"ratio {(ours[1] / ours[0]) / (theirs[1] / theirs[0]):.2f}")


def timed(corpus: Path, folder: Path, workers: int, output: Path) -> tuple[list[float], list[float]]:
    """([seconds, tokens] of the tool, [seconds, tokens, documents] of encode_batch)."""
    words = [str(corpus), str(output), f"tokenizer={folder}", f"workers={workers}", "overwrite=true"]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True)
    shown = re.findall(r" in (?:(\d+)m)?([\d.]+)s *$", done.stderr, re.MULTILINE)
    if done.returncode != 0 or not shown:
        raise UserError(f"preprocess_data.py failed: {done.stderr.strip()}")
    minutes, seconds = shown[-1]
    ours = [60 * float(minutes or 0) + float(seconds), json.loads(Path(f"{output}.json").read_text())["tokens"]]
    command = [sys.executable, __file__, "--encode-batch", str(corpus), str(folder)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return ours, json.loads(done.stdout)


def encode_batch(corpus: Path, folder: Path) -> list[float]:
    """[seconds, tokens, documents] of one call over the whole corpus."""
    texts = [document.text for block in DocumentReader([corpus]) for document in block.documents()]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = time.monotonic()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    seconds = time.monotonic() - start
    return [seconds, sum(len(encoding.ids) for encoding in encodings), len(texts)]


def write_corpus(file: Path, texts: list[Path], megabytes: float) -> None:
    """JSON lines of so many bytes of text."""
    left = megabytes * 1e6
    with file.open("w", encoding="utf-8") as stream:
        while left > 0:
            for block in DocumentReader(texts):
                for document in block.documents():
                    if document.text.strip() and left > 0:
                        stream.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
                        left -= len(document.text.encode("utf-8"))


def standard_library() -> list[Path]:
    """Python's own modules: code, and prose in docstrings."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found.append(file)
    return found


if __name__ == "__main__":
    run_tool(main)
