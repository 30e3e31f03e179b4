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
from mha2mla_megatron.model.parallel import ParallelConfig, check_batches, check_layout, initialize_parallel
from mha2mla_megatron.model.provider import build_model, sharded_weights, transformer_config
from tests.conftest import ROOT
from tests.distributed.parallel_worker import LAYOUTS, logits_and_gradients
from tests.megatron_cases import LLAMA3, SHORT_NAMES, converted_config, original_config, randomize

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

CASES = {
    "original": original_config(tie_word_embeddings=True),
    "original-biases": original_config(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "joint": converted_config("joint", tie_word_embeddings=True),
    "joint-biases": converted_config("joint", attention_bias=True, attention_output_bias=True),
    "split": converted_config("split"),
    "split-biases": converted_config("split", attention_bias=True, mlp_bias=True),
    "key": converted_config("key"),
    "shared-biases": converted_config("joint", True, attention_bias=True),
    "shared": converted_config("none", True),
    "original-norms": {**original_config(), "model_type": "qwen3"},
    "value-norms": converted_config("value", qk_norm=True),
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


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "kv heads by tp": ("original", dict(tp=4), 4, "4 does not divide num_key_value_heads 2; .* model: 1, 2"),
    "mlp by tp": ("narrow", dict(tp=2), 2, "2 does not divide intermediate_size 45; valid for this model: 1$"),
    "latents by tp": ("heads", dict(tp=8), 8, "8 does not divide the latents' width in layer 0, 12; .* 1, 2, 4$"),
    "rotated key by tp": ("shared", dict(tp=4), 4, "4 does not divide the width qk_rope_head_dim .* 3, 10; .* 1, 2$"),
    "layers by pp": ("joint", dict(pp=3), 3, "3 does not divide num_hidden_layers 4; valid for this model: 1, 2, 4;"),
    "layers by vpp": ("joint", dict(pp=2, vpp=4), 2, "4 does not divide the 2 layers of each of 2 .* model: 1, 2;"),
    "vpp without pp": ("joint", dict(vpp=2), 1, "virtual_pipeline_.*: 2 needs .*pipeline_model_parallel_size of at"),
    "too few chunks": ("joint", dict(pp=2, stages="Et*4L"), 2, "has 1 chunks, but pipeline 2 x .* 1 make 2"),
    "too many chunks": ("joint", dict(pp=2, stages="E|t*4|L"), 2, "has 3 chunks, but pipeline 2 x .* 1 make 2"),
    "chunks of one stage": ("joint", dict(stages="Et|t*3L"), 1, "has 2 chunks, but pipeline 1 x .* 1 make 1"),
    "too many layers": ("joint", dict(pp=2, stages="Et*3|t*2L"), 2, "has 5 layers t, .* num_hidden_layers 4"),
    "an empty chunk": ("joint", dict(pp=2, vpp=2, stages="Et*2||t|tL"), 2, "chunk 1 of 4 is empty"),
    "no embedding": ("joint", dict(pp=2, stages="t*2|t*2L"), 2, "not one E first, then 4 layers t, then one L"),
    "loss too early": ("joint", dict(pp=2, stages="Et*2L|t*2"), 2, "not one E first, then 4 layers t, then one L"),
    "unknown letter": ("joint", dict(pp=2, stages="Ex|t*4L"), 2, "Invalid layer character: x"),
    "world": ("original", dict(tp=2), 3, "3 processes were started, but one copy of the model takes 2"),
    "world by cp": ("joint", dict(cp=2, pp=2), 6, r"6 processes .* takes 4 \(tensor 1 x pipeline 2 x context 2\)"),
    "batch": ("joint", dict(batch=6), 4, "global_batch_size: 6 does not divide by micro_batch_size 1 x 4 data"),
    "micro batches": ("joint", dict(pp=2, vpp=2, batch=6), 4, "6 gives 3 micro .*size 2: give a multiple of 4"),
    "sequence by cp": ("joint", dict(cp=2, length=30), 2, "length: 30 .*context_parallel_size 2 .* a multiple of 4"),
    "sequence by tp": ("joint", dict(tp=2, sp=True, length=15), 2, "length: 15 .*size 2; give a multiple of 2"),
    "sequence by both": ("joint", dict(tp=4, cp=2, sp=True, length=12), 8, "length: 12 .*size 4; give a multiple of 8"),
    "size": ("original", dict(tp=0), 1, r"parallel\.tensor_model_parallel_size: 0 is too small"),
    "virtual size": ("original", dict(vpp=0), 1, r"parallel\.virtual_pipeline_model_parallel_size: 0 is too small"),
    "communication": ("original", dict(comm="ring"), 1, "cp_comm_type: unknown value 'ring'; valid: p2p, all_gather"),
    "overlap": ("original", dict(reduce=False, gather=True), 1, "overlap_param_gather: true needs .*grad_reduce"),
}  # fmt: skip
"""Name -> model, layout, processes, what is said."""
REFUSED_MODELS = {
    "original": original_config(),
    "narrow": original_config(intermediate_size=45),
    "joint": converted_config("joint", num_key_value_heads=4),
    "shared": converted_config("joint", True, num_key_value_heads=4),
    "heads": converted_config("joint", num_attention_heads=8, num_key_value_heads=8),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_layouts_are_refused(case: str) -> None:
    model, sizes, world, message = IMPOSSIBLE[case]
    sizes = {"batch": world * 4, "length": 32, **sizes}
    batch, length = sizes.pop("batch"), sizes.pop("length")
    with pytest.raises(UserError, match=message):
        parallel = ParallelConfig(**{SHORT_NAMES[key]: value for key, value in sizes.items()})
        check_layout(parse_architecture(REFUSED_MODELS[model], "test"), parallel, world)
        check_batches(parallel, world, length, 1, batch)


def test_sequence_parallelism_is_off_with_one_process() -> None:
    parallel = ParallelConfig(sequence_parallel=True)
    architecture = parse_architecture(original_config(), "test")
    assert not transformer_config(architecture, parallel, torch.float32).sequence_parallel
