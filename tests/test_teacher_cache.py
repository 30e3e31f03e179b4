"""tools/cache_teacher.py and runs that learn from what it wrote, against a teacher that runs along and transformers."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from mha2mla_megatron.training import cache_teacher
from mha2mla_megatron.training.top_k_divergence import TopK, top_k
from tests.conftest import ROOT, refused, run_tool
from tests.finetune_cases import (
    BATCH,
    LENGTH,
    SETTINGS,
    VOCABULARY,
    checkpoint_tensors,
    finetune,
    logits_of,
    make_workspace,
    put_back,
    run_words,
    samples,
    steps_of,
    write_tokens,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

TEMPERATURE = 2.0
SCHEDULE = ("optimizer.warmup_steps=2", "optimizer.decay_steps=1", "distillation.weight=0.7")
TAUGHT = f"distillation.temperature={TEMPERATURE}"
EPOCH = 8
"""Steps in the first epoch of the text, which has 34 samples."""
KL_LIMIT = 2e-3
"""Relative: float16 has steps of up to 2^-11 of a logarithm, which is -10 at most where it matters; that much of a
probability, and about so much of their divergence."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("teacher-cache"))
    write_tokens(root / "other", documents=50)
    write_tokens(root / "short", documents=25)
    return root


def cache_words(workspace: Path, folder: Path, *words: str) -> list[str]:
    return [
        str(workspace / "settings.yaml"), f"teacher={workspace / 'original'}-megatron", f"distillation.cache={folder}",
        f"data.train={workspace / 'text'}", *SETTINGS, TAUGHT, f"steps={EPOCH}", "samples_per_file=5", *words,
    ]  # fmt: skip


def make_cache(workspace: Path, folder: Path, *words: str) -> Path:
    run_tool("cache_teacher", *cache_words(workspace, folder, *words))
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    """Of the whole vocabulary, for all of an epoch."""
    return make_cache(workspace, workspace / "whole", f"top_k={VOCABULARY}", "steps=30")


@pytest.fixture(scope="module")
def eight(workspace: Path) -> Path:
    return make_cache(workspace, workspace / "eight", "top_k=8", f"steps={EPOCH}")


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in sorted(cache.glob("*/0*.npy"))}


def coarse_kl(student: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """T^2 KL of the teacher's k most probable tokens and all others as one."""
    p, q = ((x / TEMPERATURE).softmax(-1) for x in (teacher, student))
    top = p.topk(k, -1).indices
    p, q = (torch.cat((x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)), -1) for x in (p, q))
    return TEMPERATURE**2 * (p * (p / q).log()).sum(-1)


LIKE_LIVE = {
    "plain": [],
    "blend": ["data.train={{{workspace}/text: 0.6, {workspace}/other: 0.4}}", "micro_batch_size=4"],
    "reset": ["data.reset_attention_mask=true", "implementation=local", "data.workers=1"],
}


@pytest.mark.parametrize("case", LIKE_LIVE)
def test_the_whole_vocabulary_is_the_live_teacher(workspace: Path, tmp_path: Path, case: str) -> None:
    """In the first epoch, whose samples are the same. Loss and gradient norm of each step, and the first step's
    gradient, of which the first moment is a tenth; float64 logits and probabilities: tests/test_distillation.py."""
    words = [word.format(workspace=workspace) for word in LIKE_LIVE[case]]
    cache = make_cache(workspace, tmp_path / "cache", f"top_k={VOCABULARY}", *words)
    words = [*SCHEDULE, TAUGHT, f"steps={EPOCH}", "save_interval=1", *words]
    live, cached = (
        finetune(workspace, "mla", tmp_path / name, *words, f"distillation.{key}={value}")
        for name, key, value in (
            ("live", "teacher", workspace / "original-megatron"), ("cached", "cache", cache),
        )
    )  # fmt: skip
    first, second = steps_of(live), steps_of(cached)
    assert len(first) == len(second) == EPOCH and first[0]["kl"] > 0.1
    for a, b in zip(first, second, strict=True):
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=1e-5 if a["step"] < 3 else KL_LIMIT)
        assert b["kl"] == pytest.approx(a["kl"], rel=KL_LIMIT)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=KL_LIMIT)
        assert a["distillation_weight"] == b["distillation_weight"] == 0.7
    before, after = checkpoint_tensors(live, 1), checkpoint_tensors(cached, 1)
    assert before.keys() == after.keys()
    for name in (name for name in before if name.startswith("optimizer.state.exp_avg.")):
        assert (before[name] - after[name]).abs().max() <= KL_LIMIT * before[name].abs().max(), name


