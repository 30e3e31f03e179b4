"""Faults while a run trains and saves: each ends in one line and leaves the last checkpoint as it was."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from mha2mla_megatron.checkpoint import manifest as manifest_module
from mha2mla_megatron.checkpoint import rotation
from mha2mla_megatron.checkpoint.manifest import MANIFEST
from mha2mla_megatron.checkpoint.megatron import LATEST, read_latest
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.training import checkpoint as checkpoint_module
from mha2mla_megatron.training import log as log_module
from mha2mla_megatron.training import loop
from mha2mla_megatron.training import step as step_module
from tests.conftest import refused, run_tool
from tests.finetune_cases import (
    BATCH,
    checkpoint_tensors,
    checkpoint_values,
    finetune,
    log_text,
    make_workspace,
    put_back,
    read_log,
    run_words,
)
from tests.kill_training import kill_training

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

SCHEDULE = ("steps=6", "save_interval=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> Path:
    """A run of six steps, saved at 2, 4 and 6."""
    return finetune(workspace, "mla", workspace / "run", *SCHEDULE)


def files(root: Path) -> dict[str, bytes]:
    """Name -> content of everything in the saved steps, and the pointer."""
    steps = [file for folder in root.glob("iter_*") for file in folder.iterdir()]
    return {str(file.relative_to(root)): file.read_bytes() for file in [*steps, root / LATEST]}


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process can grow beyond this: to who writes it, a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "index": lambda patch: patch.setattr(FileSystemWriterAsync, "finish", no_room),
    "Megatron's metadata.json": lambda patch: patch.setattr(serialization, "save_config", no_room),
    "manifest": lambda patch: patch.setattr(manifest_module, "replace_text", no_room),
    "pointer": lambda patch: patch.setattr(rotation, "write_latest", no_room),
    "folder": lambda patch: patch.setattr(checkpoint_module, "partial_folder", lambda *_: Path("/dev/null/step")),
}


@pytest.mark.parametrize("save_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("where", ["data", *FULL])
def test_a_full_disk_ends_the_run_and_keeps_the_last_step(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, save_async: bool
) -> None:
    root = put_back(unbroken, tmp_path / "run", 2)
    before = files(root)
    words = run_words(workspace, "mla", root, *SCHEDULE, f"save_async={save_async}")
    with monkeypatch.context() as patch:
        if where == "data":
            with small_files(1_000_000):
                line = refused("finetune", *words)
        else:
            FULL[where](patch)
            line = refused("finetune", *words)
    assert f"save: {root}: step 4 cannot be saved" in line and "the last complete step, 2, is as it was" in line
    assert any(reason in line for reason in ("No space left on device", "File too large", "Not a directory")), line
    assert {name: content for name, content in files(root).items() if name in before} == before
    assert not list(root.glob(".iter_*"))
    run_tool("inspect_checkpoint", root)
    finetune(workspace, "mla", root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken)


def test_async_saving_writes_the_same(workspace: Path, unbroken: Path, tmp_path: Path) -> None:
    """Each step as it was when its writing began, though training went on; byte for byte, as the run is on a CPU."""
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, "save_async=true")
    assert saved_steps(root) == [2, 4, 6] and not list(root.glob(".*"))
    expected, found = files(unbroken), files(root)
    assert expected.keys() == found.keys()
    data = [name for name in expected if name.endswith(".distcp")]
    assert data and all(found[name] == expected[name] for name in data)


def test_training_goes_on_while_a_step_is_written(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing of step 2 waits for step 3; what is written is step 2."""
    write, train_step, third, steps = checkpoint_module._write, loop.train_step, threading.Event(), 0

    def late(*args: Any) -> None:
        assert third.wait(60)
        write(*args)

    def counted(*args: Any) -> Any:
        nonlocal steps
        result = train_step(*args)
        steps += 1
        if steps == 3:
            assert saved_steps(tmp_path / "run") == []
            third.set()
        return result

    monkeypatch.setattr(checkpoint_module, "_write", late)
    monkeypatch.setattr(loop, "train_step", counted)
    run_tool("finetune", *run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, "save_async=true"))
    for step in (2, 6):
        expected, found = checkpoint_tensors(unbroken, step), checkpoint_tensors(tmp_path / "run", step)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(log_module, "_reopen", lambda *_: Path("/dev/full").open("w"))  # noqa: SIM115
        done = run_tool("finetune", *run_words(workspace, "mla", tmp_path / "run", *SCHEDULE))
    assert done.stderr.count("/dev/full") == 1 and "No space left" in done.stderr
    expected, found = checkpoint_tensors(unbroken, 6), checkpoint_tensors(tmp_path / "run", 6)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_unwritable_save_folder_is_refused_before_the_first_step(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "file" / "run", *SCHEDULE))
    assert f"save: {tmp_path / 'file' / 'run'}: cannot be written" in line and "Not a directory" in line


