"""tools/import_mha2mla.py on nanotron's checkpoints: the weights come back, whatever the layout they were saved at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mha2mla_megatron.architecture import read_architecture
from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.nanotron_layout import STEP, write_nanotron
from tests.project_layout import write_project_model

L, G, D, D_KV = 3, 2, 16, 7
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = ["partial_rope.qk_rope_head_dim=6"]
HIGH = {"n_gqa_group": 2, "partial_rope_version": 1, "top_k_rope_dim": 3}
NORM = {"n_gqa_group": 2, "partial_rope_version": 4, "top_k_rope_dim": 3, "qk_tensor_path": "../utils/qk_tensor.pth"}
JOINT, SPLIT = {"method": 7, "low_rank": D_KV}, {"method": 2, "low_rank": D_KV}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("original") / "llama"))


def same(one: Path, other: Path) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("tp", "pp", "tied", "interleaved"),
    [(1, 1, True, False), (2, 1, True, True), (1, 2, False, True), (2, 2, False, False)],
)
def test_an_ordinary_llama_becomes_a_hugging_face_folder(
    original: Path, tmp_path: Path, tp: int, pp: int, tied: bool, interleaved: bool
) -> None:
    llama = original if tied else make_llama(tmp_path / "untied", tied=False)
    run = write_nanotron(llama, tmp_path / "run", tp, pp, interleaved)
    out = run_tool("import_mha2mla", run, tmp_path / "hf", f"tokenizer={original}").stdout
    assert "an ordinary llama" in out
    same(llama, tmp_path / "hf")
    assert read_architecture(tmp_path / "hf") == read_architecture(llama)
    assert torch.equal(logits(tmp_path / "hf"), logits(llama))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == "float32" and "rope_interleaved" not in config
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


def test_without_the_key_pairs_are_neighbours(original: Path, tmp_path: Path) -> None:
    """As nanotron rotated them before it had the key; and a step's folder is read as well as the run's."""
    step = write_nanotron(original, tmp_path / "run", interleaved=True) / str(STEP)
    config = json.loads((step / "model_config.json").read_text())
    del config["rope_interleaved"]
    (step / "model_config.json").write_text(json.dumps(config))
    run_tool("import_mha2mla", step, tmp_path / "hf")
    same(original, tmp_path / "hf")


@pytest.mark.parametrize(
    ("rope", "svd", "strategy", "method", "tp"),
    [
        (HIGH, {}, "high", "none", 2),
        (NORM, {"method": 0}, "2-norm", "none", 1),
        (NORM, JOINT, "2-norm", "joint", 1),
        (HIGH, SPLIT, "high", "split", 1),
    ],
)
def test_what_the_authors_trained_becomes_our_model(
    original: Path, tmp_path: Path, rope: dict[str, object], svd: dict[str, object], strategy: str, method: str, tp: int
) -> None:
    words = [*SETTINGS, f"partial_rope.strategy={strategy}", f"low_rank.method={method}"]
    words += [f"low_rank.d_kv={D_KV}"] if method != "none" else []
    if strategy == "2-norm":
        scores = torch.rand(L, G, D // 2, generator=torch.Generator().manual_seed(2))
        save_file({"scores": scores}, tmp_path / "scores.safetensors")
        torch.save(scores, tmp_path / "qk_tensor.pth")
        words.append(f"partial_rope.scores={tmp_path / 'scores.safetensors'}")
    run_tool("convert_mha_to_mla", original, tmp_path / "ours", *words)
    generation = "plain" if method == "none" else "first"
    theirs = write_project_model(tmp_path / "ours", original, tmp_path / "theirs", generation, method, {})
    run = write_nanotron(theirs, tmp_path / "run", tp, 2, RoPE=rope, SVD=svd)
    words = [f"qk_tensor={tmp_path / 'qk_tensor.pth'}"] if strategy == "2-norm" else []
    assert method in run_tool("import_mha2mla", run, tmp_path / "imported", *words).stdout
    same(tmp_path / "ours", tmp_path / "imported")
    assert read_architecture(tmp_path / "imported").mla is not None


QKV = "model/model/decoder/1/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-{}-of-2.safetensors"


def _config(**values: object) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        file = step / "model_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def _metadata(key: str, old: str, new: str, shape: tuple[int, int] = (64, 64)) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        file = step / QKV.format(1)
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        assert old in metadata[key]
        save_file({"data": torch.ones(shape)}, file, metadata={**metadata, key: metadata[key].replace(old, new)})

    return change


def _copy(source: str, target: str) -> Callable[[Path], object]:
    return lambda step: shutil.copy(step / source, step / target)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda step: shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda step: (step / name).write_text(text)


NORM_FILE = "model/model/decoder/2/pp_block/input_layernorm/model_{}.safetensors"
THIRD, BAD_NAME = QKV.format(2).replace("-of-2", "-of-3"), QKV.format(0).replace("model_weight", "model_model_x-1")
MUP = "model: {init_method: {use_mup: true}}"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard missing": (_remove(QKV.format(1)), ["decoder.1", "qkv_proj.weight", "tensor-parallel"]),
    "a shard of another save": (_copy(QKV.format(0), THIRD), ["qkv_proj.weight", "tp-rank-2-of-3"]),
    "a layer missing": (_remove("model/model/decoder/2"), ["decoder.2.pp_block.input_layernorm", "missing"]),
    "surplus": (_copy(NORM_FILE.format("weight"), NORM_FILE.format("bias")), ["surplus", "input_layernorm.bias"]),
    "a bad name": (_copy(QKV.format(0), BAD_NAME), ["fix_checkpoint_bad_naming"]),
    "truncated": (_write(QKV.format(0), "0" * 20), ["tp-rank-0-of-2", "truncated"]),
    "unknown version": (_metadata("version", "1.4", "2.0"), ["tp-rank-1-of-2", "version 2.0", "1.5"]),
    "slices twice": (_metadata("local_global_slices_pairs", "#32,64,None", "#0,32,None"), ["qkv_proj", "slices"]),
    "no slices": (_metadata("local_global_slices_pairs", "None", "x"), ["tp-rank-1-of-2", "metadata"]),
    "cut": (_metadata("version", "1.4", "1.4", (60, 64)), ["tp-rank-1-of-2", "metadata", "48,64,None of 60"]),
    "too long": (_metadata("version", "1.4", "1.4", (65, 64)), ["tp-rank-1-of-2", "shape (65, 64)"]),
    "of another whole": (_metadata("unsharded_shape", "64)", "65)"), ["tp-rank-1-of-2", "65"]),
    "another shape": (_config(intermediate_size=100), ["gate_up_proj.weight", "(192, 64)", "(200, 64)"]),
    "not tied": (_config(tie_word_embeddings=False), ["model.lm_head.pp_block.weight is missing"]),
    "the optimizer alone": (_remove("model"), ["no weights"]),
    "no config": (_remove("model_config.json"), ["model_config.json"]),
    "another model": (_config(is_llama_config=None), ["is_llama_config"]),
    "partial and interleaved": (_config(RoPE=HIGH, rope_interleaved=True), ["rope_interleaved"]),
    "latents in two": (_config(RoPE=HIGH, SVD=JOINT), ["attn.q_proj.weight is missing"]),
    "an auto-encoder": (_config(RoPE=HIGH, AE={"version": 2}), ["AE is set"]),
    "mup": (_write("config.yaml", MUP), ["config.yaml", "use_mup"]),
    "no such step": (_write("../latest.txt", "11"), ["latest.txt", "'11'"]),
}


@pytest.fixture(scope="module")
def run_of_two(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nanotron(original, tmp_path_factory.mktemp("nanotron") / "run", tp=2)


@pytest.mark.parametrize("case", DAMAGE)
def test_refused_in_one_line(run_of_two: Path, tmp_path: Path, case: str) -> None:
    damage, named = DAMAGE[case]
    run = shutil.copytree(run_of_two, tmp_path / "run")
    damage(run / str(STEP))
    line = refused("import_mha2mla", run, tmp_path / "out")
    assert all(part in line for part in named), line
    assert not (tmp_path / "out").exists()


def test_other_tools_name_the_importer(run_of_two: Path, tmp_path: Path) -> None:
    assert "import_mha2mla.py" in refused("convert_mha_to_mla", run_of_two / str(STEP), tmp_path / "out")