def test_fewer_tokens_than_the_vocabulary(workspace: Path, eight: Path, tmp_path: Path) -> None:
    """Of the first two steps: the first has rate 0."""
    root = finetune(
        workspace, "mla", tmp_path / "run", *SCHEDULE, TAUGHT, f"steps={EPOCH}", f"distillation.cache={eight}"
    )
    tokens, _ = samples(workspace / "text", tmp_path / "indices", 2 * BATCH)
    student, teacher = (logits_of(workspace / model, tokens) for model in ("mla", "original"))
    found, full = (coarse_kl(student, teacher, k) for k in (8, VOCABULARY - 1))
    assert found[:BATCH].mean() < 0.97 * full[:BATCH].mean()  # there is a difference to be seen
    for step, line in enumerate(steps_of(root)[:2]):
        assert line["kl"] == pytest.approx(found[step * BATCH :][:BATCH].mean().item(), rel=KL_LIMIT)
        assert line["loss"] == pytest.approx(0.3 * line["lm_loss"] + 0.7 * line["kl"], rel=1e-6)


def test_every_epoch_finds_its_samples(workspace: Path, whole: Path, tmp_path: Path) -> None:
    """With rate 0 and one sample a step, the losses of a step say which sample it was, and whose predictions."""
    short, size = workspace / "short", 14
    words = [f"data.train={short}", "global_batch_size=1", "micro_batch_size=1", f"steps={3 * size}"]
    make_cache(workspace, whole, f"top_k={VOCABULARY}", *words)  # a second source of the same cache
    root = finetune(
        workspace, "mla", tmp_path / "run", *SCHEDULE, TAUGHT, *words, "optimizer.lr=0", f"distillation.cache={whole}"
    )
    tokens, labels = samples(short, tmp_path / "indices", size)
    student, teacher = (logits_of(workspace / model, tokens) for model in ("mla", "original"))
    lm = torch.nn.functional.cross_entropy(student.transpose(1, 2), labels, reduction="none").mean(-1)
    expected = list(zip(lm.tolist(), coarse_kl(student, teacher, VOCABULARY - 1).mean(-1).tolist(), strict=True))
    orders = []
    for epoch in range(3):
        lines = steps_of(root)[epoch * size :][:size]
        orders.append(
            [min(range(size), key=lambda i, line=line: abs(lm[i].item() - line["lm_loss"])) for line in lines]
        )
        for number, line in zip(orders[-1], lines, strict=True):
            assert (line["lm_loss"], line["kl"]) == pytest.approx(expected[number], rel=KL_LIMIT)
    assert orders[0] == list(range(size)) and sorted(orders[1]) == sorted(orders[2]) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_resumed_in_the_second_epoch_equals_unbroken(workspace: Path, whole: Path, tmp_path: Path) -> None:
    words = [*SCHEDULE, TAUGHT, "steps=14", "save_interval=7", "global_batch_size=6", f"distillation.cache={whole}"]
    unbroken = finetune(workspace, "mla", tmp_path / "unbroken", *words)
    broken = finetune(workspace, "mla", put_back(unbroken, tmp_path / "broken", 7), *words)
    kept = ("step", "loss", "lm_loss", "kl", "grad_norm")
    first, second = ([{key: line[key] for key in kept} for line in steps_of(run)] for run in (unbroken, broken))
    assert first == second and len(first) == 14
    before, after = checkpoint_tensors(unbroken, 14), checkpoint_tensors(broken, 14)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def test_a_run_that_changes_its_kind_of_teacher_says_that_samples_come_in_another_order(
    workspace: Path, whole: Path, tmp_path: Path
) -> None:
    words = [*SCHEDULE, TAUGHT, "steps=4", "save_interval=2"]
    root = finetune(workspace, "mla", tmp_path / "run", *words, f"distillation.cache={whole}")
    live = f"distillation.teacher={workspace / 'original'}-megatron"
    done = run_tool("finetune", *run_words(workspace, "mla", put_back(root, tmp_path / "live", 2), *words, live))
    assert "cut alike (distillation.cache) was True and is False: samples come in another order" in done.stderr
    again = put_back(root, tmp_path / "again", 2)
    done = run_tool("finetune", *run_words(workspace, "mla", again, *words, f"distillation.cache={whole}"))
    assert "another order" not in done.stderr


