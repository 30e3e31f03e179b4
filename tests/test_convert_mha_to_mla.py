"""MHA -> MLA as a user runs it, against transformers and a float64 reference of a few lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import ROOT, make_llama, refused, run_tool
from tests.reference import reference_logits

H, G, D, L = 4, 2, 16, 3
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def convert(source: Path, target: Path, *words: str) -> Path:
    run_tool("convert_mha_to_mla", source, target, *words)
    return target


def load(folder: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(folder: Path, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, **options)(TOKENS).logits


@pytest.fixture(scope="module")
def score_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    save_file({"scores": torch.rand(L, G, D // 2, generator=torch.Generator().manual_seed(2))}, file)
    return file


YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16}
"""With an attention factor of 1.2."""

EXACT = [
    ["partial_rope.strategy=full"],
    ["partial_rope.strategy=full", "low_rank.method=joint", "low_rank.kv_lora_rank=32"],
    ["partial_rope.strategy=full", "low_rank.method=split", "low_rank.d_kv=16", "low_rank.singular_values=sqrt"],
    [
        "partial_rope.strategy=high",
        "partial_rope.qk_rope_head_dim=16",
        "low_rank.method=value",
        "low_rank.kv_lora_rank=32",
    ],
]


@pytest.mark.parametrize("words", EXACT, ids=["none", "joint", "split", "value"])
@pytest.mark.parametrize(
    "variant", ["gqa-tied", "mha-untied-biased", "sharded", "llama3-rope", "yarn", "linear", "dynamic", "longrope"]
)
def test_full_rope_and_full_rank_equal_the_original(tmp_path: Path, words: list[str], variant: str) -> None:
    changes: dict = {
        "gqa-tied": {},
        "mha-untied-biased": {"groups": 4, "tied": False, "bias": True, "mlp_bias": True},
        "sharded": {"max_shard_size": "60KB"},
        "yarn": {"rope_parameters": YARN},
        "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
        # Of more tokens than the model is made for, on which the frequencies depend.
        "dynamic": {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
            "max_position_embeddings": 8,
        },
        "longrope": {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "short_factor": [1.0] * 8,
                "long_factor": [3.0] * 8, "original_max_position_embeddings": 8,
            }
        },
        "llama3-rope": {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    }[variant]  # fmt: skip
    source = make_llama(tmp_path / "source", **changes)
    if variant == "sharded":
        assert (source / "model.safetensors.index.json").exists()
    if variant.startswith("mha"):
        words = [w.replace("kv_lora_rank=32", "kv_lora_rank=64") for w in words]
    converted = convert(source, tmp_path / "mla", *words)
    # One reordering of float32 sums; a wrong row or sign shows at 1e-1.
    assert (logits(converted) - logits(source)).abs().max() < 1e-4


STRATEGIES = {
    "full": (["partial_rope.strategy=full"], lambda s: [list(range(8))] * G),
    "high": (["partial_rope.strategy=high", "partial_rope.qk_rope_head_dim=6"], lambda s: [[0, 1, 2]] * G),
    "low": (["partial_rope.strategy=low", "partial_rope.qk_rope_head_dim=6"], lambda s: [[5, 6, 7]] * G),
    "uniform": (["partial_rope.qk_rope_head_dim=4", "partial_rope.uniform_start=1"], lambda s: [[1, 5]] * G),
    "ends": (
        ["partial_rope.strategy=ends", "partial_rope.qk_rope_head_dim=6", "partial_rope.ends_high_pairs=1"],
        lambda s: [[0, 6, 7]] * G,
    ),
    "2-norm": (
        ["partial_rope.strategy=2-norm", "partial_rope.qk_rope_head_dim=6"],
        lambda s: [sorted(sorted(range(8), key=lambda j: -s[g, j])[:3]) for g in range(G)],
    ),
}
RANKS = {"joint": 20, "split": 9, "key": 7, "value": 11, "none": None}


@pytest.fixture(scope="module")
def biased_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "biased", bias=True, seed=3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", RANKS)
def test_every_strategy_and_method_against_the_reference(
    tmp_path: Path, biased_llama: Path, score_file: Path, strategy: str, method: str
) -> None:
    words, pairs_of = STRATEGIES[strategy]
    scores = load_file(score_file)["scores"]
    words = [*words, f"low_rank.method={method}"]
    words += [f"low_rank.kv_lora_rank={RANKS[method]}"] if RANKS[method] else []
    words += [f"partial_rope.scores={score_file}"] if strategy == "2-norm" else []
    pairs = [pairs_of(scores[layer]) for layer in range(L)]
    _compare(biased_llama, tmp_path, words, pairs, method, [RANKS[method]] * L)


def test_another_r_and_c_in_every_layer(tmp_path: Path, biased_llama: Path) -> None:
    """r = 0 in the first layer, r = d in the second; the cache holds what the formula says."""
    words = ["partial_rope.qk_rope_head_dim=[0,16,4]", "low_rank.method=joint", "low_rank.kv_lora_rank=[30,17,24]"]
    pairs = [[[]] * G, [list(range(8))] * G, [[0, 4]] * G]
    folder = _compare(biased_llama, tmp_path, words, pairs, "joint", [30, 17, 24])
    cache = load(folder)(TOKENS, use_cache=True).past_key_values
    sizes = [(layer.keys.numel() + layer.values.numel()) // TOKENS.numel() for layer in cache.layers]
    assert sizes == [0 * G + 30, 16 * G + 17, 4 * G + 24]
    report = json.loads((folder / "conversion_report.json").read_text())
    assert [layer["cache_elements_after"] for layer in report["layers"]] == sizes
    assert report["cache_elements_per_token"]["before"] == L * 2 * G * D


def test_keys_and_values_of_other_widths(tmp_path: Path, biased_llama: Path) -> None:
    """split: where everything rotates there is nothing to factor of the keys, whatever their rank."""
    words = ["partial_rope.qk_rope_head_dim=[0,16,4]", "low_rank.method=split", "low_rank.kv_lora_rank=[12,17,9]"]
    pairs, ranks = [[[]] * G, [list(range(8))] * G, [[0, 4]] * G], [(7, 12), (0, 17), (20, 9)]
    folder = _compare(biased_llama, tmp_path, [*words, "low_rank.k_lora_rank=[7,0,20]"], pairs, "split", ranks)
    cache = load(folder)(TOKENS, use_cache=True).past_key_values
    sizes = [(layer.keys.numel() + layer.values.numel()) // TOKENS.numel() for layer in cache.layers]
    assert sizes == [7 + 12, 16 * G + 17, 4 * G + 20 + 9]
    report = json.loads((folder / "conversion_report.json").read_text())
    assert [layer["cache_elements_after"] for layer in report["layers"]] == sizes


def test_the_attention_factor_stays_on_all_scores(tmp_path: Path) -> None:
    """transformers puts it on cos and sin, and so on rotated dims alone."""
    source = make_llama(tmp_path / "source", bias=True, rope_parameters=YARN)
    words = ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    _compare(source, tmp_path, words, [[[0, 4]] * G] * L, "joint", [20] * L)
    assert "FAIL" not in run_tool("verify_conversion", source, tmp_path / "mla").stdout


def _compare(source: Path, tmp_path: Path, words: list, pairs: list, method: str, ranks: list) -> Path:
    folder = convert(source, tmp_path / "mla", *words)
    expected = reference_logits(load(source), TOKENS, pairs, method, ranks)
    error = (logits(folder).double() - expected).abs().max().item()
    # Logits reach 5; float32 against float64 leaves 1e-5. A wrong pair or row shows at 1e-1.
    assert error < 1e-4, error
    report = json.loads((folder / "conversion_report.json").read_text())
    assert [layer["rope_pairs"] for layer in report["layers"]] == pairs
    return folder


def test_original_projects_rank_file_equals_scores(tmp_path: Path, tiny_llama: Path, score_file: Path) -> None:
    scores = load_file(score_file)["scores"]
    ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
    torch.save(torch.cat((ranks, ranks), dim=-1).to(torch.uint8), tmp_path / "qk_tensor.pth")
    words = ["partial_rope.strategy=2-norm", "partial_rope.qk_rope_head_dim=6"]
    ours = convert(tiny_llama, tmp_path / "a", *words, f"partial_rope.scores={score_file}")
    theirs = convert(tiny_llama, tmp_path / "b", *words, f"partial_rope.scores={tmp_path / 'qk_tensor.pth'}")
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_qwen2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    words = ["partial_rope.strategy=full", "low_rank.method=joint", "low_rank.kv_lora_rank=32"]
    folder = convert(tmp_path / "source", tmp_path / "mla", *words)
    assert (logits(folder) - logits(tmp_path / "source")).abs().max() < 1e-4


MLA = ["partial_rope.qk_rope_head_dim=[0,8,4]", "low_rank.method=split", "low_rank.kv_lora_rank=12"]


@pytest.fixture(scope="module")
def mla_folder(tmp_path_factory: pytest.TempPathFactory, biased_llama: Path) -> Path:
    return convert(biased_llama, tmp_path_factory.mktemp("mla") / "mla", *MLA)


def test_loads_in_a_process_without_our_package(mla_folder: Path, tmp_path: Path) -> None:
    script = """
