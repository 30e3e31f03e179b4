"""Blends, splits and the position in the data: which samples a run sees, counted one by one."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoModelForCausalLM

from mha2mla_megatron.data.blend import interleave
from mha2mla_megatron.data.dataset import build_dataset
from mha2mla_megatron.training import loop
from tests.conftest import refused, run_tool
from tests.finetune_cases import BATCH, EOD, LENGTH, VOCABULARY, make_workspace, read_log, run_words, write_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

PAPER = (0.70, 0.15, 0.08, 0.06, 0.01)
SCHEDULE = ("steps=6", "save_interval=3", "optimizer.warmup_steps=0", "optimizer.decay_steps=1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("blend"))


@pytest.fixture(scope="module")
def blend(workspace: Path) -> Path:
    """A YAML file of three sources, each of tokens that the others have not."""
    for index, (name, documents) in enumerate((("web", 60), ("books", 30), ("code", 20))):
        builder = IndexedDatasetBuilder(f"{workspace / name}.bin", dtype=numpy.uint16)
        generator = torch.Generator().manual_seed(index)
        for _ in range(documents):
            length = int(torch.randint(5, 30, (1,), generator=generator))
            tokens = torch.randint(10 + 80 * index, 90 + 80 * index, (length,), generator=generator)
            builder.add_document(torch.cat((tokens, torch.tensor([EOD]))), [length + 1])
        builder.finalize(f"{workspace / name}.idx")
    weights = "".join(f"    {workspace / name}: {w}\n" for name, w in (("web", 0.6), ("books", 0.3), ("code", 0.1)))
    file = workspace / "blend.yaml"
    file.write_text(f"data:\n  train:\n{weights}")
    return file


def blended(workspace: Path, blend: Path, save: Path, *words: str) -> list[str]:
    given = [word for word in run_words(workspace, "original", save, *SCHEDULE, *words) if "data.train" not in word]
    return [str(blend), *given[1:]]


@pytest.mark.parametrize("weights", [PAPER, (0.5, 0.5), (1 / 3, 2 / 3), (1.0,), "random"], ids=str)
def test_each_source_has_its_share_at_any_moment(weights: Any) -> None:
    """Of all first n samples, against exact fractions."""
    if weights == "random":
        weights = torch.rand(20, generator=torch.Generator().manual_seed(0)).double().pow(3)
        weights = (weights / weights.sum()).tolist()
    taken = interleave(weights, 5000)
    ideal = [Fraction(weight) for weight in weights]
    counts = numpy.cumsum(taken[:, None] == numpy.arange(len(weights)), axis=0)
    for n in (*range(1, 300), 999, 2500, 4999, 5000):
        assert max(abs(int(count) - share * n) for count, share in zip(counts[n - 1], ideal, strict=True)) < 1
    assert taken.dtype == numpy.int16


def test_an_epoch_of_every_source_has_each_token_once(tmp_path: Path) -> None:
    """Tokens that occur once each; as many samples as the sources have, in the proportion of their sizes."""
    sizes = {"a": 40 * LENGTH + 1, "b": 10 * LENGTH + 1}
    first = EOD + 1
    for name, size in sizes.items():
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=numpy.int32)
        for start in range(first, first + size, 37):
            document = torch.arange(start, min(start + 37, first + size))
            builder.add_document(document, [len(document)])
        builder.finalize(f"{tmp_path / name}.idx")
        first += size
    weights = {str(tmp_path / "a"): 4, str(tmp_path / "b"): 1}
    dataset: Any = build_dataset(weights, LENGTH, 50, 1, False, EOD, first, tmp_path / "cache")
    seen = torch.cat([dataset[i]["labels"] for i in range(50)]).tolist()
    assert len(set(seen)) == len(seen) == 50 * LENGTH  # all but the one token that begins each source
    assert [sum(dataset[i]["source"] == s for i in range(50)) for s in (0, 1)] == [40, 10]


def test_resuming_repeats_and_drops_nothing(
    tmp_path: Path, workspace: Path, blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies in its fifth step, after a save in its third, with what each step was given."""
    given: list[torch.Tensor] = []
    sample_batches = loop.sample_batches

    def recorded(*arguments: Any) -> Iterator[Any]:
        for batch in sample_batches(*arguments):
            given.append(torch.cat((batch["source"][:, None], batch["tokens"]), 1))
            if len(given) == stop_after:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(loop, "sample_batches", recorded)
    stop_after = 0
    run_tool("finetune", *blended(workspace, blend, tmp_path / "whole"))
    whole, given = torch.cat(given), []
    assert len(whole) == 6 * BATCH
    taken = [int((whole[:, 0] == source).sum()) for source in range(3)]
    assert all(abs(count - share * len(whole)) < 1 for count, share in zip(taken, (0.6, 0.3, 0.1), strict=True))

    micro_batches = BATCH // 2
    stop_after = 4 * micro_batches + 1
    assert run_tool("finetune", *blended(workspace, blend, tmp_path / "broken"), check=False).returncode == 130
    first, given, stop_after = torch.cat(given)[: 3 * BATCH], [], 0
    done = run_tool("finetune", *blended(workspace, blend, tmp_path / "broken"))
    assert "another order" not in done.stderr
    assert torch.equal(torch.cat((first, *given)), whole)
    assert [line["loss"] for line in read_log(tmp_path / "broken")] == [
        line["loss"] for line in read_log(tmp_path / "whole")
    ]

    given = []
    done = run_tool("finetune", *blended(workspace, blend, tmp_path / "broken", "steps=8", "seed=7"))
    warnings = [line for line in done.stderr.splitlines() if "another order" in line]
    assert "seed was 1234 and is 7" in warnings[0] and "was 24 and is 32" in warnings[1] and len(warnings) == 2


