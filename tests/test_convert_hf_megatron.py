"""HF -> Megatron -> HF as a user runs it: bit for bit, the same model in between, and every refusal."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mha2mla_megatron.architecture import parse_architecture, read_architecture
from mha2mla_megatron.checkpoint.manifest import MANIFEST
from mha2mla_megatron.checkpoint.mapping import megatron_shapes, parameter_map
from mha2mla_megatron.checkpoint.megatron import (
    LATEST,
    TorchDistReader,
    iteration_folder,
    write_latest,
)
from mha2mla_megatron.convert import converted_config
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel
from mha2mla_megatron.model.provider import build_model, transformer_config
from mha2mla_megatron.training.checkpoint import load_weights
from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.finetune_cases import Trap, write_tokens
from tests.kill_conversion import contents
from tests.megatron_cases import save_global_tensors

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
BIASED: dict[str, Any] = {"groups": 4, "tied": False, "bias": True, "mlp_bias": True}
ROPE_DIMS = "partial_rope.qk_rope_head_dim=[0,16,4]"
RANKS = "low_rank.kv_lora_rank=[20,18,24]"
KEY_RANKS = "low_rank.k_lora_rank=[8,0,11]"
CASES: dict[str, tuple[dict[str, Any], list[str] | None]] = {
    "gqa-tied": ({}, None),
    "mha-untied-biased": (BIASED, None),
    "gqa-biased": ({"bias": True}, None),
    "bf16": ({"dtype": torch.bfloat16}, None),
    "sharded": ({"max_shard_size": "60KB"}, None),
    **{
        f"{method}{'-biased' if changes else ''}": (
            changes,
            [ROPE_DIMS, f"low_rank.method={method}", *([RANKS] if method != "none" else [])]
            + [KEY_RANKS] * (method == "split"),
        )
        for method in ("joint", "split", "key", "value", "none")
        for changes in ({}, BIASED)
    },
    "shared-rope": ({"bias": True, "shared": True}, [ROPE_DIMS, "low_rank.method=split", RANKS, KEY_RANKS]),
    "joint-bf16-sharded": ({}, [ROPE_DIMS, "low_rank.method=joint", RANKS, "dtype=bfloat16", "max_shard_size=50KB"]),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def make_model(folder: Path, changes: dict[str, Any], words: list[str] | None) -> Path:
    """A folder with a tokenizer: a Llama, or with `words` its conversion. changes: of the Llama; and `shared`, whether
    the converted heads have one rotated key."""
    source = make_llama(folder / "llama", **{k: v for k, v in changes.items() if k not in ("dtype", "shared")})
    make_tokenizer(source)
    if "dtype" in changes:
        tensors = {name: tensor.to(changes["dtype"]) for name, tensor in tensors_of(source).items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if words is None:
        return source
    run_tool("convert_mha_to_mla", source, folder / "mla", *words)
    if "shared" in changes:
        share_rotated_keys(folder / "mla")
    return folder / "mla"


def share_rotated_keys(folder: Path) -> None:
    """Let all heads of a converted model have their layer's first rotated key, at frequencies that occur twice."""
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    rope = config["mha2mla"]["partial_rope"]
    rope |= {"shared": True, "mixed": True, "strategy": "activation", "scores": "statistics.safetensors"}
    for layer, r in enumerate(rope["qk_rope_head_dim"]):
        attention = f"model.layers.{layer}.self_attn."
        for name in [name for name in tensors if name.startswith(f"{attention}k_rope_proj.")]:
            tensors[name] = tensors[name][:r].clone()
        if r > 0:
            pairs = tensors[f"{attention}rope_pairs"][:1].clone()
            pairs[:, r // 4 :] = pairs[:, : r // 4]
            tensors[f"{attention}rope_pairs"] = pairs
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def megatron_logits(checkpoint: Path) -> torch.Tensor:
    """Of the float32 model that fine-tuning would start from."""
    architecture, parallel = read_architecture(checkpoint / "hf"), ParallelConfig()
    initialize_parallel(parallel)
    model = build_model(architecture, transformer_config(architecture, parallel, torch.float32))
    load_weights([model], iteration_folder(checkpoint, 0), architecture)
    with torch.no_grad():
        return model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)


