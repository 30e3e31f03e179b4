"""Every parallel layout gives the results of a single process: logits, and the gradient of every parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.parallel import ParallelConfig, check_layout, initialize_parallel
from mha2mla_megatron.model.provider import build_model, sharded_weights, transformer_config
from tests.conftest import ROOT
from tests.distributed.parallel_worker import LAYOUTS, logits_and_gradients
from tests.megatron_cases import LLAMA3, converted_config, original_config, randomize

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

CASES = {
    "original": original_config(tie_word_embeddings=True),
    "original-biases": original_config(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "joint": converted_config("joint", tie_word_embeddings=True),
    "joint-biases": converted_config("joint", attention_bias=True, attention_output_bias=True),
    "split": converted_config("split"),
    "split-biases": converted_config("split", attention_bias=True, mlp_bias=True),
    "key": converted_config("key"),
    "value-biases": converted_config("value", attention_bias=True),
    "none-biases": converted_config("none", attention_bias=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case with the single process's results and those of every layout, from one world of two."""
    folder = tmp_path_factory.mktemp("parallel")
    parallel = ParallelConfig()
    initialize_parallel(parallel)
    for name, config in CASES.items():
        case = folder / name
        (case / "weights").mkdir(parents=True)
        (case / "config.json").write_text(json.dumps(config))
        architecture = parse_architecture(config, name)
        model = build_model(architecture, transformer_config(architecture, parallel, torch.float32))
        randomize(model)
        dist_checkpointing.save(sharded_weights(model), str(case / "weights"))
        torch.save(logits_and_gradients(model, architecture), case / "single.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.distributed.parallel_worker", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_same_as_a_single_process(results: Path, case: str, layout: str) -> None:
    single, split = torch.load(results / case / "single.pt"), torch.load(results / case / f"{layout}.pt")
    assert set(single) == set(split)
    for name, expected in single.items():
        scale = expected.abs().max()
        assert scale > 0, f"{name}: nothing to compare"
        assert (split[name] - expected).abs().max() / scale < 1e-5, name


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({"tensor_model_parallel_size": 4}, 4, "4 does not divide num_key_value_heads 2; valid for this model: 1, 2"),
        (
            {"pipeline_model_parallel_size": 3},
            3,
            "3 does not divide num_hidden_layers 4; valid for this model: 1, 2, 4",
        ),
        ({"tensor_model_parallel_size": 2}, 3, "3 processes were started, but one copy of the model takes 2"),
    ],
)
def test_impossible_layouts_are_refused(parallel: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(parse_architecture(original_config(), "test"), ParallelConfig(**parallel), world)


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(UserError, match=r"context_parallel_size: 2 is not supported yet; valid: 1"):
        check_layout(parse_architecture(original_config(), "test"), ParallelConfig(context_parallel_size=2), 2)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor_model_parallel_size: 0 is too small"):
        ParallelConfig(tensor_model_parallel_size=0)


def test_sequence_parallelism_is_off_with_one_process() -> None:
    parallel = ParallelConfig(sequence_parallel=True)
    architecture = parse_architecture(original_config(), "test")
    assert not transformer_config(architecture, parallel, torch.float32).sequence_parallel