def test_a_corpus_made_anew_under_its_old_name(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample indices that another run, or this one before, left in the same folder are of the old corpus: a new run
    reads all of the new one, and one that goes on says that the order is another."""
    given: list[torch.Tensor] = []
    sample_batches = loop.sample_batches

    def recorded(*arguments: Any) -> Iterator[Any]:
        for batch in sample_batches(*arguments):
            given.append(batch["tokens"])
            yield batch

    monkeypatch.setattr(loop, "sample_batches", recorded)
    corpus = write_tokens(tmp_path / "corpus")

    def seen(save: str, *words: str) -> torch.Tensor:
        given.clear()
        common = (*SCHEDULE, f"data.train={corpus}", f"data.cache={tmp_path / 'cache'}", *words)
        done = run_tool("finetune", *run_words(workspace, "original", tmp_path / save, *common))
        assert ("another order" in done.stderr) == (save == "first" and bool(words)), done.stderr
        return torch.cat(given)

    old = seen("first")
    write_tokens(corpus, documents=8)
    new = seen("second")
    assert torch.equal(new, seen("third", f"data.cache={tmp_path / 'empty'}"))
    assert not torch.equal(new, old)
    assert seen("first", "steps=12").shape == (6 * BATCH, LENGTH)


def test_a_blend_of_the_command_line_takes_the_place_of_the_files(tmp_path: Path, workspace: Path) -> None:
    """Rates of parts, which are always a mapping, are added to those of the file."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"data: {{train: {{{workspace / 'text'}: 7, /nowhere/at/all: 3}}}}\noptimizer: {{lr_scale: {{mlp: 0.5}}}}\n"
    )
    write_tokens(workspace / "other", documents=20)
    words = run_words(workspace, "original", tmp_path / "run", *SCHEDULE, "steps=1", "optimizer.decay_steps=1")[1:]
    words = [word for word in words if not word.startswith("data.train")]
    assert "/nowhere/at/all.bin: no such file" in refused("finetune", file, *words)
    blend = f"data.train={{{workspace / 'other'}: 2, {workspace / 'text'}: 1}}"
    run_tool("finetune", file, *words, blend, "optimizer.lr_scale={norms: 0}")
    resolved = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert resolved["data"]["train"] == {str(workspace / "other"): 2, str(workspace / "text"): 1}
    assert resolved["optimizer"]["lr_scale"] == {"mlp": 0.5, "norms": 0.0}


