"""Fine-tuning on two processes gives the results of one, and each goes on from what the other saved."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.checkpoint.megatron import read_best, read_latest
from mha2mla_megatron.checkpoint.rotation import saved_steps
from tests.conftest import ROOT, children, make_llama, run_tool
from tests.distributed import finetune_worker
from tests.distributed.worlds import run_world
from tests.finetune_cases import (
    checkpoint_tensors,
    exported,
    finetune,
    log_text,
    losses,
    make_workspace,
    put_back,
    read_log,
    run_words,
    terminate_at_step_3,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

MODELS = ("original", "mla")
# Adam divides a gradient by its own size; with an epsilon far above the noise of float32 sums, noise stays noise.
SCHEDULE = (
    "steps=4", "save_interval=2", "optimizer.warmup_steps=1", "optimizer.decay_steps=1", "optimizer.adam_eps=1e-4",
    "optimizer.ema_decay=0.7",
)  # fmt: skip
LAYOUTS = {
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "tp2-sp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel.pipeline_model_parallel_size=2", "micro_batch_size=1"],
    "dp2": ["micro_batch_size=1"],
    "pp2-vpp2": [
        "parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout=Et|t|t*2|L", "micro_batch_size=1",
    ],
    "cp2-gather": ["parallel.context_parallel_size=2", "parallel.overlap_param_gather=true"],
}  # fmt: skip
RESUMED = ("tp2", "pp2-vpp2")
HELD_OUT = ["validation.data={workspace}/text", "validation.samples=5", "validation.interval=2"]
PLAIN = [*HELD_OUT, "z_loss=0.01"]
LOSSES = {
    "plain": PLAIN,
    "taught": [
        *PLAIN, "distillation.teacher={workspace}/original-megatron", "distillation.temperature=2",
        "distillation.attention_weight=0.5",
    ],
    "wide": [*HELD_OUT, "distillation.teacher={workspace}/wide-megatron"],
}  # fmt: skip
"""What the loss is made of; the wide teacher has another hidden size, and its output layer is not its embedding."""
WITH_LOSSES = {
    **{f"taught-{layout}": LAYOUTS[layout] for layout in LAYOUTS},
    "taught-pp2-full": [*LAYOUTS["pp2"], "recompute=full"],
    "wide-pp2": LAYOUTS["pp2"],
    "plain-pp2-vpp2": LAYOUTS["pp2-vpp2"],
}
# The first pipeline stage trains nothing, its tied embedding neither; the last step's norm is above the median.
PARTS = [
    *HELD_OUT, "keep_best=true", "optimizer.spike_factor=1", "optimizer.spike_window=3",
    'optimizer.lr_scale={{"*": 0, attention: 1, latents: 0.5, "decoder.layers.[01].*": 0}}',
]  # fmt: skip
# The same of low-rank updates, with a teacher.
LORA = [*LOSSES["taught"], "lora.rank=4", "lora.alpha=10", "lora.targets=['decoder.layers.[23].*']"]
WITH_PARTS = {
    **{f"parts-{layout}": (layout, PARTS) for layout in ("pp2", "tp2-sp", "dp2")},
    **{f"lora-{layout}": (layout, LORA) for layout in ("pp2", "tp2", "tp2-sp")},
    "parts-resumed-pp2": ("pp2", PARTS),
    "lora-resumed-tp2": ("tp2", LORA),
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = ("steps=24", "save_interval=4", *LAYOUTS["tp2"])
"""Many more steps than a process does while it is found and killed."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("finetune-parallel"))
    make_llama(root / "wide", num_hidden_layers=4, hidden_size=96, tied=False, seed=1)
    run_tool("convert_hf_to_megatron", root / "wide", root / "wide-megatron")
    return root


@pytest.fixture(scope="module")
def results(workspace: Path) -> Path:
    """runs/<model>-single and runs/<model>-<layout>, and what one world of two made of resuming, stopping, bad words.

    <model>-resumed-<layout> went on from the single process's second step.
    """
    folder, runs = workspace / "runs", []

    def add(name: str, model: str, *words: str, fault: str | None = None) -> None:
        argv = run_words(workspace, model, folder / name, *SCHEDULE, *words)
        runs.append((name, argv, fault, 1, folder))

    for model in MODELS:
        single = finetune(workspace, model, folder / f"{model}-single", *SCHEDULE)
        for layout in RESUMED:
            put_back(single, folder / f"{model}-resumed-{layout}", 2)
            add(f"{model}-resumed-{layout}", model, *LAYOUTS[layout])
        for layout, words in LAYOUTS.items():
            add(f"{model}-{layout}", model, *words)
    for name, words in LOSSES.items():
        finetune(workspace, "mla", folder / f"{name}-single", *SCHEDULE, *_filled(words, workspace))
    for name, layout in WITH_LOSSES.items():
        add(name, "mla", *layout, *_filled(LOSSES[name.split("-")[0]], workspace))
    for name, words in (("parts", PARTS), ("lora", LORA)):
        finetune(workspace, "mla", folder / f"{name}-single", *SCHEDULE, *_filled(words, workspace))
    for name in [name for name in WITH_PARTS if "resumed" in name]:
        put_back(folder / f"{name.split('-')[0]}-single", folder / name, 2)
    for name, (layout, words) in WITH_PARTS.items():
        add(name, "mla", *LAYOUTS[layout], *_filled(words, workspace))
    add("unbroken", "mla", *LONG)
    add("stopped", "mla", "save_interval=4", fault="signal")
    add("full", "mla", "save_interval=1", *LAYOUTS["tp2"], fault="full disk")
    add("nan-stop", "mla", "save_interval=1", *LAYOUTS["dp2"], fault="nan")
    add("bad-batch", "mla", "global_batch_size=2")
    add("bad-data", "mla", "data.train=/nowhere/text")
    runs.sort(key=lambda run: [word for word in run[1] if word.startswith("parallel.")])
    run_world(2, folder, finetune_worker.run, runs)
    return folder