def test_a_killed_cache_is_refused_and_goes_on_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "long", documents=600)
    words = [f"data.train={tmp_path / 'long'}", "samples_per_file=1", "steps=80"]
    run_tool("cache_teacher", *cache_words(workspace, tmp_path / "unbroken", *words))
    command = [sys.executable, str(ROOT / "tools" / "cache_teacher.py")]
    process = subprocess.Popen(
        [*command, *cache_words(workspace, tmp_path / "killed", *words)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(files_of(tmp_path / "killed")) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expected, found = files_of(tmp_path / "unbroken"), files_of(tmp_path / "killed")
    assert len(expected) == 320 and 20 <= len(found) < 320
    assert found == {name: data for name, data in expected.items() if name in found}
    line = refused("finetune", *run_words(
        workspace, "mla", tmp_path / "run", f"distillation.cache={tmp_path / 'killed'}", TAUGHT, *words[::2]
    ))  # fmt: skip
    assert f"holds {len(found)} of the 320 samples" in line and "tools/cache_teacher.py goes on" in line
    assert not (tmp_path / "run").exists()
    done = run_tool("cache_teacher", *cache_words(workspace, tmp_path / "killed", *words))
    assert files_of(tmp_path / "killed") == expected
    assert "teacher: 0.01024/0.01024 M tokens" in done.stderr and "10240, 130.2 bytes a token" in done.stdout
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_more_steps_add_to_a_cache(workspace: Path, eight: Path, tmp_path: Path) -> None:
    """Files of 5 samples: those of two steps are in two files, which stay."""
    cache = make_cache(workspace, tmp_path / "cache", "top_k=8", "steps=2")
    times = {file: file.stat().st_mtime_ns for file in cache.glob("*/0*.npy")}
    assert len(times) == 2
    make_cache(workspace, cache, "top_k=8")
    assert files_of(cache) == files_of(eight) and len(files_of(cache)) == 7
    assert all(file.stat().st_mtime_ns == made for file, made in times.items())


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(workspace: Path, tmp_path: Path) -> None:
    """No file can grow beyond 100 kB; one of these has 1.1 MB."""
    words = cache_words(workspace, tmp_path / "cache", f"top_k={VOCABULARY}", "samples_per_file=34")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        line = refused("cache_teacher", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "distillation.cache: " in line and "00000000.npy: cannot be written (File too large)" in line, line
    assert not list((tmp_path / "cache").glob("*/*00000*"))


def test_a_teacher_without_numbers_is_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth sample of the second file, of which nothing is left; its micro batch is of two."""
    calls = []

    def broken(logits: torch.Tensor, *arguments: Any) -> TopK:
        calls.append(logits)
        found = top_k(logits, *arguments)
        if len(calls) == 5:  # after three of the first file
            found.log_probs[LENGTH + 3, 2] = torch.nan
        return found

    monkeypatch.setattr(cache_teacher, "top_k", broken)
    line = refused("cache_teacher", *cache_words(workspace, tmp_path / "cache"))
    assert "original-megatron: gives NaN for sample 8 of " in line, line
    assert sorted(files_of(tmp_path / "cache"))[0].endswith("00000000.npy") and len(files_of(tmp_path / "cache")) == 1


def replace_in_manifest(cache: Path, **changes: Any) -> None:
    file = cache / "teacher_cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip(cache: Path) -> None:
    """A byte of a log-probability of the first sample."""
    file = next(cache.glob("*/00000000.npy"))
    data = bytearray(file.read_bytes())
    data[len(data) - 4 * len(data) // 5 - 10] ^= 1
    file.write_bytes(data)


def cut(cache: Path) -> None:
    file = next(cache.glob("*/00000002.npy"))
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], Any] | None, list[str], list[str]]] = {
    "length": (None, ["data.sequence_length=16"], ["data.sequence_length 32", "16"]),
    "seed": (None, ["seed=5"], ["seed 1234", "5"]),
    "split": (None, ["data.split=[9,1,0]"], ["data.split", "[9.0, 1.0, 0.0]"]),
    "reset": (None, ["data.reset_attention_mask=true"], ["data.reset_attention_mask False", "True"]),
    "temperature": (None, ["distillation.temperature=1"], ["distillation.temperature 2.0", "1.0"]),
    "corpus": (None, ["data.train={workspace}/other"], ["other token files than", "/other", "/text"]),
    "nothing": (shutil.rmtree, [], ["no cache of a teacher", "tools/cache_teacher.py"]),
    "manifest": (lambda cache: (cache / "teacher_cache.json").write_text("{"), [], ["teacher_cache.json", "JSON"]),
    "no top_k": (lambda cache: replace_in_manifest(cache, top_k=None), [], ["teacher_cache.json", "damaged"]),
    "format": (lambda cache: replace_in_manifest(cache, format=2), [], ["format 2", "valid: 1"]),
    "vocabulary": (
        lambda cache: replace_in_manifest(
            cache, run={**json.loads((cache / "teacher_cache.json").read_text())["run"], "the vocabulary": 257}
        ),
        [],
        ["the vocabulary 257", "256"],
    ),
    "missing": (lambda cache: next(cache.glob("*/00000001.npy")).unlink(), [], ["holds 27 of the 32 samples"]),
    "cut": (cut, [], ["00000002.npy", "damaged", "makes it again"]),
    "attention": (None, ["distillation.attention_weight=1"], ["attention_weight: 1.0", "distillation.teacher is not"]),
    "live too": (None, ["distillation.teacher=x"], ["distillation.cache", "distillation.teacher x too"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_run_refuses_what_is_not_its_cache(workspace: Path, eight: Path, tmp_path: Path, case: str) -> None:
    damage, words, named = DAMAGES[case]
    cache = shutil.copytree(eight, tmp_path / "cache")
    if damage is not None:
        damage(cache)
    words = [f"steps={EPOCH}", TAUGHT, f"distillation.cache={cache}", *words]
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "run", *(
        word.format(workspace=workspace) for word in words
    )))  # fmt: skip
    assert "distillation." in line and all(part in line for part in named), line
    assert not (tmp_path / "run").exists(), "something was written"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_number_and_other_tokens_are_found_as_they_are_read(
    workspace: Path, eight: Path, tmp_path: Path, workers: int
) -> None:
    """And what was found damaged is made again once it is deleted."""
    cache = shutil.copytree(eight, tmp_path / "cache")
    words = [f"steps={EPOCH}", TAUGHT, f"distillation.cache={cache}", f"data.workers={workers}"]
    words = run_words(workspace, "mla", tmp_path / "run", *words)
    flip(cache)
    line = refused("finetune", *words)
    readers = [child for child in multiprocessing.active_children() if "Manager" not in child.name]  # Megatron's stays
    assert readers == []  # Python would wait for them at its end
    assert "00000000.npy: damaged at sample " in line and line.endswith("run tools/cache_teacher.py"), line
    next(cache.glob("*/00000000.npy")).unlink()
    make_cache(workspace, cache, "top_k=8")
    assert files_of(cache) == files_of(eight)
    file = next(cache.glob("*/00000001.npy"))
    shutil.copy(file, file.with_name("00000000.npy"))
    assert "is of other tokens than the run's" in refused("finetune", *words)


TOOL_REFUSES = {
    "top_k": (["top_k=9"], ["made with top_k 8", "9"]),
    "files": (["top_k=8", "samples_per_file=6"], ["samples_per_file 5", "6"]),
    "teacher": (["top_k=8", "teacher={workspace}/partial-megatron"], ["teacher_sha256", "another folder"]),
    "too many": (["top_k=257"], ["top_k: 257", "256"]),
    "none": (["top_k=0"], ["top_k: 0"]),
    "no teacher": (["teacher=/nowhere"], ["teacher: /nowhere"]),
    "damaged": (["teacher={tmp}/teacher", "distillation.cache={tmp}/new"], ["teacher: ", ".distcp"]),
    "pipeline": (["parallel.pipeline_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size: 2", "1 alone"]),
    "length": (["data.sequence_length=256"], ["data.sequence_length", "128"]),
    "short": (["data.train={tmp}/short", "data.sequence_length=128"], ["/short", "shorter than a sample", "128"]),
    "folder": (["distillation.cache={workspace}"], ["{workspace}", "is no cache of a teacher"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TOOL_REFUSES)
def test_bad_words_and_another_cache_are_refused(workspace: Path, eight: Path, tmp_path: Path, case: str) -> None:
    words, named = TOOL_REFUSES[case]
    write_tokens(tmp_path / "short", documents=2)
    wrong = shutil.copytree(workspace / "original-megatron", tmp_path / "teacher")
    data = next(wrong.glob("iter_*/*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    before = sorted(workspace.rglob("*"))
    found = [word.format(workspace=workspace, tmp=tmp_path) for word in words]
    line = refused("cache_teacher", *cache_words(workspace, eight, *found))
    assert all(part.format(workspace=workspace) in line for part in named), line
    assert sorted(workspace.rglob("*")) == before and not (tmp_path / "new").exists(), "something was written"


def test_predictions_are_those_of_transformers(workspace: Path, eight: Path, tmp_path: Path) -> None:
    """Ids in their order, where float32 can tell them apart; their log-probabilities, and what is left, in float16."""
    tokens, _ = samples(workspace / "text", tmp_path / "indices", 34)
    log_p = (logits_of(workspace / "original", tokens) / TEMPERATURE).log_softmax(-1)
    found = numpy.concatenate([numpy.load(file) for file in sorted(eight.glob("*/0*.npy"))])
    values, ids = log_p.topk(9, -1)
    clear = ((values[..., :8] - values[..., 1:]) > 1e-4).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(torch.from_numpy(found["ids"].astype(numpy.int64))[clear], ids[..., :8][clear])
    rest = (1 - values[..., :8].exp().sum(-1)).log()
    expected = torch.cat((values[..., :8], rest[..., None]), -1)
    torch.testing.assert_close(torch.from_numpy(found["log_probs"]).double(), expected, rtol=2**-11, atol=1e-4)