def test_loss_of_each_source(tmp_path: Path, workspace: Path, blend: Path) -> None:
    """Against transformers and torch on the same samples."""
    run_tool("finetune", *blended(workspace, blend, tmp_path / "run"))
    weights = {str(workspace / name): w for name, w in (("web", 0.6), ("books", 0.3), ("code", 0.1))}
    dataset: Any = build_dataset(weights, LENGTH, 6 * BATCH, 1234, False, EOD, VOCABULARY, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(workspace / "original", dtype=torch.float32)
    batch = [dataset[i] for i in range(BATCH)]
    with torch.no_grad():
        logits = model(torch.stack([sample["tokens"] for sample in batch])).logits
    labels = torch.stack([sample["labels"] for sample in batch])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    expected: dict[str, list[float]] = {}
    for sample, loss in zip(batch, losses.tolist(), strict=True):
        expected.setdefault(("web", "books", "code")[sample["source"]], []).append(loss)
    found = read_log(tmp_path / "run")[0]["sources"]
    assert found.keys() == expected.keys() and len(found) > 1
    for name, values in expected.items():
        assert found[name]["tokens"] == len(values) * LENGTH
        assert found[name]["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)  # float32, other order


def test_split_gives_validation_and_test_samples_of_their_own(tmp_path: Path, workspace: Path, blend: Path) -> None:
    words = ("data.split=[8,1,1]", "validation.interval=2", "validation.samples=4")
    run_tool("finetune", *blended(workspace, blend, tmp_path / "run", *words))
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log if "validation_loss" in line] == [2, 4, 6]
    assert [line["step"] for line in log if "test_loss" in line] == [6]
    documents = [row.tolist() for row in IndexedDataset(str(workspace / "web"))]
    parts = documents[:48], documents[48:54], documents[54:]
    for part, theirs in enumerate(parts):
        dataset: Any = build_dataset(
            str(workspace / "web"), LENGTH, 12, 1, False, EOD, VOCABULARY, tmp_path / "cache", (8, 1, 1), part
        )
        pairs = {pair for document in theirs for pair in itertools.pairwise(document)}
        seen = {
            pair
            for i in range(12)
            for pair in zip(dataset[i]["tokens"].tolist(), dataset[i]["labels"].tolist(), strict=True)
            if pair[0] != EOD
        }
        assert seen and seen <= pairs, part
    line = refused("finetune", *blended(workspace, blend, tmp_path / "none", "data.split=[98,1,1]"))
    assert "web" in line and "60 documents" in line and "valid" in line


@pytest.mark.parametrize("model", ["original", "mla"])
def test_documents_do_not_see_each_other(tmp_path: Path, workspace: Path, model: str) -> None:
    """The loss of packed samples is that of their documents' pieces, each run by itself through transformers."""
    words = run_words(workspace, model, tmp_path / "run", *SCHEDULE, "steps=1", "data.reset_attention_mask=true")
    run_tool("finetune", *words, "data.reset_position_ids=true")
    dataset: Any = build_dataset(str(workspace / "text"), LENGTH, BATCH, 1234, False, EOD, VOCABULARY, tmp_path / "c")
    reference = AutoModelForCausalLM.from_pretrained(workspace / model, trust_remote_code=True, dtype=torch.float32)
    total, pieces, packed = 0.0, 0, 0.0
    for i in range(BATCH):
        tokens, labels = dataset[i]["tokens"], dataset[i]["labels"]
        ends = [0, *((tokens == EOD).nonzero().flatten() + 1).tolist(), LENGTH]
        with torch.no_grad():
            packed += _loss(reference(tokens[None]).logits[0], labels)
            for start, end in itertools.pairwise(ends):
                if end > start:
                    total += _loss(reference(tokens[None, start:end]).logits[0], labels[start:end])
                    pieces += 1
    (line,) = read_log(tmp_path / "run")
    assert pieces > 2 * BATCH
    assert line["loss"] == pytest.approx(total / (BATCH * LENGTH), rel=1e-5)  # float32
    assert abs(total - packed) / (BATCH * LENGTH) > 1e-3, "the mask would not show"


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()


def test_a_teacher_sees_what_the_student_sees(tmp_path: Path, workspace: Path) -> None:
    """Of a teacher with the student's weights there is nothing to learn, packed or not."""
    words = run_words(
        workspace, "original", tmp_path / "run", *SCHEDULE, "steps=1", "data.reset_attention_mask=true",
        f"distillation.teacher={workspace / 'original'}-megatron",
    )  # fmt: skip
    run_tool("finetune", *words)
    assert abs(read_log(tmp_path / "run")[0]["kl"]) < 1e-6


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "sum": (["data.train={{{w}/text: 0.7, {w}/web: 0.2}}"], ["sum to 0.9", "must sum to 1"]),
    "negative": (["data.train={{{w}/text: 1, {w}/web: -1}}"], ["web", "-1", "positive"]),
    "missing index": (["data.train={{{w}/text: 1, {w}/bare: 1}}"], ["bare.idx", "no such file"]),
    "split": (["data.split=[0,1,1]"], ["data.split", "training"]),
    "parts": (["data.split=[1,1]"], ["data.split", "three"]),
    "positions alone": (["data.reset_position_ids=true"], ["data.reset_position_ids", "reset_attention_mask=true"]),
    "fast kernels": (
        ["data.reset_attention_mask=true", "implementation=transformer_engine"],
        ["data.reset_attention_mask", "transformer_engine", "local"],
    ),
    "another end": (
        ["data.train={w}/other", "data.reset_attention_mask=true"],
        ["end with token 5", "eos token is 2"],
    ),
    "no ends": (["data.train={w}/endless", "data.eod_mask_loss=true"], ["end with token None", "eos token is 2"]),
    "narrow": (["data.train={w}/narrow"], ["uint16", "70000"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_settings_are_refused(tmp_path: Path, workspace: Path, blend: Path, case: str) -> None:
    words, named = REFUSED[case]
    (workspace / "bare.bin").write_bytes(b"")
    for name, about in (
        ("other", {"vocab_size": 9, "eod_id": 5}),
        ("endless", {"vocab_size": 9, "eod_id": None}),
        ("narrow", {"vocab_size": 70000}),
    ):
        write_tokens(workspace / name)
        (workspace / f"{name}.json").write_text(json.dumps(about))
    vocabulary = 80000 if case == "narrow" else VOCABULARY
    load = workspace / "original-megatron"
    if vocabulary != VOCABULARY:
        load = _with_vocabulary(load, tmp_path / "larger", vocabulary)
    given = run_words(workspace, "original", tmp_path / "run", *SCHEDULE)
    line = refused("finetune", *given, f"load={load}", *[word.format(w=workspace) for word in words])
    assert all(part in line for part in named), line
    assert not (tmp_path / "run").exists()


def _with_vocabulary(checkpoint: Path, target: Path, vocabulary: int) -> Path:
    """The checkpoint under a config of a larger vocabulary, which is all that is read before the data."""
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "hf" / "config.json").read_text())
    (target / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))
    return target


def test_narrow_tokens_of_unknown_origin_are_refused(tmp_path: Path, workspace: Path) -> None:
    load = _with_vocabulary(workspace / "original-megatron", tmp_path / "larger", 80000)
    words = run_words(workspace, "original", tmp_path / "run", *SCHEDULE, f"load={load}")
    line = refused("finetune", *words)
    assert "text.bin" in line and "uint16" in line and "80000" in line