import sys
sys.modules["mha2mla_megatron"] = None  # importing it raises ModuleNotFoundError
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
print(out.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(mla_folder)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    greedy = torch.tensor([[1, 2, 3]])
    model = load(mla_folder)
    for _ in range(5):
        greedy = torch.cat((greedy, model(greedy).logits[:, -1:].argmax(-1)), dim=1)
    assert done.stdout.strip().splitlines()[-1] == str(greedy.tolist())


def test_cache_step_by_step_equals_no_cache(mla_folder: Path) -> None:
    model = load(mla_folder)
    with torch.no_grad():
        whole, cache, steps = model(TOKENS, use_cache=False).logits, None, []
        for start, stop in ((0, 7), (7, 8), (8, 15), (15, 24)):
            out = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5  # the same sums, cut elsewhere
    assert cache.get_seq_length() == TOKENS.shape[1]


def test_sdpa_equals_eager(mla_folder: Path) -> None:
    a, b = logits(mla_folder, attn_implementation="sdpa"), logits(mla_folder, attn_implementation="eager")
    assert (a - b).abs().max() < 1e-5  # float32 softmax in another order
    out = load(mla_folder, attn_implementation="eager")(TOKENS, output_attentions=True)
    assert out.attentions[0].shape == (2, H, 24, 24)


def test_left_padding_changes_nothing(mla_folder: Path) -> None:
    model = load(mla_folder)
    short = TOKENS[:1, :5]
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), short), dim=1)
    both = torch.cat((padded, TOKENS[1:, :8]))
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = model.generate(short, **options)[0, 5:]
    assert torch.equal(model.generate(both, attention_mask=mask, **options)[0, 8:], alone)


