"""examples/multi_node: its scripts run, and its layouts divide their models and fit their GPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.model.parallel import check_layout
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.checks import check_samples
from mha2mla_megatron.training.config import FinetuneSettings
from tests.conftest import ROOT, make_llama, make_tokenizer, run_tool
from tests.finetune_cases import finetune, losses, read_log, run_words, write_tokens

EXAMPLES = ROOT / "examples" / "multi_node"
GPUS = {"llama-2-7b": 16, "llama-2-13b": 16, "llama-2-70b": 32}
"""As the first line of each YAML file says."""


@pytest.mark.parametrize("name", GPUS)
def test_layouts_divide_and_fit(name: str) -> None:
    config, model = EXAMPLES / f"{name}.yaml", EXAMPLES / name
    settings, architecture = load_settings(FinetuneSettings, [], config), read_architecture(model)
    check_layout(architecture, settings.parallel, GPUS[name])
    check_samples(settings, architecture, GPUS[name])
    words = ("partial_rope.qk_rope_head_dim=16", "low_rank.method=joint", "low_rank.d_kv=64")
    assert " ".join(words) in config.read_text() and f"{GPUS[name] // 8} nodes of 8 GPUs" in config.read_text()
    text = run_tool("plan", config, f"model={model}", f"gpus={GPUS[name]}", *words).stdout
    assert ": fits into 74.00 GiB" in text


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda file: file.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("missing", ["NNODES", "MASTER_ADDR"])
def test_the_launcher_says_what_is_not_set(missing: str) -> None:
    env = {**os.environ, "NNODES": "2", "MASTER_ADDR": "localhost"}
    del env[missing]
    done = subprocess.run(["bash", str(EXAMPLES / "torchrun.sh"), "x.yaml"], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and f"{missing}: set it to" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two nodes on one machine would share a GPU")
def test_two_nodes_train_as_one_process_and_go_on(tmp_path: Path) -> None:
    """The launcher, once for each of two nodes of one process, both here; then again, until one node is told to stop,
    by when it has saved what it did."""
    make_tokenizer(make_llama(tmp_path / "model"))
    run_tool("convert_hf_to_megatron", tmp_path / "model", tmp_path / "model-megatron")
    write_tokens(tmp_path / "text")
    (tmp_path / "settings.yaml").write_text("")
    words = ("steps=2", "micro_batch_size=1", "optimizer.warmup_steps=0", "optimizer.decay_steps=1")
    single, two = finetune(tmp_path, "model", tmp_path / "single", *words), tmp_path / "two"

    nodes = start_nodes(tmp_path, run_words(tmp_path, "model", two, *words))
    check_ended(nodes)
    # Sums of float32 in another order.
    assert losses(two) == pytest.approx(losses(single), rel=1e-5)
    assert saved_steps(two) == [2]
    manifest = json.loads((two / "iter_0000002" / "manifest.json").read_text())
    assert manifest["layout"]["data"] == 2
    assert len(list((tmp_path / "logs").glob("*/attempt_0/0/stdout.log"))) == 2

    nodes = start_nodes(tmp_path, run_words(tmp_path, "model", two, *words, "steps=100000"))
    while len(losses(two)) < 4 and all(node.poll() is None for node in nodes):
        time.sleep(0.2)
    nodes[0].terminate()
    check_ended(nodes)
    assert max(saved_steps(two)) == read_log(two)[-1]["step"] >= 4
    assert [line["step"] for line in read_log(two)] == list(range(1, max(saved_steps(two)) + 1))


def start_nodes(folder: Path, words: list[str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_ADDR": "localhost",
        "MAX_RESTARTS": "0", "PYTHON": sys.executable, "LOG_DIR": str(folder / "logs"), "GPUS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(EXAMPLES / "torchrun.sh"), *words]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=env, cwd=ROOT, **pipe) for _ in range(2)]


def check_ended(nodes: list[subprocess.Popen[str]]) -> None:
    """All with exit code 0."""
    output = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output)