def _filled(words: list[str], workspace: Path) -> list[str]:
    return [word.format(workspace=workspace) for word in words]


def outcome(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((results / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"resumed-{layout}" for layout in RESUMED)])
@pytest.mark.parametrize("model", MODELS)
def test_same_as_one_process(results: Path, tmp_path: Path, model: str, layout: str) -> None:
    single, split = results / f"{model}-single", results / f"{model}-{layout}"
    assert [run["code"] for run in outcome(results, split.name)] == [0, 0]
    expected, found = read_log(single), read_log(split)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["lr"], b["tokens"]) == (a["lr"], a["tokens"])
    a, b = exported(single, tmp_path / "single"), exported(split, tmp_path / "split")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() < 1e-6, name
    before, after = checkpoint_tensors(single, 4), checkpoint_tensors(split, 4)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor - after[name]).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.parametrize("case", WITH_LOSSES)
def test_teacher_z_loss_and_validation_are_those_of_one_process(results: Path, case: str) -> None:
    """The first moments of step 2 are means of two steps' gradients, both taken before a weight was changed."""
    single, split = results / f"{case.split('-')[0]}-single", results / case
    assert [run["code"] for run in outcome(results, split.name)] == [0, 0], outcome(results, split.name)
    for a, b in zip(read_log(single), read_log(split), strict=True):
        if "validation_loss" in a:
            assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=1e-6)
        else:
            assert [b[key] for key in a if "loss" in key or key == "kl"] == pytest.approx(
                [a[key] for key in a if "loss" in key or key == "kl"], rel=1e-5
            )
    before, after = checkpoint_tensors(single, 2), checkpoint_tensors(split, 2)
    gradients = [key for key in before if key.startswith("optimizer.state.exp_avg.")]
    assert gradients and before.keys() == after.keys()  # the teacher is not saved
    for key in gradients:
        assert (before[key] - after[key]).abs().max() <= 1e-5 * before[key].abs().max(), key


@pytest.mark.parametrize("case", WITH_PARTS)
def test_frozen_parts_spikes_the_best_step_and_updates_are_those_of_one_process(
    workspace: Path, results: Path, tmp_path: Path, case: str
) -> None:
    single, split = results / f"{case.split('-')[0]}-single", results / case
    assert [run["code"] for run in outcome(results, case)] == [0, 0]
    assert [line["step"] for line in read_log(single) if "skipped" in line] == [4] * case.startswith("parts")
    again = put_back(split, tmp_path / "run", 2)
    finetune(workspace, "mla", again, *SCHEDULE, *_filled(WITH_PARTS[case][1], workspace))
    for root in (split, again):
        for a, b in zip(read_log(single), read_log(root), strict=True):
            assert a.get("skipped") == b.get("skipped")
            for key in {"loss", "validation_loss", "grad_norm"} & a.keys():
                assert b[key] == pytest.approx(a[key], rel=1e-4 if key == "grad_norm" else 1e-5)
        a, b = read_best(single), read_best(root)
        assert (a and a.step) == (b and b.step) and (a is not None) == case.startswith("parts")
        expected, found = checkpoint_tensors(single, 4), checkpoint_tensors(root, 4)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert (tensor - found[name]).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_goes_on_from_any_layout(workspace: Path, results: Path, tmp_path: Path, layout: str) -> None:
    root = put_back(results / f"mla-{layout}", tmp_path / "run", 2)
    finetune(workspace, "mla", root, *SCHEDULE)
    assert losses(root) == pytest.approx(losses(results / "mla-single"), rel=1e-5)


def test_a_signal_to_one_process_stops_all(results: Path) -> None:
    assert [run["code"] for run in outcome(results, "stopped")] == [0, 0]
    assert read_latest(results / "stopped") == 2 and len(read_log(results / "stopped")) == 2


def test_a_disk_full_on_one_process_ends_all(results: Path, tmp_path: Path) -> None:
    first, second = outcome(results, "full")
    assert (first["code"], second["code"], second["stderr"]) == (2, 2, "")
    (line,) = first["stderr"].splitlines()
    assert "step 2 cannot be saved" in line and "rank 1" in line and "File too large" in line and "step, 1," in line
    assert saved_steps(results / "full") == [1] and read_latest(results / "full") == 1
    run_tool("inspect_checkpoint", results / "full")


