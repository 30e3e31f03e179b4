"""tools/import_mha2mla.py: models in the layout of the authors' own code give back the weights they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.finetune_cases import Trap
from tests.project_layout import project_logits, write_project_model

L, G, D, D_KV = 3, 2, 16, 7
THETA = 10000.0
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
STRATEGIES = {
    "full": ["partial_rope.strategy=full"],
    "high": ["partial_rope.strategy=high", "partial_rope.qk_rope_head_dim=6"],
    "uniform": ["partial_rope.strategy=uniform", "partial_rope.qk_rope_head_dim=4", "partial_rope.uniform_start=1"],
    "ends": ["partial_rope.strategy=ends", "partial_rope.qk_rope_head_dim=6", "partial_rope.ends_high_pairs=1"],
    "2-norm": ["partial_rope.strategy=2-norm", "partial_rope.qk_rope_head_dim=6"],
    "low": ["partial_rope.strategy=low", "partial_rope.qk_rope_head_dim=4"],
}
ROPE: dict[str, dict[str, Any]] = {
    "full": {"partial_rope_version": 0},
    "high": {"partial_rope_version": 1, "top_k_rope_dim": 3},
    "uniform": {"partial_rope_version": 2, "uniform_start_point": 1, "uniform_step": 4},
    "ends": {"partial_rope_version": 3, "top_k_rope_dim": 1, "last_k_rope_dim": 2},
    "2-norm": {"partial_rope_version": 4, "top_k_rope_dim": 3, "qk_tensor_path": "../utils/qk_tensor.pth"},
    "low": {"partial_rope_version": "low", "lask_k_rope_dim": 2},
}
SECOND: dict[str, dict[str, Any]] = {
    "high": {"rope_dim_for_mla": 6},
    "uniform": {"rope_dim_for_mla": 4, "uniform_start_point": 1},
    "2-norm": {"rope_dim_for_mla": 6, "qk_tensor_path": "../utils/qk_tensor.pth"},
    "low": {"rope_dim_for_mla": 4},
}
SVD_INIT = {"joint": "joint", "split": "split", "key": "only_key", "value": "only_value", "none": "none"}
CASES = [
    *(("first", strategy, "joint", False) for strategy in ROPE),
    ("first", "2-norm", "split", False),
    *(("plain", strategy, "none", strategy == "2-norm") for strategy in ("uniform", "2-norm", "low")),
    *(("second", strategy, "joint", False) for strategy in SECOND),
    *(("second", "2-norm", method, True) for method in SVD_INIT),
]


def keys_of(generation: str, strategy: str, method: str) -> dict[str, Any]:
    """What their config.json says."""
    if generation == "second":
        section = {"partial_rope_version": strategy, "svd_init_method": SVD_INIT[method], "low_rank": D_KV}
        return {"mha2mla": {"is_baseline": False, "is_gqa2mha2mla": False, **section, **SECOND[strategy]}}
    svd = {"SVD": {"method": {"joint": 7, "split": 2}[method], "low_rank": D_KV}} if generation == "first" else {}
    return {"RoPE": {"n_gqa_group": 2, **ROPE[strategy]}, **svd}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny Llama without and with biases, a tokenizer, and the scores of its pairs in their forms and ours."""
    folder = tmp_path_factory.mktemp("original")
    scores = torch.rand(L, G, D // 2, generator=torch.Generator().manual_seed(2))
    ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1).to(torch.uint8)
    save_file({"scores": scores}, folder / "scores.safetensors")
    torch.save(scores, folder / "qk_tensor.pth")
    torch.save(torch.cat((ranks, ranks), dim=-1), folder / "ranks.pth")
    make_tokenizer(make_llama(folder / "llama"))
    return {False: folder / "llama", True: make_llama(folder / "biased", bias=True)}


