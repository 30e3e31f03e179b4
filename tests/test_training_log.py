"""What a run says of itself as it goes: the part it uses of its GPUs, and a line for each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM
from mha2mla_megatron.training import step as step_module
from mha2mla_megatron.training.flops import Utilisation, peak_tflops, training_flops
from tests.conftest import refused, run_tool
from tests.finetune_cases import BATCH, LENGTH, finetune, make_workspace, read_log, run_words
from tests.megatron_cases import converted_config, original_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a run on a CPU")

SCHEDULE = ("steps=2", "save_interval=2", "optimizer.warmup_steps=0", "optimizer.decay_steps=1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("training_log"))


EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": original_config(tie_word_embeddings=True),
    "untied": original_config(),
    "joint": converted_config("joint", tie_word_embeddings=True),
    "split": converted_config("split"),
    "partial RoPE": converted_config("none"),
    "experts": original_config(**EXPERTS) | {"model_type": "mixtral"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts_of_the_transformers_model(name: str) -> None:
    """torch counts the products of all S x S pairs, half of which a causal mask leaves out, and positions times
    frequencies: 2 d/2 S at most."""
    length, given = 24, CONFIGS[name]
    values = {key: value for key, value in given.items() if key not in ("model_type", "architectures")}
    if given["model_type"] == "mha2mla_llama":
        model: Any = MHA2MLALlamaForCausalLM(MHA2MLALlamaConfig(**values, attn_implementation="eager"))
    else:
        config = AutoConfig.for_model(given["model_type"], **values)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    config = model.config
    tokens = torch.randint(config.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    hidden = 3 * 2 * 2 * (length / 2) * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    found = counter.get_total_flops() / length - hidden
    assert training_flops(parse_architecture(given, name), length) == pytest.approx(found, abs=config.head_dim)


def test_a_window_leaves_out_what_it_hides() -> None:
    """6 of 24 tokens: of 24 x 24 pairs, half are left by the mask, and 18 x 18 / 2 of these are hidden."""
    given = {"model_type": "mixtral", **original_config(**EXPERTS)} | {"model_type": "mixtral"}
    whole, part = (
        training_flops(parse_architecture({**given, "sliding_window": window}, "config"), 24) for window in (None, 6)
    )
    assert whole - part == pytest.approx(3 * 2 * 2 * (18 * 18 / 2 / 24) * 4 * 4 * 16)
    longer = training_flops(parse_architecture({**given, "sliding_window": 100}, "config"), 24)
    assert longer == whole


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("Tesla T4", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_peaks_of_gpus_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_mfu_and_memory_are_logged(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = finetune(workspace, "original", tmp_path / "run", *SCHEDULE)
    before = read_log(root)
    assert all("mfu" not in line and "peak_memory_gib" not in line for line in before)
    # Resumed with a log from before there were such entries; memory as on a GPU.
    monkeypatch.setattr(step_module, "_peak_memory", lambda device: 3 << 29)
    words = run_words(workspace, "original", root, *SCHEDULE, "steps=4", "peak_tflops=0.001")
    done = run_tool("finetune", *words)
    log = read_log(root)
    assert log[:2] == before and len(log) == 4
    # h 64, H 4, G 2, d 16, MLP 96, vocabulary 256, 4 layers: weights of all products, then half of the pairs.
    weights = 4 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96) + 256 * 64
    flops = 6 * weights + 3 * 2 * 2 * (LENGTH / 2) * 4 * 4 * 16
    for line in log[2:]:
        rate = BATCH * LENGTH / line["seconds"]
        assert line["mfu"] == pytest.approx(flops * rate / 1e9, rel=1e-12)
        assert line["peak_memory_gib"] == 1.5
        assert f" | MFU {line['mfu']:.1%} | 1.5 GiB | " in done.stdout
    board = EventAccumulator(str(root / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("mfu")] == [event.step for event in board.Scalars("peak_memory_gib")]
    assert [event.value for event in board.Scalars("mfu")] == pytest.approx([line["mfu"] for line in log[2:]], rel=1e-6)
    drawn: list[str] = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, title: drawn.append(title))
    run_tool("plot_run", root, tmp_path / "picture.png")
    assert {"MFU", "peak memory [GiB]"} < set(drawn)
    (root / "log.jsonl").write_text("".join((root / "log.jsonl").read_text().splitlines(keepends=True)[:2]))
    drawn.clear()
    run_tool("plot_run", root, tmp_path / "old.png")
    assert "loss" in drawn and not {"MFU", "peak memory [GiB]"} & set(drawn)


def test_mfu_is_over_all_gpus_and_needs_a_peak() -> None:
    assert Utilisation(flops=4e15, peak=2 * 1e15).mfu(seconds=4.0) == 0.5
    assert Utilisation(flops=4e15, peak=None).mfu(seconds=4.0) is None


@pytest.mark.parametrize("value", ["0", "-1", ".inf"])
def test_a_peak_that_is_none_is_refused(workspace: Path, tmp_path: Path, value: str) -> None:
    line = refused("finetune", *run_words(workspace, "original", tmp_path / "run", f"peak_tflops={value}"))
    assert "peak_tflops" in line and "positive" in line
