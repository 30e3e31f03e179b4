"""Make a few hundred megabytes of English text, training and held-out, from Debian's documentation packages.

    python examples/get_debian_text.py OUT_DIR [--debs FOLDER] [--megabytes 320]

Needs Debian or a relative of it, no root: `apt-get download` fetches the packages into OUT_DIR/debs (packages that this
release does not have are left out; --debs takes files that are there already), `dpkg -x` unpacks them one by one, and
what is HTML, a manual page or plain text loses its markup and the lines that its package has had before. Writes
train.jsonl and heldout.jsonl, one {"text": ...} a line, in random order. The same packages give the same files. It is
technical documentation, dictionaries and some essays: real text in plenty where no hub is to be reached, narrower than
a pretraining corpus.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = (
    "ada-reference-manual-2020", "anarchism", "bash-doc", "binutils-doc", "cmake-doc", "cppreference-doc-en-html",
    "db5.3-doc", "debian-handbook", "debian-reference-en", "developers-reference", "dict-devil", "dict-foldoc",
    "dict-gcide", "dict-jargon", "dict-wn", "dpdk-doc", "erlang-doc", "exim4-doc-html", "fortunes", "freebsd-manpages",
    "gap-doc", "ghc-doc", "git-doc", "libboost1.81-doc", "libglib2.0-doc", "libgtk-3-doc", "libreoffice-help-en-us",
    "linux-doc-6.1", "llvm-16-doc", "llvm-19-doc", "maint-guide", "manpages", "manpages-dev", "maxima-doc",
    "nodejs-doc", "octave-doc", "openjdk-17-doc", "pari-doc", "perl-doc", "postgresql-doc-15", "python-django-doc",
    "python-pandas-doc", "python-scipy-doc", "python-sklearn-doc", "python3.11-doc", "r-doc-html", "racket-doc",
    "rust-doc", "sbcl-doc", "singular-doc", "sqlite3-doc",
)  # fmt: skip
BLOCKS = frozenset(
    (
        "p",
        "div",
        "li",
        "tr",
        "br",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "pre",
        "dt",
        "dd",
        "table",
        "section",
        "ul",
        "ol",
        "dl",
    )
)
WITHOUT_TEXT = frozenset(("script", "style", "head", "nav", "footer"))
OTHER_LANGUAGES = "ar|cs|da|de|el|es|fa|fr|hr|hu|id|it|ja|ko|nb|nl|pl|pt|ro|ru|tr|uk|vi|zh"
SKIPPED = re.compile(rf"/(_modules|_sources|{OTHER_LANGUAGES})[-_/]|searchindex")
TEXT_NAME = re.compile(r"\.(txt|rst|md|pod|dict|tex|texi|info|xml|xhp)$|\.\d[a-z]*$|^[^.]*$")
MANUAL_PAGE = re.compile(r"\.\d[a-z]*$")
SHORTEST, LONGEST, PIECE = 400, 60_000, 40_000  # characters of a document; a longer one is cut into pieces
HELD_OUT = 150  # one document in so many
LETTERS = 0.72  # the smallest part of a text that is letters and spaces


class Text(HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in WITHOUT_TEXT
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in WITHOUT_TEXT))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def plain_text(file: Path) -> str:
    """What can be read in a file; "" where that is nothing."""
    content, name = file.read_bytes(), file.name.lower()
    if name.endswith((".gz", ".dz")):
        try:
            content, name = gzip.decompress(content), name.rpartition(".")[0]
        except (OSError, EOFError):
            return ""
    if b"\0" in content[:4096]:
        return ""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "<html" in text[:3000].lower() or name.endswith((".html", ".htm", ".xhtml")):
        page = Text()
        page.feed(text)
        return "".join(page.parts)
    if not TEXT_NAME.search(name):
        return ""
    if MANUAL_PAGE.search(name):
        text = re.sub(r'^\.\\".*$|^\.[A-Za-z]+ ?', "", text, flags=re.MULTILINE)
        text = re.sub(r"\\f.|\\&", "", text).replace("\\-", "-")
    if name.endswith((".xml", ".xhp")):
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return text


def tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def documents(folder: Path) -> Iterator[str]:
    """The documents below a folder, without lines of more than 25 characters that another one had before."""
    seen: set[str] = set()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.is_symlink() or SKIPPED.search(str(file)):
            continue
        text = tidy(plain_text(file))
        start = text[:20_000]
        letters = sum(char == " " or (char.isascii() and char.isalpha()) for char in start)
        if letters < LETTERS * max(len(start), 1):
            continue
        lines = []
        for line in text.split("\n"):
            if len(line) <= 25 or line not in seen:
                lines.append(line)
                seen.add(line)
        text = tidy("\n".join(lines))
        while len(text) > LONGEST:
            end = text.rfind("\n\n", PIECE // 2, PIECE)
            end = PIECE if end < 0 else end
            yield text[:end]
            text = text[end:].strip()
        if len(text) >= SHORTEST:
            yield text


def package_documents(deb: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg", "-x", str(deb), scratch], check=True)
        return list(documents(Path(scratch)))


def download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"left out, for apt-get cannot download it: {package}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--debs", type=Path)
    parser.add_argument("--megabytes", type=int, default=320)
    args = parser.parse_args()
    for program in ("dpkg", *([] if args.debs else ["apt-get"])):
        if shutil.which(program) is None:
            sys.exit(f"error: there is no {program} here; this script needs Debian or a relative of it")
    debs = args.debs or args.out / "debs"
    if args.debs is None:
        download(debs)
    files = sorted(debs.glob("*.deb"))
    if not files:
        sys.exit(f"error: {debs}: holds no packages (*.deb)")
    found: dict[bytes, str] = {}
    with ProcessPoolExecutor() as pool:
        for file, texts in zip(files, pool.map(package_documents, files), strict=True):
            for text in texts:
                found.setdefault(hashlib.sha256(text.encode()).digest(), text)
            print(f"{file.name}: {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
    texts = list(found.values())
    random.Random(0).shuffle(texts)
    held_out, rest = texts[: len(texts) // HELD_OUT], texts[len(texts) // HELD_OUT :]
    ends = itertools.accumulate(map(len, rest), initial=0)
    training = [text for text, start in zip(rest, ends, strict=False) if start < args.megabytes * 1_000_000]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", training), ("heldout", held_out)):
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as sink:
            sink.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        print(f"{args.out / name}.jsonl: {len(part)} documents, {sum(map(len, part)) / 1e6:.1f} M characters")


if __name__ == "__main__":
    main()