def make(original: Path, tmp_path: Path, generation: str, strategy: str, method: str) -> tuple[Path, Path]:
    """(our conversion of the model, the same in their layout)."""
    words = [*STRATEGIES[strategy], f"low_rank.method={method}"]
    words += [f"low_rank.d_kv={D_KV}"] if method != "none" else []
    words += [f"partial_rope.scores={original.parent / 'scores.safetensors'}"] if strategy == "2-norm" else []
    run_tool("convert_mha_to_mla", original, tmp_path / "ours", *words)
    keys = keys_of(generation, strategy, method)
    return tmp_path / "ours", write_project_model(
        tmp_path / "ours", original, tmp_path / "theirs", generation, method, keys
    )


@pytest.mark.parametrize(("generation", "strategy", "method", "bias"), CASES)
def test_weights_come_back(
    original: dict[bool, Path], tmp_path: Path, generation: str, strategy: str, method: str, bias: bool
) -> None:
    ours, theirs = make(original[bias], tmp_path, generation, strategy, method)
    file = original[bias].parent / ("ranks.pth" if generation == "second" else "qk_tensor.pth")
    words = [f"qk_tensor={file}"] if strategy == "2-norm" else []
    out = run_tool("import_mha2mla", theirs, tmp_path / "imported", *words).stdout
    assert method in out and "cached elements per token instead of 192" in out
    expected, found = (load_file(folder / "model.safetensors") for folder in (ours, tmp_path / "imported"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    config = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert not config.keys() & {"RoPE", "SVD"} and config["mha2mla"]["partial_rope"]["strategy"] == strategy
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "imported", trust_remote_code=True).eval()
    pairs = [found[f"model.layers.{layer}.self_attn.rope_pairs"].tolist() for layer in range(L)]
    with torch.no_grad():
        difference = model(TOKENS).logits.double() - project_logits(theirs, TOKENS, pairs, THETA)
    # Logits reach 5; float32 against float64 leaves 1e-5. A wrong row or pair shows at 1e-1.
    assert difference.abs().max() < 1e-4
    assert (tmp_path / "imported" / "tokenizer.json").exists() == (original[bias] / "tokenizer.json").exists()


def test_ranks_beside_the_config_and_settings_in_a_file(original: dict[bool, Path], tmp_path: Path) -> None:
    """2-norm finds its file by name; partial RoPE alone may have its settings in the YAML file of the run."""
    ours, theirs = make(original[False], tmp_path, "plain", "2-norm", "none")
    (theirs / "qk_tensor.pth").write_bytes((original[False].parent / "qk_tensor.pth").read_bytes())
    config = json.loads((theirs / "config.json").read_text())
    (tmp_path / "rope.yaml").write_text(json.dumps({"RoPE": config.pop("RoPE")}))
    (theirs / "config.json").write_text(json.dumps(config))
    assert "rope_config=FILE" in refused("import_mha2mla", theirs, tmp_path / "imported")
    for wrong, reason in (("none.yaml", "no such file"), ("theirs", "a folder, not a file")):
        line = refused("import_mha2mla", theirs, tmp_path / "imported", f"rope_config={tmp_path / wrong}")
        assert f"rope_config: {tmp_path / wrong}: {reason}" in line
    run_tool("import_mha2mla", theirs, tmp_path / "imported", f"rope_config={tmp_path / 'rope.yaml'}")
    expected, found = (load_file(folder / "model.safetensors") for folder in (ours, tmp_path / "imported"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def _change(section: str | None, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (config if section is None else config[section]).update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith(("W_up_v.weight", "kv_proj.up_v.weight"))))
    save_file(tensors, folder / "model.safetensors")


QK = "qk_tensor={folder}/bad.pth"
REFUSED: dict[str, tuple[str, Callable[[Path], Any], list[str], list[str]]] = {
    "no ranks": ("2-norm", lambda f: None, [], ["qk_tensor_path", "utils/qk_tensor.pth", "qk_tensor=FILE"]),
    "no such ranks": ("2-norm", lambda f: None, [QK], ["qk_tensor", "bad.pth", "no such file"]),
    "folder of ranks": ("2-norm", lambda f: (f / "bad.pth").mkdir(), [QK], ["qk_tensor", "bad.pth: a folder, not a"]),
    "other ranks": ("2-norm", lambda f: torch.save(torch.rand(L, 4, 8), f / "bad.pth"), [QK], ["(3, 4, 8)"]),
    "ties": ("2-norm", lambda f: torch.save(torch.ones(L, G, 8), f / "bad.pth"), [QK], ["same score"]),
    "trap": ("2-norm", lambda f: torch.save(Trap(f / "sprung"), f / "bad.pth"), [QK], ["cannot be read"]),
    "ranks not needed": ("high", lambda f: torch.save(0, f / "bad.pth"), [QK], ["qk_tensor", "high"]),
    "settings twice": ("high", lambda f: None, ["rope_config=x.yaml"], ["rope_config", "leave it out"]),
    "version 6": ("high", _change("RoPE", partial_rope_version=6), [], ["partial_rope_version: 6"]),
    "version 9": ("high", _change("RoPE", partial_rope_version=9), [], ["partial_rope_version: 9"]),
    "half pairs": ("uniform", _change("RoPE", uniform_step=5), [], ["every 5th", "whole pairs"]),
    "late start": ("uniform", _change("RoPE", uniform_start_point=4), [], ["from 4 on", "whole pairs"]),
    "too many pairs": ("high", _change("RoPE", top_k_rope_dim=9), [], ["18 rotated dims of 16"]),
    "no number": ("high", _change("RoPE", top_k_rope_dim="3"), [], ["top_k_rope_dim", "'3'"]),
    "method 9": ("high", _change("SVD", method=9), [], ["SVD.method: 9"]),
    "no rank": ("high", _change("SVD", low_rank=0), [], ["config.json: SVD.low_rank: 0"]),
    "other rank": ("high", _change("SVD", low_rank=6), [], ["W_up_k.weight has shape (20, 14)", "(20, 12)"]),
    "auto-encoder": ("high", _change(None, AE={"version": 2}), [], ["AE is set"]),
    "latent bias": ("high", _change(None, attention_bias=True), [], ["attention_bias=true"]),
    "another family": ("high", _change(None, model_type="qwen3"), [], ["qwen3"]),
    "missing tensor": ("high", _drop_tensor, [], ["W_up_v.weight is missing"]),
    "ours already": ("high", _change(None, model_type="mha2mla_llama"), [], ["in our format already"]),
    "baseline": ("second", _change("mha2mla", is_baseline=True), [], ["is_baseline", "an ordinary model"]),
    "more heads": ("second", _change("mha2mla", is_gqa2mha2mla=True), [], ["is_gqa2mha2mla"]),
    "uneven": ("second", _change("mha2mla", partial_rope_version="uniform"), [], ["rope_dim_for_mla: 6"]),
    "not theirs": ("second", _change(None, mha2mla={"x": 1}), [], ["no partial_rope_version"]),
    "surplus": ("second", _change("mha2mla", svd_init_method="none"), [], ["kv_proj.up_k.weight"]),
}


@pytest.fixture(scope="module")
def theirs(original: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ("2-norm", "high", "uniform", "second"):
        generation, strategy = ("second", "high") if name == "second" else ("first", name)
        folders[name] = make(original[False], tmp_path_factory.mktemp(name), generation, strategy, "joint")[1]
    return folders


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(theirs: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, damage, words, named = REFUSED[case]
    source = tmp_path / "source"
    source.mkdir()
    for file in theirs[base].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    damage(source)
    line = refused("import_mha2mla", source, tmp_path / "out", *(word.format(folder=source) for word in words))
    assert all(part in line for part in named), line
    assert not (tmp_path / "out").exists() and not (source / "sprung").exists()


def test_other_tools_name_the_importer(theirs: dict[str, Path], tmp_path: Path) -> None:
    """A partly rotated model that passes for an ordinary one would be converted into nonsense."""
    for name in ("high", "second"):
        for tool in ("convert_mha_to_mla", "convert_hf_to_megatron"):
            assert "import_mha2mla.py" in refused(tool, theirs[name], tmp_path / "out")
