"""The example scripts and the shell scripts: what they make, and how they refuse."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import load_script, make_llama, make_tokenizer, run_tool

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash") or "/bin/bash"
SHELL_SCRIPTS = [*(ROOT / "tools").rglob("*.sh"), *(ROOT / "examples").rglob("*.sh"), ROOT / ".ci" / "run"]

SUBJECTS = ("river", "mountain", "library", "orchard", "harbour", "glacier", "meadow", "castle", "desert", "village")


def prose(subject: str, number: str) -> str:
    """A paragraph of more than 200 characters that no other subject and number begin with."""
    return (
        f"The {subject} of the {number} region has been described by many travellers, who wrote about the people that "
        f"lived near the {subject}, about the weather in the {number} season, and about what they ate and sang and "
        "believed. Their letters are kept to this day."
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a hundred documents of prose, and with what has to be left out."""
    folder = tmp_path / "sources"
    (folder / "tests").mkdir(parents=True)
    numbers = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    functions = [
        f'def f_{subject}_{number}():\n    """{prose(subject, number)}\n\n    >>> f(1, 2)\n    """\n'
        for subject in SUBJECTS
        for number in numbers
    ]
    (folder / "module.py").write_text("\n".join(functions))
    (folder / "copy.py").write_text("\n".join(functions[:7]))
    (folder / "broken.py").write_text('def f(:\n    """' + prose("broken", "syntax") + '"""\n')
    (folder / "short.py").write_text('"""A short docstring about the weather of the region."""\n')
    (folder / "code.py").write_text('"""' + "x = {1: [2, 3], 4: (5, 6)}; y[7] += 8 * z\n" * 20 + '"""\n')
    (folder / "README.md").write_text(
        f"# Title\n\n{prose('readme', 'only')}\n\n```\n{prose('fenced', 'code')}\n```\n\nUse :class:`~a.B` and ``c``"
        " wherever the two of them are of any help to the reader.\n"
    )
    (folder / "tests" / "test_it.py").write_text(f'"""{prose("skipped", "folder")}"""\n')
    return folder


def get_text(out: Path, *sources: Path) -> dict[str, list[str]]:
    words = [word for source in sources for word in ("--source", str(source))]
    command = [sys.executable, str(ROOT / "examples" / "get_text.py"), str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = {}
    for name in ("train", "heldout"):
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
        assert f"{name}.jsonl: {len(lines)} documents" in done.stdout
    return texts


def test_text_is_prose_without_duplicates(sources: Path, tmp_path: Path) -> None:
    texts = get_text(tmp_path / "out", sources)
    documents = texts["train"] + texts["heldout"]
    assert len(documents) == len(set(documents)) == 101  # 100 docstrings and the README
    assert all(len(text) >= 200 for text in documents)
    whole = "\n".join(documents)
    for absent in (">>>", "fenced", "broken", "skipped", "short docstring", "y[7]", "#", "`"):
        assert absent not in whole
    assert "Use a.B and c wherever" in whole


def test_text_is_the_same_every_time_and_held_out_text_is_not_trained_on(sources: Path, tmp_path: Path) -> None:
    first, again = get_text(tmp_path / "a", sources), get_text(tmp_path / "b", sources)
    assert first == again
    assert 1 <= len(first["heldout"]) <= 8
    paragraphs = {name: {p for text in texts for p in text.split("\n\n")} for name, texts in first.items()}
    assert not paragraphs["train"] & paragraphs["heldout"]


def test_text_refuses_a_missing_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "get_text.py"), str(tmp_path), "--source", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "/no/such/folder: no such folder" in done.stderr


