"""examples/recipes: each file is valid, has the paper's numbers, divides and fits its model, and saves what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.config import MHA2MLAConfig
from mha2mla_megatron.convert import ConvertSettings
from mha2mla_megatron.model.parallel import check_layout
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.checks import check_samples
from mha2mla_megatron.training.config import FinetuneSettings
from tests.conftest import ROOT, make_llama, run_tool

RECIPES = ROOT / "examples" / "recipes"
LLAMA = json.loads((ROOT / "examples" / "multi_node" / "llama-2-7b" / "config.json").read_text())
SMOLLM = {**LLAMA, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "smollm_135m": {**SMOLLM, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3},
    "smollm_360m": {**SMOLLM, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                    "num_attention_heads": 15, "num_key_value_heads": 5},
    "smollm_1.7b": {**SMOLLM, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                    "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama2_7b": LLAMA,
}  # fmt: skip
"""config.json of the published models: what the layouts depend on."""
GPUS = {
    "smollm_135m": (1, 2, 4, 8), "smollm_360m": (1, 2, 4, 8, 16), "smollm_1.7b": (1, 8, 64), "llama2_7b": (8, 64, 512),
}  # fmt: skip
"""As docs/recipes.md says."""
TOKENS = {"smollm_135m": 2.4e9, "smollm_360m": 2.4e9, "smollm_1.7b": 6.3e9, "llama2_7b": 12.6e9}
SAVED = {"68.75": 0.3125, "81.25": 0.1875, "87.5": 0.125}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[request.param]))
    return tmp_path


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_fine_tuning(folder: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["folder"]
    settings, architecture = load_settings(FinetuneSettings, [], RECIPES / f"{name}.yaml"), read_architecture(folder)
    for gpus in GPUS[name]:
        check_layout(architecture, settings.parallel, gpus)
        check_samples(settings, architecture, gpus)
    tokens = settings.steps * settings.global_batch_size * settings.data.sequence_length
    assert tokens == pytest.approx(TOKENS[name], rel=0.02)
    assert (settings.warmup_steps, settings.decay_steps) == (settings.steps // 10, settings.steps // 6)
    words = ("partial_rope.qk_rope_head_dim=8", "low_rank.method=joint", "low_rank.d_kv=8")
    text = run_tool("plan", RECIPES / f"{name}.yaml", f"model={folder}", "gpus=8", *words).stdout
    assert ": fits into" in text, text


@pytest.mark.parametrize("folder", MODELS, indirect=True)
@pytest.mark.parametrize("saved", SAVED)
def test_cache_of_the_conversions(folder: Path, saved: str) -> None:
    """Ours has the budget; the paper's words in its comment have the same size to the element."""
    file, architecture = RECIPES / f"mla_{saved}.yaml", read_architecture(folder)
    before = 2 * architecture.num_key_value_heads * architecture.head_dim
    ours = load_settings(ConvertSettings, ["statistics=any"], file)
    assert ours.budget(architecture) == before * SAVED[saved] * architecture.num_layers
    assert 1 - SAVED[saved] == pytest.approx(float(saved) / 100)
    (words,) = re.findall(rf"#     (.*)     heads of {architecture.head_dim}", file.read_text())
    paper = load_settings(ConvertSettings, [*words.split(), "partial_rope.scores=any"])
    mla = architecture.resolve(MHA2MLAConfig(paper.partial_rope, paper.low_rank))
    assert mla.partial_rope.qk_rope_head_dim == architecture.head_dim // 8
    cached = architecture.num_key_value_heads * architecture.head_dim // 8 + mla.low_rank.kv_lora_rank
    assert cached == before * SAVED[saved]


def test_partial_rope_alone_saves_nothing_and_a_second_stage_does(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    run_tool("convert_mha_to_mla", tmp_path / "model", tmp_path / "out", f"config={RECIPES / 'partial_rope.yaml'}")
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["cache_elements_per_token"]["saved"] == 0
    assert report["mha2mla"]["partial_rope"]["qk_rope_head_dim"] == 2
    words = [f"config={RECIPES / 'second_stage.yaml'}", "low_rank.d_kv=4"]
    run_tool("convert_mha_to_mla", tmp_path / "out", tmp_path / "mla", *words)
    report = json.loads((tmp_path / "mla" / "conversion_report.json").read_text())
    assert report["cache_elements_per_token"]["saved"] == 1 - (2 + 4) / 32


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_sizes_of_the_second_stage(folder: Path) -> None:
    """The words in its comment have the sizes that it says."""
    text, architecture = (RECIPES / "second_stage.yaml").read_text(), read_architecture(folder)
    (line,) = re.findall(rf"#     (.*)     heads of {architecture.head_dim}", text)
    sizes = [word.removeprefix("low_rank.d_kv=") for word in line.split(" | ")]
    d = architecture.head_dim
    assert [1 - (d // 8 + int(size)) / (2 * d) for size in sizes] == [0.6875, 0.8125, 0.875]