def test_a_nan_on_one_process_stops_all_and_is_named(results: Path) -> None:
    """Two processes of two micro batches of one sample each: the second process's first is the second of the step."""
    first, second = outcome(results, "nan-stop")
    assert (first["code"], second["code"], second["stderr"]) == (2, 2, "")
    (line,) = first["stderr"].splitlines()
    assert "step 2: loss nan" in line and "samples 5;" in line, line
    assert saved_steps(results / "nan-stop") == [1]
    run_tool("inspect_checkpoint", results / "nan-stop")


@pytest.mark.parametrize(("name", "part"), [("bad-batch", "2 data-parallel ranks"), ("bad-data", "/nowhere/text.bin")])
def test_bad_words_are_refused_once(results: Path, name: str, part: str) -> None:
    first, second = outcome(results, name)
    assert (first["code"], second["code"], second["stderr"]) == (2, 2, "")
    (line,) = first["stderr"].splitlines()
    assert line.startswith("error: ") and part in line
    assert not (results / name).exists()


def test_under_torchrun_a_signal_to_the_whole_job_still_saves(workspace: Path, tmp_path: Path) -> None:
    """Each process then gets it twice: from the sender and, passed on, from torchrun."""
    root = tmp_path / "run"
    words = run_words(workspace, "mla", root, "steps=5000", "save_interval=2", *LAYOUTS["tp2"])
    _, errors = terminate_at_step_3([*LAUNCHER, str(ROOT / "tools" / "finetune.py"), *words])
    stopped = read_latest(root)
    assert stopped is not None and 3 <= stopped == len(read_log(root)), errors
    finetune(workspace, "mla", root, "save_interval=2", f"steps={stopped + 2}")
    assert len(read_log(root)) == stopped + 2


@pytest.mark.slow
def test_under_torchrun_a_killed_process_has_all_start_again_and_go_on(
    workspace: Path, results: Path, tmp_path: Path
) -> None:
    """One of two processes gets SIGKILL once a step is saved; the end is, bit for bit, that of an unbroken run."""
    root, output = tmp_path / "run", tmp_path / "output.txt"
    words = run_words(workspace, "mla", root, *SCHEDULE, *LONG)
    with under_torchrun(root, output, "--max-restarts", "1", str(ROOT / "tools" / "finetune.py"), *words) as torchrun:
        worker = children(torchrun.pid, "finetune.py")[-1]
        started = children(worker, "")
        os.kill(worker, signal.SIGKILL)
        code = torchrun.wait(PATIENCE)
    assert code == 0, output.read_text()
    first, second = (int(step) for step in re.findall(r"from step (\d+) to 24", output.read_text()))
    assert first == 0 < second < 24
    assert log_text(root) == log_text(results / "unbroken")
    expected, found = (checkpoint_tensors(folder, 24) for folder in (results / "unbroken", root))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(command_line(process) for process in started)


def test_a_hung_process_ends_the_others(workspace: Path, tmp_path: Path) -> None:
    """The other of two waits for as long as it may and says so; what was saved is whole."""
    root, output = tmp_path / "run", tmp_path / "output.txt"
    words = ["steps=100000", "save_interval=2", "keep_last=2", "parallel.timeout_minutes=0.3", *LAYOUTS["tp2"]]
    words = run_words(workspace, "mla", root, *words)
    with under_torchrun(root, output, str(ROOT / "tools" / "finetune.py"), *words) as torchrun:
        worker = children(torchrun.pid, "finetune.py")[-1]
        os.kill(worker, signal.SIGSTOP)
        stopped, end = time.monotonic(), time.monotonic() + PATIENCE
        while "was waited for longer than" not in output.read_text():
            assert torchrun.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.05)
        waited = time.monotonic() - stopped
        os.kill(worker, signal.SIGKILL)  # torchrun asks it to end first, which it does not hear
        assert torchrun.wait(PATIENCE) != 0
    (line,) = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert "longer than parallel.timeout_minutes 0.3" in line and line.endswith("goes on from the newest complete step")
    assert waited > 0.9 * 60 * 0.3  # it had begun to wait when the other one was stopped, or after
    run_tool("inspect_checkpoint", root)


PATIENCE = 240


@contextmanager
def under_torchrun(root: Path, output: Path, *words: str) -> Iterator[subprocess.Popen[Any]]:
    """torchrun with two processes, once they have saved a step in `root`; ended at the end. output: what all say."""
    with output.open("w") as stream:
        torchrun = subprocess.Popen([*LAUNCHER, *words], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    end = time.monotonic() + PATIENCE
    try:
        while not (root.is_dir() and read_latest(root)):
            assert torchrun.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.01)
        yield torchrun
    finally:
        if torchrun.poll() is None:
            torchrun.terminate()  # it ends its processes, with SIGKILL after half a minute
            torchrun.wait(60)


def command_line(process: int) -> bytes:
    """Empty for a process that has ended."""
    file = Path(f"/proc/{process}/cmdline")
    return file.read_bytes() if file.exists() else b""