def hf_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(tmp_path: Path, case: str) -> None:
    source, back = make_model(tmp_path, *CASES[case]), tmp_path / "back"
    size = "50KB" if "sharded" in case else "5GB"
    run_tool("convert_hf_to_megatron", source, tmp_path / "megatron")
    run_tool("convert_megatron_to_hf", tmp_path / "megatron", back, f"max_shard_size={size}")
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
        assert torch.equal(after[name], tensor), name
    assert (back / "model.safetensors.index.json").exists() == ("sharded" in case)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (source / file).read_bytes() == (back / file).read_bytes(), file
    # A layout that is wrong the same way in both directions would still come back; what stands in between must be
    # the same model. Logits reach 5; a wrong row shows at 1e-1.
    assert (megatron_logits(tmp_path / "megatron") - hf_logits(source)).abs().max() < 2e-4


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] is not None and case != "shared-rope"])
def test_straight_from_the_original(tmp_path: Path, case: str) -> None:
    """Every file is that of the two converters, one after the other; beside them the report."""
    changes, words = CASES[case]
    mla = make_model(tmp_path, changes, words)
    run_tool("convert_hf_to_megatron", mla, tmp_path / "megatron")
    done = run_tool("convert_mha_to_mla", tmp_path / "llama", tmp_path / "straight", *words, "ckpt_format=torch_dist")
    assert "report in hf/conversion_report.json" in done.stdout
    found = contents(tmp_path / "straight")
    assert found.pop("hf/conversion_report.json") == (mla / "conversion_report.json").read_bytes()
    assert found == contents(tmp_path / "megatron")


