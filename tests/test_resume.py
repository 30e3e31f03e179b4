"""Conversions that are interrupted, killed, started twice or out of room: the same command ends with the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mha2mla_megatron import healing
from mha2mla_megatron.checkpoint import resume
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.checkpoint.resume import JOURNAL, NEW, PartialFolder
from mha2mla_megatron.planning import Planner
from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.forks import exit_codes, fork
from tests.kill_conversion import ROUTES, SHARDS, Inputs, contents, convert, kill_conversions
from tests.test_faults import small_files

Files = Callable[[str], dict[str, bytes]]
ALIKE = ("mha_to_mla", "hf_to_megatron", "megatron_to_hf")
"""Routes that stand for all where only the files differ."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What a route writes where nothing ends it."""

    @functools.cache
    def files(route: str) -> dict[str, bytes]:
        target = tmp_path_factory.mktemp(route) / "out"
        run_tool(*inputs.command(route, target))
        return contents(target)

    return files


def stop_at(monkeypatch: pytest.MonkeyPatch, part: int, error: BaseException) -> None:
    """End the work, counted over the process's conversions, instead of its n-th part."""
    finish, count = PartialFolder.finish, 0

    def stopping(self: PartialFolder, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == part:
            raise error
        finish(self, *args)

    monkeypatch.setattr(PartialFolder, "finish", stopping)


@pytest.mark.parametrize("route", ROUTES)
def test_an_interrupted_conversion_goes_on(
    inputs: Inputs,
    unbroken: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
) -> None:
    command = inputs.command(route, tmp_path / "out")
    for part in (1, 4, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, part, KeyboardInterrupt())
            done = run_tool(*command, check=False)
        assert done.returncode == 130
        line = f"{tmp_path / 'out'}: interrupted; the same command goes on from there"
        assert done.stderr.splitlines()[-1] == line
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    there = [json.loads(line)["part"] for line in (tmp_path / ".out.partial" / JOURNAL).read_text().splitlines()[1:]]
    assert len(there) == 0 + 3 + 8
    finish = PartialFolder.finish
    monkeypatch.setattr(
        PartialFolder, "finish", lambda self, part, *more: (there.append(part), finish(self, part, *more))[1]
    )
    assert "checking what is there" in run_tool(*command).stderr
    assert len(there) == len(set(there)), "what was done before is not done again"
    assert contents(tmp_path / "out") == unbroken(route)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_in_the_middle_of_other_code(
    inputs: Inputs, unbroken: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's C++ code, interrupted while it calls Python, raises errors of its own."""
    getitem = HFReader.__getitem__

    def swallowing(self: HFReader, name: str) -> torch.Tensor:
        if "layers.1" in name:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            raise ValueError("could not determine the shape")
        return getitem(self, name)

    command = inputs.command("hf_to_megatron", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(HFReader, "__getitem__", swallowing)
        done = run_tool(*command, check=False)
    assert done.returncode == 130 and "goes on from there" in done.stderr
    # Killed in the middle of writing the manifest, too.
    step = tmp_path / ".out.partial" / "new" / "iter_0000000"
    (step / ".manifest.json").write_text("{")
    run_tool(*command)
    assert contents(tmp_path / "out") == unbroken("hf_to_megatron")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a file flipped": lambda partial: _flip(_largest(partial)),
    "a file gone": lambda partial: _largest(partial).unlink(),
    "a file cut": lambda partial: os.truncate(_largest(partial), 2000),
    "journal's last line torn": lambda partial: os.truncate(partial / JOURNAL, _by_size(partial / JOURNAL) - 7),
    "journal ends in zeros": lambda partial: (partial / JOURNAL).open("ab").write(bytes(99) + b"\n"),
    "journal gone": lambda partial: (partial / JOURNAL).unlink(),
    "journal empty": lambda partial: (partial / JOURNAL).write_bytes(b""),
}


def _largest(partial: Path) -> Path:
    return max((file for file in (partial / NEW).rglob("*") if file.is_file()), key=_by_size)


def _by_size(file: Path) -> int:
    return file.stat().st_size


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("route", [*ALIKE, "mha_to_mla_megatron"])
def test_what_was_damaged_meanwhile_is_made_again(
    inputs: Inputs,
    unbroken: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    case: str,
) -> None:
    command = inputs.command(route, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, 15, KeyboardInterrupt())
        run_tool(*command, check=False)
    DAMAGE[case](tmp_path / ".out.partial")
    run_tool(*command)
    assert contents(tmp_path / "out") == unbroken(route)


@pytest.mark.parametrize("change", ["settings", "source"])
def test_another_conversion_starts_anew(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    tool, original, target, *words = inputs.command("mha_to_mla", tmp_path / "out")
    source = shutil.copytree(original, tmp_path / "source")
    command = [tool, source, target, *words]
    with monkeypatch.context() as patch:
        stop_at(patch, 15, KeyboardInterrupt())
        run_tool(*command, check=False)
    if change == "settings":
        command.append("dtype=bfloat16")
    else:
        make_llama(source, num_hidden_layers=4, seed=1)
    assert "left by another conversion; starting anew" in run_tool(*command).stderr
    run_tool(*command[:2], tmp_path / "fresh", *command[3:])
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("route", ALIKE)
def test_a_full_disk_is_one_line_and_the_work_is_kept(inputs: Inputs, tmp_path: Path, route: str) -> None:
    tool, source, target, *words = inputs.command(route, tmp_path / "out")
    command = [tool, source, target, *(word for word in words if word != SHARDS)]  # in one shard
    with small_files(200_000):
        line = refused(*command)
    assert "File too large" in line and "with more room the same command goes on from there" in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    run_tool(*command)
    run_tool(*command[:2], tmp_path / "fresh", *command[3:])
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_two_at_once_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    command = inputs.command("hf_to_megatron", tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / JOURNAL).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused(*command)
    assert ".out.partial: another process is working in it" in line
    run_tool(*command)


def test_an_old_target_stays_until_the_new_one_is_complete(
    inputs: Inputs, unbroken: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process dies between the two renames, which leaves nothing of that name for a moment."""
    command = [*inputs.command("hf_to_megatron", tmp_path / "out"), "overwrite=true"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    rename = Path.rename

    def dying(self: Path, target: Path) -> Any:
        if self.name == NEW:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        assert run_tool(*command, check=False).returncode == 130
    assert not (tmp_path / "out").exists()
    assert "overwrite=true" in refused(*command[:3])
    assert (tmp_path / "out" / "mine").read_text() == "old"
    run_tool(*command)
    assert contents(tmp_path / "out") == unbroken("hf_to_megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("route", ALIKE)
def test_a_target_that_holds_the_source_is_refused(inputs: Inputs, tmp_path: Path, route: str) -> None:
    """What replaces it would delete the source, also where it has another name through a link."""
    tool, source, _, *words = inputs.command(route, tmp_path / "out")
    copy = shutil.copytree(source, tmp_path / "models" / "source")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    before = contents(tmp_path / "models")
    for target in (copy, copy.parent, tmp_path / "link"):
        assert "which is read" in refused(tool, copy, target, *words, "overwrite=true")
        assert "which is read" in refused(tool, tmp_path / "link" / "source", target, *words, "overwrite=true")
    assert contents(tmp_path / "models") == before
    assert {path.name for path in tmp_path.iterdir()} == {"models", "link"}
    run_tool(tool, copy, copy / "out", *words)  # the other way round nothing is lost


@pytest.mark.parametrize("exists", [True, False])
def test_a_linked_target_is_what_it_points_to(inputs: Inputs, unbroken: Files, tmp_path: Path, exists: bool) -> None:
    """And stays a link: it is how a large folder is had on another disk."""
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    run_tool(*inputs.command("hf_to_megatron", tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk" / "out") == unbroken("hf_to_megatron")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_an_interrupt_comes_too_late_once_the_name_is_given(
    inputs: Inputs, unbroken: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To say then that the same command goes on would be wrong: it is refused, as the target is there."""
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Any:
        done = rename(self, target)
        os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    run_tool(*inputs.command("hf_to_megatron", tmp_path / "out"))
    assert contents(tmp_path / "out") == unbroken("hf_to_megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("word", ["dtype=auto", "dtype=bfloat16", "ckpt_format=torch_dist"])
def test_a_plan_and_healed_layers_are_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """The layers above the interrupt are healed against what the healed ones below put out, as without it."""
    make_tokenizer(make_llama(tmp_path / "original"))
    run_tool("calibrate", tmp_path / "original", text, tmp_path / "s.safetensors", "samples=4", "sequence_length=32",
             "stored_samples=4")  # fmt: skip
    heal = ["heal.steps=4", "heal.batch_tokens=64", "heal.sequence_length=32", word]
    command = ["convert_mha_to_mla", tmp_path / "original", tmp_path / "out", f"statistics={tmp_path}/s.safetensors",
               "cache_budget=0.5", *heal]  # fmt: skip
    straight = word == "ckpt_format=torch_dist"
    run_tool(*command[: -1 if straight else None])
    shutil.move(tmp_path / "out", tmp_path / "unbroken")
    before = contents(tmp_path / "unbroken")
    if straight:  # by the two converters, one after the other
        run_tool("convert_hf_to_megatron", tmp_path / "unbroken", tmp_path / "megatron")
        about = {f"hf/{name}": before[name] for name in ("conversion_report.json", "allocation.png")}
        before = contents(tmp_path / "megatron") | about
    train, planned, count = healing.Healer._train, [], 0

    def counting(self: healing.Healer, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        train(self, *args)

    plan = Planner.plan
    monkeypatch.setattr(healing.Healer, "_train", counting)
    monkeypatch.setattr(Planner, "plan", lambda self, budget: (planned.append(budget), plan(self, budget))[1])
    assert run_tool(*command, check=False).returncode == 130
    run_tool(*command)
    assert (len(planned), count) == (1, 2 + 2), "a plan or a layer was made again"
    after, picture = contents(tmp_path / "out"), "hf/allocation.png" if straight else "allocation.png"
    assert before.pop(picture) and after.pop(picture)
    assert before == after


def test_identity_names_every_input(tmp_path: Path) -> None:
    """Otherwise a changed one would be taken for the same."""
    (tmp_path / "a").write_text("1")
    settings = resume.Piece("x", 0, 1, 2)
    first = resume.identity("c", settings, [tmp_path])
    (tmp_path / "a").write_text("22")
    assert first != resume.identity("c", settings, [tmp_path])
    assert json.loads(json.dumps(first)) == first and first["settings"]["crc"] == 2


def test_ended_at_random_moments(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed={seed}")
    kill_conversions(tmp_path, kills=3, seed=seed)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    shape = ["layers=1", "hidden=64", "intermediate=96", "heads=4", "groups=2", "vocabulary=256", "rope=4", "rank=20",
             "svd_layers=2"]  # fmt: skip
    table = run_tool("benchmarks/convert", tmp_path / "work", *shape, "repeats=1").stdout
    for row in (
        "hf_to_megatron, original", "megatron_to_hf, original", "hf_to_megatron, MLA", "megatron_to_hf, MLA",
        "mha_to_mla to hf, 2 layers", "mha_to_mla to torch_dist, 2 layers",
    ):  # fmt: skip
        (line,) = (line for line in table.splitlines() if line.startswith(f"{row} "))
        # A process that has imported torch and nothing else; GiB.
        assert 0.05 < float(line.split()[-1]) < 1.5, line
    assert not (tmp_path / "work").exists()


def anonymous(process: int | None) -> int:
    """Anonymous resident memory in bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max([0, *(int(kilobytes) * 1024 for kilobytes in re.findall(r"RssAnon:\s*(\d+)", status))])


def peak_of(tool: str, *words: object) -> int:
    """The most memory that a command has, in bytes."""
    process, peak = fork(run_tool, tool, *words), 0
    while process.is_alive():
        peak = max(peak, anonymous(process.ident))
        time.sleep(0.001)
    assert exit_codes([process]) == [0]
    return peak


@pytest.mark.parametrize("route", [*ALIKE, pytest.param("mha_to_mla_megatron", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, route: str) -> None:
    """Layers of 5 MB: sixteen more of them are 80 MB more of model."""
    peaks, tool = [], ROUTES[route].tool
    for layers in (2, 18):
        shape = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 1280, "vocab_size": 4096}
        source = make_llama(tmp_path / f"{layers}", **shape)
        if tool == "convert_megatron_to_hf":
            assert exit_codes([convert("convert_hf_to_megatron", source, tmp_path / f"{layers}-megatron")]) == [0]
            source = tmp_path / f"{layers}-megatron"
        peaks.append(peak_of(tool, source, tmp_path / f"{layers}-out", *ROUTES[route].words))
    assert sum(file.stat().st_size for file in (tmp_path / "18").iterdir()) > 3 * 25e6
    assert peaks[1] - peaks[0] < 25e6, peaks


def test_memory_of_what_runs_the_model_does_not_grow(tmp_path: Path, text: Path) -> None:
    """Calibration, the measurements of a budget, and healing: layers of 9 MB in float32, which is not the stored type,
    so that none of it is the mapped file's own. Eight more of them are 70 MB more of model."""
    peaks: dict[str, list[int]] = {"calibrate": [], "convert": []}
    for layers in (2, 10):
        shape = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 2560}
        source = make_tokenizer(make_llama(tmp_path / f"{layers}", **shape))
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        file = tmp_path / f"{layers}.safetensors"
        words = ["sequence_length=32", "samples=4", "memory=1MB"]
        peaks["calibrate"].append(peak_of("calibrate", source, text, file, *words))
        words = [f"statistics={file}", "cache_budget=0.5", "allocation.rope_multiple=8", "allocation.tokens=32"]
        words += ["heal.steps=2", "heal.batch_tokens=64", "heal.sequence_length=32"]
        peaks["convert"].append(peak_of("convert_mha_to_mla", source, tmp_path / f"{layers}-mla", *words))
    for few, many in peaks.values():
        assert many - few < 25e6, peaks