def test_model_keeps_a_finished_folder_and_refuses_another(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "get_model.py"), str(tmp_path)]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "4-bit model" in done.stdout
    (tmp_path / "tokenizer.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "not a finished model" in done.stderr
    assert (tmp_path / "config.json").read_text() == "mine"


def setup_env(repository: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of setup_env.sh where no program is to be found but those that `variables` name."""
    (repository / "tools").mkdir(exist_ok=True)
    for name in ("tools/setup_env.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, repository / name)
    environment = {"PATH": "/nonexistent", "HOME": str(repository), **variables}
    return subprocess.run([BASH, "tools/setup_env.sh"], cwd=repository, env=environment, capture_output=True, text=True)


def test_setup_env_says_how_to_get_python(tmp_path: Path) -> None:
    done = setup_env(tmp_path)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: Python 3.12 or newer is needed") and "python3.12-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_env_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "old_python"
    old.write_text(f"#!{BASH}\nexit 1\n")  # what every version check of an older Python ends with
    old.chmod(0o755)
    done = setup_env(tmp_path, PYTHON=str(old))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"PYTHON={old} does not run, or is older than Python 3.12" in done.stderr


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_shell_script_parses(script: Path) -> None:
    done = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script.read_text().startswith("#!")


class OnceAsProcess:
    """In the place of `subprocess`: the first run of a script is a process, later ones of a tool are in this one."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def run(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        script = Path(command[1])
        first = script.stem not in self.seen
        self.seen.add(script.stem)
        if first:
            return subprocess.run(command, check=check, text=True)
        return run_tool(script.stem, *command[2:], check=check)


@pytest.mark.slow
def test_quickstart_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of the quickstart, its table and its picture; the model is a random one with the same heads."""
    quickstart, scripts = load_script(ROOT / "examples" / "quickstart.py"), OnceAsProcess()
    monkeypatch.setattr(quickstart, "subprocess", scripts)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(tmp_path / "out"), "0.01"])
    config = {"num_attention_heads": 9, "hidden_size": 576, "head_dim": 64, "num_hidden_layers": 2}
    original = make_llama(tmp_path / "out" / "original", groups=3, max_position_embeddings=512, **config)
    make_tokenizer(original)
    quickstart.main()
    report = (tmp_path / "out" / "report.md").read_text()
    # float32, 2 layers: 4 * 2 * (3 * 8 + c) of 4 * 2 * 384 bytes
    assert f"{4 * 2 * 384:,}" in report and f"{4 * 2 * 120:,}" in report and f"{4 * 2 * 48:,}" in report
    assert all(name in report for name in ("original", "converted -68.75 %", "fine-tuned -87.5 %", "evaluate"))
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_the_commands_that_quickstart_shows_can_be_pasted(tmp_path: Path) -> None:
    """Whatever stands in the folder's name."""
    words = ["tools/plot_run.py", str(tmp_path / "it's $mine"), "--help"]
    code = f"import quickstart; quickstart.Stages().run('help', *{words!r})"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (shown,) = (line for line in done.stdout.splitlines() if line.startswith("$ "))
    assert shlex.split(shown) == ["$", "python", *words]


def get_debian_text(out: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "get_debian_text.py", out, *map(str, words)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg is not installed")
def test_text_of_debian_packages(tmp_path: Path) -> None:
    """A page, a manual page and a compressed text without markup; a translation, code and a second copy left out."""
    root, out = tmp_path / "package", tmp_path / "out"
    folder = root / "usr" / "share" / "doc" / "some"
    (folder / "de").mkdir(parents=True)
    story = [prose(subject, "only") for subject in SUBJECTS[:4]]
    page = f"<html><head><title>no</title></head><body><p>{story[0]}</p><p>{story[1]} &amp; more</p></body></html>"
    (folder / "page.html").write_text(page)
    (folder / "again.html").write_text(page)
    (folder / "de" / "page.html").write_text(page.replace("river", "Fluss").replace("mountain", "Berg"))
    (folder / "some.1").write_text(f'.TH some\n.\\" hidden\n.SH NAME\n{story[2]}\n.PP\n\\fI{story[3]}\\fR\n')
    (folder / "code.txt").write_text("x = {1: [2, 3], 4: (5, 6)}; y[7] += 8 * z\n" * 40)
    with gzip.open(folder / "packed.txt.gz", "wt") as sink:
        sink.write("\n\n".join(prose(subject, "packed") for subject in SUBJECTS))
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        "Package: some\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: some\n"
    )
    (tmp_path / "debs").mkdir()
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "debs" / "some_1_all.deb"], check=True, capture_output=True)
    done = get_debian_text(out, "--debs", tmp_path / "debs")
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(line)["text"] for line in (out / "train.jsonl").read_text().splitlines())
    expected = [
        f"{story[0]}\n\n{story[1]} & more",
        f"some\n\nNAME\n{story[2]}\n\n{story[3]}",
        "\n\n".join(prose(subject, "packed") for subject in SUBJECTS),
    ]
    assert found == sorted(expected)


def test_text_of_no_debian_packages(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, environment, parts in (
        (["--debs", tmp_path / "empty"], {}, ["empty", "*.deb"]),
        ([], {"PATH": ""}, ["no dpkg", "Debian"]),
    ):
        done = get_debian_text(tmp_path / "out", *words, **environment)
        if words and shutil.which("dpkg") is None:
            parts = ["no dpkg"]
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert all(part in done.stderr for part in parts)
        assert not (tmp_path / "out").exists()