def test_beams_and_sampling_run(mla_folder: Path) -> None:
    model = load(mla_folder)
    assert model.generate(TOKENS[:, :4], max_new_tokens=4, num_beams=3, eos_token_id=None).shape == (2, 8)
    assert model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=True, eos_token_id=None).shape == (2, 8)


def test_gradients_reach_every_parameter(mla_folder: Path) -> None:
    model = load(mla_folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_keeps_the_pairs(mla_folder: Path) -> None:
    model = load(mla_folder, dtype=torch.bfloat16)
    pairs = model.model.layers[1].self_attn.rope_pairs
    assert pairs.dtype == torch.int64 and pairs.tolist() == [[0, 2, 4, 6]] * G


def test_dtype_and_shards(tmp_path: Path, tiny_llama: Path) -> None:
    folder = convert(tiny_llama, tmp_path / "mla", *MLA, "dtype=bfloat16", "max_shard_size=50KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert load(folder, dtype="auto").dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).dtype == torch.bfloat16


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    _rewrite_tensors(source, lambda t: t["model.layers.2.mlp.up_proj.weight"][0, 0].fill_(65520.0))
    words = ["partial_rope.strategy=full", "dtype=float16"]
    line = refused("convert_mha_to_mla", source, tmp_path / "mla", *words)
    assert "model.layers.2.mlp.up_proj.weight" in line and "65504" in line
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_keys_and_values_of_zero_lose_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    """As of a layer that was pruned away; a relative error of 0 / 0 would be no JSON."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    _rewrite_tensors(source, lambda t: [t[f"model.layers.1.self_attn.{k}_proj.weight"].zero_() for k in "kv"])
    words = ["partial_rope.qk_rope_head_dim=8", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    convert(source, tmp_path / "mla", *words)
    report = json.loads((tmp_path / "mla" / "conversion_report.json").read_text())
    assert [(layer["key_error"] > 0, layer["value_error"] > 0) for layer in report["layers"]] == [
        (True, True), (False, False), (True, True)
    ]  # fmt: skip
    assert report["layers"][1]["key_error"] == report["layers"][1]["value_error"] == 0


def test_hub_id_from_the_offline_cache(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_llama, cache / "snapshots" / ("0" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, words = tmp_path / "mla", ["partial_rope.strategy=full"]
    run_tool("convert_mha_to_mla", "someone/tiny", folder, *words, own_process=True)
    assert torch.equal(logits(folder), logits(tiny_llama))
    line = refused("convert_mha_to_mla", "someone/other", tmp_path / "x", *words, own_process=True)
    assert "someone/other" in line


BAD_SETTINGS = {
    "r odd": (["partial_rope.qk_rope_head_dim=3"], ["qk_rope_head_dim", "3", "odd"]),
    "r > d": (["partial_rope.qk_rope_head_dim=18"], ["qk_rope_head_dim", "18", "16"]),
    "c = 0": (["low_rank.method=joint", "low_rank.kv_lora_rank=0"], ["kv_lora_rank", "0"]),
    "c > rank": (["low_rank.method=joint", "low_rank.kv_lora_rank=61"], ["kv_lora_rank", "61", "60"]),
    "c > rank, split": (["low_rank.method=split", "low_rank.kv_lora_rank=29"], ["kv_lora_rank", "29", "28"]),
    "keys > rank": (
        ["low_rank.method=split", "low_rank.kv_lora_rank=8", "low_rank.k_lora_rank=29"],
        ["k_lora_rank", "29", "layer 0", "28"],
    ),
    "no keys": (
        ["low_rank.method=split", "low_rank.kv_lora_rank=8", "low_rank.k_lora_rank=0"],
        ["k_lora_rank: 0", "28"],
    ),
    "keys > latent": (
        ["low_rank.method=joint", "low_rank.kv_lora_rank=8", "low_rank.k_lora_rank=9"],
        ["k_lora_rank: 9", "layer 0", "1 to 8"],
    ),
    "keys alone": (
        ["low_rank.method=key", "low_rank.kv_lora_rank=8", "low_rank.k_lora_rank=8"],
        ["k_lora_rank", "joint and split", "key"],
    ),
    "keys of two layers": (
        ["low_rank.method=split", "low_rank.kv_lora_rank=8", "low_rank.k_lora_rank=[8,8]"],
        ["k_lora_rank", "list of 2", "3 layers"],
    ),
    "both": (
        ["low_rank.method=joint", "low_rank.kv_lora_rank=8", "low_rank.d_kv=4"],
        ["kv_lora_rank", "d_kv"],
    ),
    "no rank": (["low_rank.method=joint"], ["kv_lora_rank", "d_kv"]),
    "rank for none": (["low_rank.method=none", "low_rank.kv_lora_rank=8"], ["none", "kv_lora_rank"]),
    "unknown key": (["partial_rope.strateg=full"], ["partial_rope.strateg", "strategy"]),
    "unknown strategy": (["partial_rope.strategy=best"], ["best", "uniform"]),
    "unknown method": (["low_rank.method=svd", "low_rank.kv_lora_rank=8"], ["svd", "joint"]),
    "wrong type": (["partial_rope.uniform_start=x"], ["partial_rope.uniform_start", "x"]),
    "start too large": (
        ["partial_rope.qk_rope_head_dim=4", "partial_rope.uniform_start=4"],
        ["uniform_start", "0 to 3"],
    ),
    "too many high pairs": (
        ["partial_rope.strategy=ends", "partial_rope.qk_rope_head_dim=4", "partial_rope.ends_high_pairs=3"],
        ["ends_high_pairs", "3", "2"],
    ),
    "full with other r": (["partial_rope.strategy=full", "partial_rope.qk_rope_head_dim=4"], ["full", "16", "4"]),
    "list too short": (["partial_rope.qk_rope_head_dim=[4,4]"], ["qk_rope_head_dim", "2", "3 layers"]),
    "scores missing": (["partial_rope.strategy=2-norm", "partial_rope.scores=/nowhere.pth"], ["/nowhere.pth"]),
    "scores not given": (["partial_rope.strategy=2-norm"], ["partial_rope.scores"]),
    "dtype": (["dtype=int8"], ["dtype", "int8", "bfloat16"]),
    "ckpt_format": (["ckpt_format=megatron"], ["ckpt_format", "megatron", "hf, torch_dist"]),
    "shard size": (["max_shard_size=big"], ["max_shard_size", "big"]),
    "device": (["device=meta"], ["device", "meta", "cpu, cuda"]),
    "group as value": (["low_rank=joint"], ["low_rank is a group", "low_rank.KEY=VALUE"]),
    "folder for statistics": (["statistics=/"], ["/: a folder, not a file"]),
    "folder for scores": (
        ["partial_rope.strategy=2-norm", "partial_rope.scores=/"],
        ["partial_rope.scores: /: a folder, not a file"],
    ),
    # What another setting leaves without effect.
    "start of high": (
        ["partial_rope.strategy=high", "partial_rope.uniform_start=1"],
        ["uniform_start: of strategy uniform", "strategy is high", "unset"],
    ),
    "start with scores": (
        ["statistics=s.safetensors", "partial_rope.uniform_start=1"],
        ["uniform_start", "strategy is activation"],
    ),
    "high pairs of uniform": (["partial_rope.ends_high_pairs=1"], ["ends_high_pairs: of strategy ends", "uniform"]),
    "map of full": (
        ["statistics=s.safetensors", "partial_rope.strategy=full", "partial_rope.query_map=true"],
        ["query_map", "strategy is full"],
    ),
    "scores of low": (
        ["partial_rope.strategy=low", "partial_rope.scores=s.safetensors"],
        ["partial_rope.scores: of strategies 2-norm and activation", "query_map=true", "strategy is low"],
    ),
    "singular values of none": (["low_rank.singular_values=sqrt"], ["singular_values", "low_rank.method is none"]),
    "objective of none": (
        ["statistics=s.safetensors", "low_rank.objective=inputs"],
        ["low_rank.objective", "low_rank.method is none"],
    ),
    "statistics of none": (["low_rank.statistics=s.safetensors"], ["low_rank.statistics", "low_rank.method is none"]),
    "statistics of weights": (
        ["low_rank.kv_lora_rank=8", "low_rank.statistics=s.safetensors", "low_rank.objective=weights"],
        ["low_rank.statistics: of factors made with statistics, a cache budget and healing", "objective is weights"],
    ),
    "damping of weights": (
        ["low_rank.kv_lora_rank=8", "low_rank.damping=1e-3"],
        ["low_rank.damping", "low_rank.objective is weights"],
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(tmp_path: Path, tiny_llama: Path, case: str) -> None:
    words, named = BAD_SETTINGS[case]
    default_r = [] if any("rope" in word for word in words) else ["partial_rope.qk_rope_head_dim=2"]
    line = refused("convert_mha_to_mla", tiny_llama, tmp_path / "mla", *default_r, *words)
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == []


def _rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _rewrite_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


BAD_MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "unknown architecture": (lambda f: _rewrite_config(f, model_type="gpt2"), ["gpt2", "llama"]),
    "interleaved": (lambda f: _rewrite_config(f, rope_interleaved=True), ["rope_interleaved"]),
    "mixture of experts": (lambda f: _rewrite_config(f, model_type="qwen2_moe"), ["qwen2_moe", "mixtral"]),
    "Gemma": (lambda f: _rewrite_config(f, model_type="gemma2"), ["gemma2", "llama"]),
    "partly rotated": (lambda f: _rewrite_config(f, partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    "incomplete scaling": (
        lambda f: _rewrite_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ["rope_parameters", "yarn", "factor"],
    ),
    "unknown scaling": (
        lambda f: _rewrite_config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        ["rope_parameters", "spiral"],
    ),
    "linear scaling without a factor": (
        lambda f: _rewrite_config(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        ["rope_parameters", "linear", "factor"],
    ),
    "other activation": (lambda f: _rewrite_config(f, hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    "quantised": (lambda f: _rewrite_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "GPTQ of old": (lambda f: (f / "quantize_config.json").write_text("{}"), ["quantize_config.json", "gptq"]),
    "AWQ of old": (lambda f: (f / "quant_config.json").write_text("{}"), ["quant_config.json", "awq"]),
    "Megatron checkpoint": (
        lambda f: (f / "config.json").rename(f / "latest_checkpointed_iteration.txt"),
        ["no config.json", "tools/convert_megatron_to_hf.py"],
    ),
    "huge": (lambda f: _rewrite_config(f, hidden_size=10**12), ["hidden_size"]),
    "negative": (lambda f: _rewrite_config(f, num_hidden_layers=-1), ["num_hidden_layers", "-1"]),
    "truncated": (_truncate, ["model.safetensors", "truncated"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "missing tensor": (
        lambda f: _rewrite_tensors(f, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
        ["model.layers.1.self_attn.k_proj.weight", "missing"],
    ),
    "surplus tensor": (
        lambda f: _rewrite_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        ["surplus", "extra"],
    ),
    "mis-shaped tensor": (
        lambda f: _rewrite_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(7)})),
        ["model.norm.weight", "(7,)", "(64,)"],
    ),
    "NaN": (
        lambda f: _rewrite_tensors(f, lambda t: t["model.layers.1.self_attn.k_proj.weight"][1, 2].fill_(torch.nan)),
        ["model.layers.1.self_attn.k_proj.weight", "not finite"],
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused(tmp_path: Path, tiny_llama: Path, case: str) -> None:
    damage, named = BAD_MODELS[case]
    shutil.copytree(tiny_llama, tmp_path / "source")
    damage(tmp_path / "source")
    line = refused("convert_mha_to_mla", tmp_path / "source", tmp_path / "mla", "partial_rope.strategy=full")
    assert all(part in line for part in named), line
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("method", [method for method in RANKS if method != "none"])
def test_two_stages_are_one(tmp_path: Path, biased_llama: Path, score_file: Path, method: str) -> None:
    """Partial RoPE, then factors, and nothing between: what one conversion gives, bit for bit."""
    rope = [
        "partial_rope.strategy=2-norm", f"partial_rope.scores={score_file}", "partial_rope.qk_rope_head_dim=[0,6,16]"
    ]  # fmt: skip
    factors = [f"low_rank.method={method}", f"low_rank.kv_lora_rank={RANKS[method]}", "low_rank.singular_values=sqrt"]
    once = convert(biased_llama, tmp_path / "once", *rope, *factors)
    first = convert(biased_llama, tmp_path / "first", *rope)
    second = convert(first, tmp_path / "second", *factors)
    expected, found = load_file(once / "model.safetensors"), load_file(second / "model.safetensors")
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    configs, reports = (
        [json.loads((folder / name).read_text()) for folder in (once, second)]
        for name in ("config.json", "conversion_report.json")
    )
    assert configs[0] == configs[1]
    for one, other in zip(reports[0]["layers"], reports[1]["layers"], strict=True):
        assert other.keys() == one.keys() and other["rope_pairs"] == one["rope_pairs"]
        assert [other[key] for key in ("key_error", "value_error")] == pytest.approx(
            [one[key] for key in ("key_error", "value_error")], rel=1e-6
        )
    assert reports[0]["dropped"] and not reports[1]["dropped"]

    for source, words, named in (
        (second, ["low_rank.d_kv=4"], ["converted already", f"low_rank.method={method}"]),
        (first, ["partial_rope.strategy=high", "low_rank.d_kv=4"], ["partial_rope", "2-norm", "[0, 6, 16]", "unset"]),
        (
            first,
            ["statistics=s.safetensors", "cache_budget=0.5"],
            ["statistics", "original", "cache budget", "healing"],
        ),
        (first, [], ["low_rank.kv_lora_rank", "low_rank.d_kv"]),
    ):
        line = refused("convert_mha_to_mla", source, tmp_path / "bad", *words)
        assert all(part in line for part in named), line
        assert not (tmp_path / "bad").exists()


def test_bad_scores_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    words = [tiny_llama, tmp_path / "mla", "partial_rope.strategy=2-norm"]
    save_file({"scores": torch.zeros(L, G, D)}, tmp_path / "s.safetensors")
    assert "(3, 2, 16)" in refused("convert_mha_to_mla", *words, f"partial_rope.scores={tmp_path}/s.safetensors")
    save_file({"scores": torch.full((L, G, D // 2), torch.nan)}, tmp_path / "s.safetensors")
    assert "finite" in refused("convert_mha_to_mla", *words, f"partial_rope.scores={tmp_path}/s.safetensors")
    torch.save(torch.zeros(L, G, 8, dtype=torch.uint8), tmp_path / "s.pth")
    assert "(3, 2, 8)" in refused("convert_mha_to_mla", *words, f"partial_rope.scores={tmp_path}/s.pth")
    (tmp_path / "s.pth").write_bytes(b"no tensor")
    assert "s.pth" in refused("convert_mha_to_mla", *words, f"partial_rope.scores={tmp_path}/s.pth")
    assert not (tmp_path / "mla").exists()


def test_existing_target_needs_overwrite(tmp_path: Path, tiny_llama: Path) -> None:
    target = tmp_path / "mla"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    assert "overwrite=true" in refused("convert_mha_to_mla", tiny_llama, target, "partial_rope.strategy=full")
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    convert(tiny_llama, target, "partial_rope.strategy=full", "overwrite=true")
    assert not (target / "mine.txt").exists()


def test_no_folder_and_no_words(tmp_path: Path) -> None:
    assert "no such folder" in refused("convert_mha_to_mla", tmp_path / "nowhere", tmp_path / "mla")
    assert run_tool("convert_mha_to_mla", "--help").stdout.startswith("usage")
    assert ROOT.is_dir()
