"""Make English training text and held-out text from what every installation of this package has on its disk.

    python examples/get_text.py OUT_DIR [--source FOLDER ...]

Reads the docstrings (and other long string literals) of Python's standard library and of the packages that this one
requires, and their README, .md, .rst and package descriptions; keeps what reads like prose. Writes train.jsonl and
heldout.jsonl, one {"text": ...} a line. It is technical prose: enough to see a fine-tuning run work, no replacement
for a pretraining corpus. The same installation gives the same files, byte for byte. --source reads other folders.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "matplotlib", "megatron", "networkx", "numpy", "pandas", "sympy",
    "torch", "transformers",
)  # fmt: skip
# Tests and copies hold little prose; transformers/models and torch/_inductor say the same things hundreds of times.
SKIPPED = {"test", "tests", "testing", "site-packages", "idlelib", "_vendor", "models", "_inductor", "__pycache__"}
SHORTEST = 200  # characters of a document, and of its beginning that tells near-duplicates apart
HELD_OUT = 50  # one document in so many


def source_files(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        yield from (Path(base, name) for name in names if name.endswith((".py", ".md", ".rst")))


def default_files() -> list[Path]:
    site = Path(sysconfig.get_path("purelib"))
    folders = [Path(sysconfig.get_path("stdlib")), *(site / name for name in PACKAGES)]
    return [file for folder in folders for file in source_files(folder)] + list(site.glob("*.dist-info/METADATA"))


def raw_texts(file: Path) -> list[str]:
    """The texts of one file: a module's long string literals, or all of a document."""
    source = file.read_text(encoding="utf-8", errors="ignore")
    if file.name == "METADATA":
        return [source.partition("\n\n")[2]]
    if file.suffix != ".py":
        return [source]
    if '"""' not in source and "'''" not in source and file.name != "topics.py":  # topics: the language reference
        return []
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return []
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def is_prose(paragraph: str) -> bool:
    """Whether it is mostly words: at least six, and few digits and signs between them."""
    plain = sum(char.isalpha() or char in " .,;'" for char in paragraph)
    return plain >= 0.9 * len(paragraph) and paragraph.count(" ") >= 5


def clean(text: str) -> str:
    """Paragraphs of prose, one line each, without markup, examples, code, headings; "" where too little is left."""
    text = re.sub(r"```.*?```", "", inspect.cleandoc(text), flags=re.DOTALL)  # fenced code
    text = re.sub(r"^.*\n *[-=~^*]{3,} *$", "", text, flags=re.MULTILINE)  # underlined headings
    text = re.sub(r":[\w:]+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("`", "")  # reST roles and literals
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        # a paragraph whose lines are indented alike is running text; others are lists, tables and code
        indents = {len(line) - len(line.lstrip()) for line in block.splitlines()}
        paragraph = " ".join(block.split())
        if len(indents) == 1 and is_prose(paragraph) and not paragraph.startswith((">>>", "..", "<", "|", "import ")):
            paragraphs.append(paragraph)
    cleaned = "\n\n".join(paragraphs)
    return cleaned if len(cleaned) >= SHORTEST else ""


def documents_of(file: Path) -> list[str]:
    gc.disable()  # syntax trees have no cycles; looking for some takes half of the time
    return [cleaned for text in raw_texts(file) if len(text) >= SHORTEST and (cleaned := clean(text))]


def distinct_documents(files: list[Path]) -> list[tuple[str, str]]:
    """(hash, text) of every document, in the order of the hashes: a shuffle that is the same everywhere.

    A paragraph is kept once, and documents that begin alike once, so nothing held out is also trained on.
    """
    with ProcessPoolExecutor() as pool:
        found = {text for texts in pool.map(documents_of, files, chunksize=16) for text in texts}
    seen: set[str] = set()
    kept = []
    for digest, text in sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in found):
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        text = "\n\n".join(paragraphs)
        beginning = re.sub(r"[\W\d_]+", " ", text.lower())[:SHORTEST]
        if len(text) >= SHORTEST and beginning not in seen:
            seen.add(beginning)
            kept.append((digest, text))
    return kept


def write(path: Path, texts: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as sink:
        sink.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print(f"{path}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} M characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--source", type=Path, action="append", metavar="FOLDER", help="read this folder instead")
    arguments = parser.parse_args()
    for folder in arguments.source or []:
        if not folder.is_dir():
            parser.error(f"--source {folder}: no such folder")

    files = [f for folder in arguments.source for f in source_files(folder)] if arguments.source else default_files()
    documents = distinct_documents(files)
    arguments.out.mkdir(parents=True, exist_ok=True)
    held_out = {digest for digest, _ in documents if int(digest[-8:], 16) % HELD_OUT == 0}
    write(arguments.out / "train.jsonl", [text for digest, text in documents if digest not in held_out])
    write(arguments.out / "heldout.jsonl", [text for digest, text in documents if digest in held_out])


if __name__ == "__main__":
    main()