@pytest.mark.parametrize("case", ["sharded", "joint"])
def test_shards_are_laid_out_as_the_library_would(tmp_path: Path, case: str) -> None:
    """Byte for byte what safetensors writes for the same tensors; a converted model has 8-byte integers among them."""
    source = make_model(tmp_path, *CASES[case])
    run_tool("convert_hf_to_megatron", source, tmp_path / "megatron")
    run_tool("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back", "max_shard_size=50KB")
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        save_file(load_file(file), tmp_path / "again", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()


UNTRAINABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn": (
        "rope_parameters",
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
        "rope_type 'yarn' with an attention factor of 1.13863 is not supported; valid: attention_factor 1",
    ),
    "dynamic": ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported; valid: de"),
    "longrope": (
        "rope_scaling",
        {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "rope_type 'longrope' is not supported; valid: default, linear, llama3, yarn",
    ),
}


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_scalings_that_megatron_cannot_train_are_copied_with_a_warning(tmp_path: Path, case: str) -> None:
    key, scaling, reason = UNTRAINABLE[case]
    source = make_llama(tmp_path / "llama")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**config, key: scaling}))
    words = ["partial_rope.qk_rope_head_dim=8", "low_rank.kv_lora_rank=8", "ckpt_format=torch_dist"]
    for done in (
        run_tool("convert_hf_to_megatron", source, tmp_path / "megatron"),
        run_tool("convert_mha_to_mla", source, tmp_path / "straight", *words),
    ):
        (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning: "))
        assert f"{source / 'config.json'}: {key}: {reason}" in warning
        assert "can be converted back" in warning and "tools/finetune.py will refuse it" in warning
    run_tool("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())[key] == scaling
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    (tmp_path / "run.yaml").write_text(f"data: {{train: {write_tokens(tmp_path / 'text')}, sequence_length: 32}}")
    words = [tmp_path / "run.yaml", f"load={tmp_path / 'megatron'}", f"save={tmp_path / 'run'}"]
    assert reason in refused("finetune", *words)


def test_a_scaling_that_megatron_trains_gives_no_warning(tmp_path: Path) -> None:
    yarn = {**UNTRAINABLE["yarn"][1], "attention_factor": 1.0}
    source = make_llama(tmp_path / "llama", rope_parameters=yarn)
    assert "warning" not in run_tool("convert_hf_to_megatron", source, tmp_path / "megatron").stderr


def test_what_no_model_needs_is_left_out(tmp_path: Path) -> None:
    """Saved inv_freq tables, and the lm_head of a tied model."""
    source = make_llama(tmp_path / "llama")
    before = tensors_of(source)
    extra = {"lm_head.weight": before["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file({**before, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    run_tool("convert_hf_to_megatron", source, tmp_path / "megatron")
    run_tool("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back")
    after = tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An original and a converted model, each as a Hugging Face folder and as a Megatron checkpoint."""
    root = tmp_path_factory.mktemp("folders")
    original = make_model(root, {"bias": True}, None)
    converted = root / "mla"
    run_tool("convert_mha_to_mla", original, converted, ROPE_DIMS, "low_rank.method=joint", RANKS)
    folders = {"original": original, "converted": converted}
    for name, folder in list(folders.items()):
        run_tool("convert_hf_to_megatron", folder, root / f"{name}-megatron")
        folders[f"{name}-megatron"] = root / f"{name}-megatron"
    return folders


@pytest.mark.parametrize("model", ["original", "converted"])
def test_megatrons_own_loader_reads_it_at_another_layout(folders: dict[str, Path], model: str) -> None:
    """What each of two tensor-parallel ranks of a pipeline stage with the middle layer asks for."""
    step = iteration_folder(folders[f"{model}-megatron"], 0)
    initialize_parallel(ParallelConfig())
    reader = TorchDistReader(step)
    wholes = {name: reader[name] for name in reader.shapes() if name.startswith(("decoder.layers.1.", "embedding."))}
    assert len(wholes) > 8
    for rank in range(2):
        expected, state = {}, {}
        for name, tensor in wholes.items():
            axis = int(name.endswith(("linear_proj.weight", "linear_fc2.weight")))
            split = not any(word in name for word in ("norm", "rope_pairs"))
            expected[name] = tensor.chunk(2, axis)[rank] if split else tensor
            place, offsets = torch.empty_like(expected[name]), [(axis, rank, 2)] if split else []
            state[name] = ShardedTensor.from_rank_offsets(name, place, *offsets, replica_id=0)
        loaded = dist_checkpointing.load(state, str(step), validate_access_integrity=False)
        assert all(torch.equal(loaded[name], part) for name, part in expected.items())


Change = Callable[[dict[str, torch.Tensor]], Any]
HF_DAMAGE: dict[str, tuple[str, Change, list[str]]] = {
    "original-missing": (
        "original",
        lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
        ["model.layers.1.self_attn.k_proj.bias", "missing"],
    ),
    "original-surplus": ("original", lambda t: t.update({"x.weight": torch.ones(1)}), ["x.weight", "surplus"]),
    "original-shape": (
        "original",
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(95, 64)}),
        ["model.layers.2.mlp.up_proj.weight", "(95, 64)", "(96, 64)"],
    ),
    "converted-missing": (
        "converted",
        lambda t: t.pop("model.layers.2.self_attn.rope_pairs"),
        ["model.layers.2.self_attn.rope_pairs", "missing"],
    ),
    "converted-surplus": (
        "converted",
        lambda t: t.update({"model.layers.0.self_attn.k_rope_proj.weight": torch.ones(4, 64)}),
        ["model.layers.0.self_attn.k_rope_proj.weight", "surplus"],
    ),
    "converted-shape": (
        "converted",
        lambda t: t.update({"model.layers.0.self_attn.kv_down_proj.weight": torch.ones(21, 64)}),
        ["model.layers.0.self_attn.kv_down_proj.weight", "(21, 64)", "(20, 64)"],
    ),
}


@pytest.mark.parametrize("case", HF_DAMAGE)
def test_damaged_hf_folders_are_refused(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    model, change, named = HF_DAMAGE[case]
    shutil.copytree(folders[model], tmp_path / "source")
    tensors = tensors_of(tmp_path / "source")
    change(tensors)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    line = refused("convert_hf_to_megatron", tmp_path / "source", tmp_path / "megatron")
    assert all(part in line for part in named), line
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


MEGATRON_DAMAGE: dict[str, tuple[str, Change, list[str]]] = {
    "original-missing": (
        "original",
        lambda t: t.pop("decoder.layers.1.self_attention.linear_qkv.bias"),
        ["decoder.layers.1.self_attention.linear_qkv.bias", "missing"],
    ),
    "original-surplus": ("original", lambda t: t.update({"x.weight": torch.ones(1)}), ["x.weight", "surplus"]),
    "original-shape": (
        "original",
        lambda t: t.update({"decoder.layers.2.mlp.linear_fc1.weight": torch.ones(190, 64)}),
        ["decoder.layers.2.mlp.linear_fc1.weight", "(190, 64)", "(192, 64)"],
    ),
    "converted-missing": (
        "converted",
        lambda t: t.pop("decoder.layers.2.self_attention.rope_pairs"),
        ["decoder.layers.2.self_attention.rope_pairs", "missing"],
    ),
    "converted-surplus": (
        "converted",
        lambda t: t.update({"decoder.layers.0.self_attention.linear_k_rope.weight": torch.ones(4, 64)}),
        ["decoder.layers.0.self_attention.linear_k_rope.weight", "surplus"],
    ),
    "converted-shape": (
        "converted",
        lambda t: t.update({"decoder.layers.0.self_attention.linear_kv_down.weight": torch.ones(21, 64)}),
        ["decoder.layers.0.self_attention.linear_kv_down.weight", "(21, 64)", "(20, 64)"],
    ),
}


@pytest.mark.parametrize("case", MEGATRON_DAMAGE)
def test_damaged_megatron_checkpoints_are_refused(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    model, change, named = MEGATRON_DAMAGE[case]
    checkpoint, source = folders[f"{model}-megatron"], tmp_path / "source"
    reader = TorchDistReader(iteration_folder(checkpoint, 0))
    tensors = {name: reader[name] for name in reader.shapes()}
    change(tensors)
    iteration_folder(source, 0).mkdir(parents=True)
    save_global_tensors(tensors, iteration_folder(source, 0))
    shutil.copytree(checkpoint / "hf", source / "hf")
    write_latest(source, 0)
    line = refused("convert_megatron_to_hf", source, tmp_path / "back")
    assert all(part in line for part in named), line
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def _first_data_file(step: Path) -> Path:
    return sorted(step.glob("*.distcp"))[0]


def _trap_in_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Trap(step.parents[1] / "sprung")))


def _trap_in_data(step: Path) -> None:
    data = io.BytesIO()
    torch.save(Trap(step.parents[1] / "sprung"), data, _use_new_zipfile_serialization=False)
    file, trap = _first_data_file(step), data.getvalue()
    content = bytearray(file.read_bytes())
    for info in TorchDistReader(step).storage.values():
        assert len(trap) <= info.length
        content[info.offset : info.offset + len(trap)] = trap
    file.write_bytes(content)


def _cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated data": (lambda step: _cut(_first_data_file(step), 0.5), [".distcp", "cannot be read"]),
    "no data": (lambda step: _first_data_file(step).unlink(), [".distcp", "cannot be read"]),
    "truncated index": (lambda step: _cut(step / ".metadata", 0.5), [".metadata", "damaged"]),
    "empty index": (lambda step: (step / ".metadata").write_bytes(b""), [".metadata", "damaged"]),
    "another pickle": (lambda step: (step / ".metadata").write_bytes(pickle.dumps([1])), [".metadata", "damaged"]),
    "no index": (lambda step: (step / ".metadata").unlink(), [".metadata", "missing"]),
    "trap in the index": (_trap_in_metadata, [".metadata", "refuses", "system"]),
    "trap in the data": (_trap_in_data, [".distcp", "cannot be read"]),
    "latest is garbage": (lambda step: (step.parent / LATEST).write_text("last tuesday"), [LATEST, "step number"]),
    "latest is binary": (lambda step: (step.parent / LATEST).write_bytes(b"\xff\xfe\x00"), [LATEST, "step number"]),
    "latest is elsewhere": (lambda step: (step.parent / LATEST).write_text("7"), ["iter_0000007", "missing"]),
    "latest is gone": (lambda step: (step.parent / LATEST).unlink(), [LATEST, "not a Megatron checkpoint"]),
    "no config": (lambda step: (step.parent / "hf" / "config.json").unlink(), ["config.json", "missing"]),
}


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_broken_checkpoints_are_refused(tmp_path: Path, folders: dict[str, Path], case: str) -> None:
    damage, named = BROKEN_CHECKPOINTS[case]
    shutil.copytree(folders["converted-megatron"], tmp_path / "source")
    (iteration_folder(tmp_path / "source", 0) / MANIFEST).unlink()  # it would tell; the reader has to see for itself
    damage(iteration_folder(tmp_path / "source", 0))
    line = refused("convert_megatron_to_hf", tmp_path / "source", tmp_path / "back")
    assert all(part in line for part in named), line
    assert [p.name for p in tmp_path.iterdir()] == ["source"], "something was written, or a trap was sprung"


def test_the_trap_works(tmp_path: Path) -> None:
    """Otherwise the refusals above prove nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    back = tmp_path / "back"
    assert "not a Megatron checkpoint" in refused("convert_megatron_to_hf", folders["original"], back)
    assert "not a Megatron checkpoint" in refused("convert_megatron_to_hf", tmp_path / "nowhere", back)
    line = refused("convert_megatron_to_hf", folders["original-megatron"], back, "iteration=3")
    assert "iter_0000003" in line and "missing" in line
    assert "max_shard_size" in refused(
        "convert_megatron_to_hf", folders["original-megatron"], back, "max_shard_size=big"
    )
    assert "tools/convert_megatron_to_hf.py" in refused("convert_hf_to_megatron", folders["original-megatron"], back)
    step = iteration_folder(folders["original-megatron"], 0)
    assert "a file, not a Megatron" in refused("convert_megatron_to_hf", step / "metadata.json", back)
    assert "iteration=3" in refused("convert_megatron_to_hf", step, back, "iteration=3")
    assert list(tmp_path.iterdir()) == []


def test_a_step_folder_is_a_checkpoint(tmp_path: Path, folders: dict[str, Path]) -> None:
    run_tool("convert_megatron_to_hf", iteration_folder(folders["original-megatron"], 0), tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(folders["original"]).keys()


@pytest.mark.parametrize(
    ("tool", "source"), [("convert_hf_to_megatron", "original"), ("convert_megatron_to_hf", "original-megatron")]
)
def test_existing_target_needs_overwrite(tmp_path: Path, folders: dict[str, Path], tool: str, source: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    assert "overwrite=true" in refused(tool, folders[source], target)
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    run_tool(tool, folders[source], target, "overwrite=true")
    assert not (target / "mine.txt").exists() and len(list(target.iterdir())) > 2
    (tmp_path / "file").write_text("keep")
    assert "not a folder" in refused(tool, folders[source], tmp_path / "file", "overwrite=true")


LLAMA_2_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
SMOLLM_1B7 = dict(
    vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
KEPT = {"partial_rope": {"qk_rope_head_dim": 16}, "low_rank": {"method": "joint", "kv_lora_rank": 1024}}
LISTS = {
    "partial_rope": {"qk_rope_head_dim": [0, 64, *[8] * 22]},
    "low_rank": {"method": "split", "kv_lora_rank": [*range(64, 88)], "k_lora_rank": [*range(40, 64)]},
}


@pytest.mark.parametrize(
    ("sizes", "mla", "count"),
    [
        (LLAMA_2_7B, None, 6_738_415_616),
        (SMOLLM_1B7, None, 1_711_376_384),
        (LLAMA_2_7B, KEPT, None),
        (SMOLLM_1B7, KEPT, None),
        (SMOLLM_1B7, LISTS, None),
    ],
    ids=["llama-2-7b", "smollm-1.7b", "llama-2-7b-joint", "smollm-1.7b-joint", "smollm-1.7b-split-lists"],
)
def test_the_table_covers_real_models(sizes: dict[str, Any], mla: dict[str, Any] | None, count: int | None) -> None:
    """Without memory for them: every name and shape is transformers' on the meta device, nothing is left over."""
    config: dict[str, Any] = {"model_type": "llama", **sizes}
    if mla is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    else:
        as_mla = {**config, "model_type": "mha2mla_llama", "attention_output_bias": False, "mha2mla": mla}
        config = converted_config(config, parse_architecture(as_mla, "test"), "auto")
        with torch.device("meta"):
            model = MHA2MLALlamaForCausalLM(MHA2MLALlamaConfig(**config))
    architecture = parse_architecture(config, "test")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if sizes["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert architecture.tensor_shapes() == expected

    rows, shapes = parameter_map(architecture), megatron_shapes(architecture)
    assert sorted(name for row in rows for name in row.hf) == sorted(expected)
    assert len({row.megatron for row in rows}) == len(rows) == len(shapes)

    def total(of: dict[str, tuple[int, ...]]) -> int:
        return sum(torch.Size(shape).numel() for name, shape in of.items() if not name.endswith("rope_pairs"))

    assert total(shapes) == sum(parameter.numel() for parameter in model.parameters())
    if count is not None:
        assert total(shapes) == count
