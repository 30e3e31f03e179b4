"""tools/plan.py against processes that train for a step: what they hold, and what they send."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from tests.conftest import ROOT, run_tool
from tests.megatron_cases import original_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's kernels keep")

TP, PP, SP = (
    f"parallel.{key}"
    for key in ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true")
)
SETTINGS = ("implementation=local", "micro_batch_size=2", "global_batch_size=16", "data.sequence_length=32")
CASES: dict[int, dict[str, tuple[str, tuple[str, ...]]]] = {
    2: {
        "tp2": ("original", (TP, "dtype=bfloat16")),
        "tp2-sp": ("split", (TP, SP, "dtype=float32")),
        "tp2-sp-full": ("joint", (TP, SP, "dtype=float32", "recompute=full")),
        "pp2": ("joint", (PP, "dtype=float32")),
        "dp2": ("original", ("dtype=bfloat16",)),
    },
    4: {
        "tp2-pp2": ("original", (TP, PP, "dtype=float32")),
        "tp2-sp-pp2": ("original", (TP, PP, SP, "dtype=bfloat16")),
        "pp2-dp2": ("joint", (PP, "dtype=float32")),
        "tp2-sp-dp2": ("split", (TP, SP, "dtype=bfloat16")),
        "tp2-sp-pp2-full": ("joint", (TP, PP, SP, "dtype=float32", "recompute=full")),
        "tp2-pp2-full": ("split", (TP, PP, "dtype=float32", "recompute=full")),
    },
}
"""Processes -> case -> model, and the words of its layout."""

PADDING = 128
"""Numbers that Megatron rounds a tensor's place in a buffer, and a bucket's end, up to (or a multiple of fewer)."""


def model_config(kind: str) -> dict[str, Any]:
    """Original: biases, tied. Converted: r and c differ in every layer; joint tied, split not."""
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    if kind == "original":
        return original_config(**sizes, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    mla = MHA2MLAConfig(
        PartialRopeConfig(qk_rope_head_dim=[0, 4, 16, 8]), LowRankConfig(method=kind, kv_lora_rank=[24, 17, 20, 9])
    )
    config = original_config(**sizes, tie_word_embeddings=kind == "joint")
    return {**config, "model_type": "mha2mla_llama", "mha2mla": dataclasses.asdict(mla)}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_step(tmp_path: Path, processes: int) -> None:
    (tmp_path / "run.yaml").write_text("")
    cases = []
    for name, (kind, words) in CASES[processes].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model_config(kind)))
        cases.append({"name": name, "config": model_config(kind), "settings": [*SETTINGS, *words]})
        run_tool(
            "plan", tmp_path / "run.yaml", f"model={tmp_path / name}", f"gpus={processes}", "device=cpu", *SETTINGS,
            *words, f"output={tmp_path / name}.plan.json",
        )  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", "tests.distributed.plan_worker", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in CASES[processes]:
        plan = json.loads((tmp_path / f"{name}.plan.json").read_text())
        for rank in range(processes):
            check_rank(plan, json.loads((tmp_path / f"{name}.{rank}.json").read_text()), f"{name}, rank {rank}")


def check_rank(plan: dict[str, Any], real: dict[str, Any], where: str) -> None:
    stage = plan["stages"][real["stage"]]
    assert stage["parameter_count"] == sum(math.prod(shape) for shape in real["shapes"]), where
    padding = PADDING * (len(real["shapes"]) + real["buckets"])
    assert 0 <= real["gradients"] - stage["gradients"] <= 4 * padding, where
    # Megatron cuts each bucket, padding and all, into equal shards.
    assert abs(real["optimizer"] - stage["optimizer"]) <= 12 * padding, where
    assert not real["other"], where
    check_sent(stage["sent"], real["sent"], 4 * padding, where)
    if plan["recompute"] == "none":
        kept = stage["in_flight"] * sum(stage[key] for key in ("attention", "mlp", "layer_inputs", "output"))
        # Left out by the plan: token ids and the loss mask, 12 bytes of the 4000 and more of each token.
        assert kept == pytest.approx(real["saved"], rel=0.01), where


def check_sent(planned: dict[str, int], sent: dict[str, int], padding: int, where: str) -> None:
    """Byte for byte, but for the padding of the buffers that data-parallel ranks exchange."""
    by_group: Counter[str] = Counter()
    for kind, size in planned.items():
        group = "embedding" if "tied embedding" in kind else kind.split(":")[0]
        by_group[group] += size
    found: Counter[str] = Counter()
    for kind, size in sent.items():
        found[kind.split()[0]] += size
    assert by_group.keys() == found.keys(), where
    for group, size in by_group.items():
        assert 0 <= found[group] - size <= (2 * padding if group == "data" else 0), (where, group)
