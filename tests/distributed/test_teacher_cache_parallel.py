"""A teacher's cache made by two processes, and read at several layouts of two, gives the results of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.conftest import run_tool
from tests.distributed import tool_worker
from tests.distributed.worlds import run_world
from tests.finetune_cases import SETTINGS, checkpoint_tensors, finetune, make_workspace, read_log, run_words

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

TP2 = "parallel.tensor_model_parallel_size=2"
MADE = {"dp2": ["data.workers=1"], "tp2": [TP2, "parallel.sequence_parallel=true"]}
PIPELINE = "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2": [TP2],
    "dp2": [],
    "pp2": [PIPELINE],
    "pp2-vpp2": [
        PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout=Et|t|t*2|L",
    ],
    "cp2": ["parallel.context_parallel_size=2"],
}  # fmt: skip
# Ten steps are more than one epoch of 34 samples.
WORDS = (
    "steps=10", "save_interval=2", "micro_batch_size=1", "optimizer.warmup_steps=2", "optimizer.decay_steps=1",
    "optimizer.adam_eps=1e-4", "distillation.temperature=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache-single and cache-<layout> of 8 tokens each; run-single and run-<layout>, which read cache-single."""
    root = make_workspace(tmp_path_factory.mktemp("teacher-cache-parallel"))

    def made(name: str, *words: str) -> list[str]:
        return [
            str(root / "settings.yaml"), f"teacher={root / 'original'}-megatron", f"data.train={root / 'text'}",
            f"distillation.cache={root / name}", *SETTINGS, *WORDS, "top_k=8", "samples_per_file=4", *words,
        ]  # fmt: skip

    run_tool("cache_teacher", *made("cache-single"))
    taught = [*WORDS, f"distillation.cache={root / 'cache-single'}"]
    finetune(root, "mla", root / "run-single", *taught)
    jobs: list[tuple[Any, ...]] = [("cache_teacher", made(f"cache-{layout}", *words)) for layout, words in MADE.items()]
    for layout, words in LAYOUTS.items():
        unread = 0 if PIPELINE in words else None  # the first stage has no loss
        jobs.append(("finetune", run_words(root, "mla", root / f"run-{layout}", *taught, *words), unread))
    run_world(2, root, tool_worker.run, jobs)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_that_of_one_process(results: Path, layout: str) -> None:
    """The first moments of step 2 are means of two steps' gradients, both taken before a weight was changed."""
    first, second = read_log(results / "run-single"), read_log(results / f"run-{layout}")
    assert len(first) == len(second) == 10 and first[0]["kl"] > 0.1
    for a, b in zip(first, second, strict=True):
        assert [b[key] for key in ("loss", "kl")] == pytest.approx([a[key] for key in ("loss", "kl")], rel=1e-5)
    before, after = (checkpoint_tensors(results / f"run-{name}", 2) for name in ("single", layout))
    for key in (key for key in before if key.startswith("optimizer.state.exp_avg.")):
        assert (before[key] - after[key]).abs().max() <= 1e-5 * before[key].abs().max(), key


def test_data_parallel_processes_make_the_same_files(results: Path) -> None:
    single, split = (sorted((results / f"cache-{name}").glob("*/0*.npy")) for name in ("single", "dp2"))
    assert len(single) == 9 and [file.name for file in single] == [file.name for file in split]
    assert [file.read_bytes() for file in single] == [file.read_bytes() for file in split]


def test_tensor_parallel_processes_find_the_same_tokens(results: Path) -> None:
    """But for ties, and for the rounding of sums in another order, which may move a float16 by one step."""
    for file in sorted((results / "cache-single").glob("*/0*.npy")):
        a, b = numpy.load(file), numpy.load(results / "cache-tp2" / file.relative_to(results / "cache-single"))
        assert (a["ids"] == b["ids"]).mean() > 0.99 and (a["tokens_crc32"] == b["tokens_crc32"]).all()
        numpy.testing.assert_allclose(a["log_probs"].astype("f8"), b["log_probs"].astype("f8"), rtol=2**-10, atol=1e-6)