@pytest.mark.parametrize("blocked", ["log.jsonl", "tensorboard", "cache"])
def test_what_cannot_be_written_beside_the_steps_is_named(workspace: Path, tmp_path: Path, blocked: str) -> None:
    root = tmp_path / "run"
    if blocked == "log.jsonl":
        (root / blocked).mkdir(parents=True)
    else:
        root.mkdir()
        (root / blocked).write_text("")
    line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    key = f"data.cache: {root / 'cache'}" if blocked == "cache" else f"save: {root}"
    assert f"{key}: cannot be written ({root / blocked}: " in line and saved_steps(root) == []


def test_a_second_run_in_the_same_folder_is_refused(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one saves: what it has written so far is no leftover. It goes on, and its folder is free then."""
    root, publish, second = tmp_path / "run", checkpoint_module.publish_step, []

    def publish_slowly(*arguments: Any) -> None:
        if not second:
            words = run_words(workspace, "mla", root, *SCHEDULE)
            second.append(run_tool("finetune", *words, check=False, own_process=True))
        publish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "publish_step", publish_slowly)
        finetune(workspace, "mla", root, *SCHEDULE)
    assert second[0].returncode == 2 and f"error: save: {root}: another run is at work in it" in second[0].stderr
    assert saved_steps(root) == [2, 4, 6] and log_text(root) == log_text(unbroken)
    finetune(workspace, "mla", root, *SCHEDULE, own_process=True)


def test_leftovers_are_removed_and_keep_last_deletes_after_the_seal(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put_back(unbroken, tmp_path / "run", 4)
    for name in (".iter_0000006.partial", ".iter_0000002.deleted"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").write_bytes(b"half")
    (root / f".{LATEST}").write_text("6")
    (root / "notes").mkdir()
    seen: list[tuple[int | None, list[int]]] = []
    delete = rotation.delete_step

    def watched(folder: Path, step: int) -> None:
        seen.append((read_latest(folder), saved_steps(folder)))
        assert (folder / "iter_0000006" / MANIFEST).is_file()
        delete(folder, step)

    monkeypatch.setattr(rotation, "delete_step", watched)
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE, "keep_last=2"))
    assert ".iter_0000006.partial" in done.stdout and ".iter_0000002.deleted" in done.stdout
    assert seen == [(6, [2, 4, 6])] and saved_steps(root) == [4, 6]
    assert not list(root.glob(".*")) and (root / "notes").is_dir()
    assert log_text(root) == log_text(unbroken)


def test_a_sample_index_cut_by_a_kill_is_made_again(workspace: Path, unbroken: Path, tmp_path: Path) -> None:
    root = put_back(unbroken, tmp_path / "run", 4)
    for file in (root / "cache").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-10])
    finetune(workspace, "mla", root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken)


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "data cut": (
        lambda step: _write(step / "__0_0.distcp", lambda data: data[:1000]), ["__0_0.distcp", "truncated", "1000"]
    ),
    "data flipped": (
        lambda step: _write(step / "__0_0.distcp", lambda data: _flip(data, 1_000_000)), ["__0_0.distcp", "damaged"]
    ),
    "data gone": (lambda step: (step / "__0_0.distcp").unlink(), ["__0_0.distcp", "missing"]),
    "index flipped": (lambda step: _write(step / ".metadata", lambda data: _flip(data, 9000)), [".metadata", "sha256"]),
    "metadata.json emptied": (lambda step: _write(step / "metadata.json", lambda _: b""), ["metadata.json", "0 bytes"]),
    "manifest flipped": (lambda step: _write(step / MANIFEST, lambda data: _flip(data, 200)), [MANIFEST, "damaged"]),
    "manifest cut": (lambda step: _write(step / MANIFEST, lambda data: data[:100]), [MANIFEST, "damaged"]),
    "folder gone": (lambda step: shutil.rmtree(step), ["iter_0000004", ".metadata is missing"]),
}  # fmt: skip


def _write(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_step_is_not_resumed_from(workspace: Path, unbroken: Path, tmp_path: Path, case: str) -> None:
    root = put_back(unbroken, tmp_path / "run", 4)
    damage, named = DAMAGE[case]
    damage(root / "iter_0000004")
    line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert all(part in line for part in [str(root / "iter_0000004"), *named]), line


def test_a_step_saved_without_a_manifest_is_resumed_and_said_so(
    workspace: Path, unbroken: Path, tmp_path: Path
) -> None:
    root = put_back(unbroken, tmp_path / "run", 4)
    (root / "iter_0000004" / MANIFEST).unlink()
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert f"saved without {MANIFEST}" in done.stdout and log_text(root) == log_text(unbroken)


def nan_in(monkeypatch: pytest.MonkeyPatch, passes: set[int], gradients_alone: bool = False) -> None:
    """Make these forward passes, counted from 1 and two a step, give a loss, or only gradients, of NaN."""
    count, masked_loss = 0, step_module.masked_loss

    def spoilt(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        total, number, shown = masked_loss(mask, losses)
        if count in passes and gradients_alone:
            total.register_hook(lambda gradient: gradient * math.nan)
        elif count in passes:
            return masked_loss(mask, losses * math.nan)
        return total, number, shown

    monkeypatch.setattr(step_module, "masked_loss", spoilt)


@pytest.mark.parametrize("gradients_alone", [False, True], ids=["loss", "gradients"])
def test_nan_stops_the_run_and_names_the_samples(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients_alone: bool
) -> None:
    """In the second micro batch of the fourth step: its samples, or the step's where each loss was well."""
    root, words = tmp_path / "run", run_words(workspace, "mla", tmp_path / "run", *SCHEDULE)
    with monkeypatch.context() as patch:
        nan_in(patch, {8}, gradients_alone)
        line = refused("finetune", *words)
    first = 3 * BATCH
    samples = f"samples {first}-{first + 3}" if gradients_alone else f"samples {first + 2}-{first + 3}"
    assert "step 4: " in line and "gradient norm nan" in line and f"in {samples};" in line, line
    assert ("loss nan" in line) != gradients_alone
    assert read_latest(root) == 2
    run_tool("inspect_checkpoint", root)
    finetune(workspace, "mla", root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken)


def test_samples_are_named_where_batches_were_smaller_before(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of BATCH samples, then one of twice as many, whose third micro batch is spoilt."""
    root = put_back(unbroken, tmp_path / "run", 4)
    with monkeypatch.context() as patch:
        nan_in(patch, {3})
        words = run_words(workspace, "mla", root, *SCHEDULE, f"global_batch_size={2 * BATCH}")
        line = refused("finetune", *words)
    first = 4 * BATCH + 2 * 2
    assert f"step 5: loss nan, gradient norm nan, in samples {first}-{first + 1};" in line, line


@pytest.mark.parametrize("gradients_alone", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_skipped_steps_change_nothing_and_are_counted(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, gradients_alone: bool
) -> None:
    words = (*SCHEDULE, "save_interval=1", "on_nan=skip", f"dtype={dtype}", "optimizer.ema_decay=0.8")
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        nan_in(patch, {5, 7}, gradients_alone)
        done = run_tool("finetune", *run_words(workspace, "mla", root, *words))
    assert done.stderr.count("left out") == 2 and "(2 so far)" in done.stderr
    log = read_log(root)
    assert [line.get("skipped", False) for line in log] == [False, False, True, True, False, False]
    assert all("NaN" not in line for line in (root / "log.jsonl").read_text().splitlines())
    assert log[2]["grad_norm"] is None and log[5]["loss"] > 0
    second, fourth, sixth = (checkpoint_tensors(root, step) for step in (2, 4, 6))
    assert all(torch.equal(second[name], fourth[name]) for name in second)
    averages = {name.removeprefix("average."): name for name in second if name.startswith("average.")}
    assert averages  # and a step more would move each
    assert all(not torch.equal(second[f"optimizer.state.param.{own}"], second[name]) for own, name in averages.items())
    assert all(tensor.isfinite().all() for tensor in sixth.values() if tensor.is_floating_point())
    assert any(not torch.equal(fourth[name], sixth[name]) for name in second)
    runs = [checkpoint_values(root, step)["run"] for step in (2, 4, 6)]
    assert [(run["skipped"], run["skipped_in_a_row"]) for run in runs] == [(0, 0), (2, 2), (2, 0)]


def test_too_many_skips_in_a_row_stop_the_run_also_over_a_resume(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, words = tmp_path / "run", (*SCHEDULE, "save_interval=1", "on_nan=skip", "max_skips_in_a_row=2")
    train_step, steps = loop.train_step, 0

    def killed_in_third(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        nan_in(patch, {1, 4})
        patch.setattr(loop, "train_step", killed_in_third)
        assert run_tool("finetune", *run_words(workspace, "mla", root, *words), check=False).returncode == 130
    with monkeypatch.context() as patch:
        nan_in(patch, {1})
        line = refused("finetune", *run_words(workspace, "mla", root, *words))
    assert "step 3" in line and "3 steps in a row" in line and "max_skips_in_a_row is 2" in line, line
    assert read_latest(root) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(
    workspace: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    root, train_step, steps = tmp_path / "run", loop.train_step, 0

    def signalled(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), number)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", signalled)
        done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert done.stdout.splitlines()[-1].startswith(f"{root}: asked to stop; step 3 of 6 is saved, and the same command")
    assert done.returncode == 0 and saved_steps(root) == [2, 3]
    finetune(workspace, "mla", root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken)


BAD_WORDS = {
    "on_nan=ignore": ["on_nan", "ignore", "skip"],
    "max_skips_in_a_row=0": ["max_skips_in_a_row", "0"],
    "parallel.timeout_minutes=0": ["parallel.timeout_minutes", "0"],
}


@pytest.mark.parametrize("word", BAD_WORDS)
def test_bad_settings_are_refused(workspace: Path, tmp_path: Path, word: str) -> None:
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, word))
    assert all(part in line for part in BAD_WORDS[word])
    assert not (tmp_path / "run").exists()


def test_manifest_has_the_layout_and_every_file(unbroken: Path) -> None:
    step = unbroken / "iter_0000006"
    content = json.loads((step / MANIFEST).read_text())
    assert content["step"] == 6 and content["layout"]["processes"] == 1
    assert {*content["files"], MANIFEST} == {file.name for file in step.iterdir()}
    assert all(entry["size"] == (step / name).stat().st_size for name, entry in content["files"].items())


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """One to six minutes, as busy as two cores are: nearly all of it is the start of seven processes."""
    kill_training(tmp_path, kills=5, seed=20, save_async=False)


def test_killed_while_saving_in_the_background(tmp_path: Path) -> None:
    kill_training(tmp_path, kills=1, seed=2, save_async=True)
