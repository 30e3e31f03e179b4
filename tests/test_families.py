"""Every model family as a user meets it: original against conversion, and Hugging Face against Megatron."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mha2mla_megatron.architecture import parse_architecture, read_architecture
from mha2mla_megatron.calibration.original import OriginalModel
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.checkpoint.mapping import megatron_shapes, parameter_map
from mha2mla_megatron.checkpoint.megatron import iteration_folder
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.convert import converted_config
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM
from mha2mla_megatron.model.parallel import ParallelConfig, check_layout, initialize_parallel
from mha2mla_megatron.model.provider import build_model, transformer_config
from mha2mla_megatron.training.checkpoint import load_weights
from tests.conftest import make_llama, make_tokenizer, refused, run_tool

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(
    vocab_size=256, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, pad_token_id=0,
)  # fmt: skip
"""Without a head_dim of its own, a family's heads have 12 dims."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": dict(model_type="qwen3", head_dim=16, attention_bias=True),
    "mistral-window": dict(model_type="mistral", head_dim=16, sliding_window=7),
    "qwen2-windows": dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "smollm3": dict(model_type="smollm3", no_rope_layers=[1, 0, 1, 0]),
    "smollm3-windows": dict(
        model_type="smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7, attention_bias=True
    ),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    return {**SIZES, **FAMILIES[name]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family as transformers saves it, whose norms and biases are not ones and zeros."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(name)))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias") or "norm" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(root / name)
        make_tokenizer(root / name)
    return {name: root / name for name in FAMILIES}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(TOKENS).logits


def megatron_logits(folder: Path, checkpoint: Path) -> torch.Tensor:
    run_tool("convert_hf_to_megatron", folder, checkpoint)
    architecture = read_architecture(checkpoint / "hf")
    initialize_parallel(ParallelConfig())
    model = build_model(architecture, transformer_config(architecture, ParallelConfig(), torch.float32))
    load_weights([model], iteration_folder(checkpoint, 0), architecture)
    with torch.no_grad():
        return model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)


def full_rank(name: str) -> list[str]:
    """Ranks at which nothing is lost: of V, G d; of [K; V] where no key is rotated, the hidden size."""
    method = "value" if name == "qwen3" else "joint"
    values = 2 * (16 if "head_dim" in FAMILIES[name] else 12)
    ranks = [values, 48, values, 48] if name.startswith("smollm3") else values
    return ["partial_rope.strategy=full", f"low_rank.method={method}", f"low_rank.kv_lora_rank={ranks}"]


@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_and_megatron_give_the_originals_logits(tmp_path: Path, sources: dict[str, Path], name: str) -> None:
    """r = d where the original rotates; factors of full rank (those of values alone where keys are normalised)."""
    expected = logits(sources[name])
    assert expected.std() > 0.5
    run_tool("convert_mha_to_mla", sources[name], tmp_path / "mla", *full_rank(name))
    # One reordering of float32 sums; a window off by one, a lost norm or a rotation too many shows at 1e-2 and above.
    assert (logits(tmp_path / "mla") - expected).abs().max() < 1e-4
    assert (megatron_logits(sources[name], tmp_path / "original_megatron") - expected).abs().max() < 2e-4
    assert (megatron_logits(tmp_path / "mla", tmp_path / "mla_megatron") - expected).abs().max() < 2e-4
    report = json.loads((tmp_path / "mla" / "conversion_report.json").read_text())
    rotated = [bool(layer["qk_rope_head_dim"]) for layer in report["layers"]]
    assert rotated == ([True, False, True, False] if name.startswith("smollm3") else [True] * 4)
    done = run_tool("verify_conversion", sources[name], tmp_path / "mla")
    assert "FAIL" not in done.stdout


def with_nothing_but_norms_in_the_way(folder: Path, pairs: list[int]) -> torch.Tensor:
    """Logits of a Qwen3 of which only these pairs are rotated, by transformers' own code with other tables."""
    model = load(folder)
    original = model.model.rotary_emb.forward
    lost = [j for j in range(16) if j % 8 not in pairs]

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table.clone() for table in original(*args, **kwargs))
        cos[..., lost], sin[..., lost] = 1, 0
        return cos, sin

    model.model.rotary_emb.forward = forward
    with torch.no_grad():
        return model(TOKENS).logits


def test_partial_rope_commutes_with_the_norms_of_qwen3(tmp_path: Path, sources: dict[str, Path]) -> None:
    words = ["partial_rope.strategy=high", "partial_rope.qk_rope_head_dim=6"]
    run_tool("convert_mha_to_mla", sources["qwen3"], tmp_path / "mla", *words)
    expected = with_nothing_but_norms_in_the_way(sources["qwen3"], [0, 1, 2])
    assert (expected - logits(sources["qwen3"])).abs().max() > 0.1
    assert (logits(tmp_path / "mla") - expected).abs().max() < 1e-4
    assert (megatron_logits(tmp_path / "mla", tmp_path / "megatron") - expected).abs().max() < 2e-4
    weights = load_file(tmp_path / "mla" / "model.safetensors")
    assert weights["model.layers.0.self_attn.k_norm.weight"].shape == (2, 16)


CACHED = {
    "qwen3": ["partial_rope.qk_rope_head_dim=6", "low_rank.method=value", "low_rank.kv_lora_rank=20"],
    "mistral-window": ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=20"],
    "smollm3-windows": ["partial_rope.qk_rope_head_dim=4", "low_rank.method=split", "low_rank.kv_lora_rank=12"],
}


@pytest.mark.parametrize("name", CACHED)
def test_every_cache_gives_what_no_cache_gives(tmp_path: Path, sources: dict[str, Path], name: str) -> None:
    run_tool("convert_mha_to_mla", sources[name], tmp_path / "mla", *CACHED[name])
    model = load(tmp_path / "mla")
    windows = read_architecture(tmp_path / "mla").window_layers
    with torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
        for decode in ("absorbed", "expanded"):
            model.config.mla_decode = decode
            # Steps of one token and of several, below and beyond the window; the quantised cache quantises nothing yet.
            for cache in (None, model.latent_cache(residual_length=64)):
                steps = []
                for start, stop in ((0, 5), (5, 6), (6, 12), (12, 13), (13, 24)):
                    out = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    steps.append(out.logits)
                assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-4
                if type(cache).__name__ == "DynamicCache":
                    lengths = [layer.keys.shape[-2] for layer in cache.layers]
                    assert lengths == [6 if layer in windows else 24 for layer in range(4)]
        greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
        without = model.generate(TOKENS[:, :12], use_cache=False, **greedy)
        for kind in ("dynamic", "static"):
            assert torch.equal(model.generate(TOKENS[:, :12], cache_implementation=kind, **greedy), without)


AWARE = {
    "qwen3": ["low_rank.method=value", "cache_budget=0.75"],
    "mistral-window": ["cache_budget=0.5"],
    "smollm3": ["cache_budget=0.5"],
}


@pytest.mark.parametrize("name", AWARE)
def test_data_aware_conversion(tmp_path: Path, sources: dict[str, Path], text: Path, name: str) -> None:
    statistics = tmp_path / "statistics.safetensors"
    sizes = ["samples=8", "sequence_length=24", "stored_samples=8"]
    run_tool("calibrate", sources[name], text, statistics, *sizes)
    words = [f"statistics={statistics}", *AWARE[name], "allocation.rank_multiple=4"]
    errors = {}
    for case, more in {"plain": [], "healed": ["heal.steps=40", "heal.batch_tokens=96"]}.items():
        run_tool("convert_mha_to_mla", sources[name], tmp_path / case, *words, *more)
        report = json.loads((tmp_path / case / "conversion_report.json").read_text())
        cost = sum(layer["cache_elements_after"] for layer in report["layers"])
        assert cost <= float(AWARE[name][-1].split("=")[1]) * report["cache_elements_per_token"]["before"]
        if name == "smollm3":
            assert [report["layers"][layer]["qk_rope_head_dim"] for layer in (1, 3)] == [0, 0]
            assert any(report["layers"][layer]["qk_rope_head_dim"] for layer in (0, 2))
        tokens = load_file(statistics)["sequences"].long()
        with torch.no_grad():
            one, other = (load(f)(tokens).logits.log_softmax(-1) for f in (sources[name], tmp_path / case))
        errors[case] = (one.exp() * (one - other)).sum(-1).mean().item()
    assert errors["healed"] < 0.7 * errors["plain"], errors
    if name == "smollm3":
        words = [f"statistics={statistics}", "cache_budget=0.5", "allocation.per_layer=false"]
        run_tool("convert_mha_to_mla", sources[name], tmp_path / "alike", *words)
        report = json.loads((tmp_path / "alike" / "conversion_report.json").read_text())
        assert len({layer["kv_lora_rank"] for layer in report["layers"]}) == 1


def check_layers_one_by_one(folder: Path) -> None:
    """What calibration, measurements and healing run sees what transformers' forward pass sees."""
    architecture = read_architecture(folder)
    model = OriginalModel(HFReader(folder, architecture), architecture, torch.device("cpu"))
    hidden = model.embed(TOKENS)
    for layer in range(architecture.num_layers):
        hidden = model.layer(layer).run(hidden)
    found = model.head().log_probabilities(hidden)
    assert (found - logits(folder).log_softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mistral-window", "smollm3", "qwen3"])
def test_layers_run_one_by_one_are_the_model(sources: dict[str, Path], name: str) -> None:
    check_layers_one_by_one(sources[name])


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=32),
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_layers_run_one_by_one_have_the_models_frequencies(tmp_path: Path, scaling: str) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    # Longer sequences than the model is made for, on which dynamic frequencies depend.
    check_layers_one_by_one(
        make_llama(tmp_path / "model", rope_parameters=rope, max_position_embeddings=16, tied=False)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_is_autograd_on_the_whole_model(
    tmp_path: Path, sources: dict[str, Path], text: Path, name: str
) -> None:
    """Inputs and values' gradients of each layer, by transformers' own forward pass and autograd through all of it,
    while calibration has one layer in memory, or some, or all."""
    words = ["samples=4", "sequence_length=24", "batch_size=3", "seed=1"]
    files = {}
    for memory in ("1KB", "1MB", "auto"):
        file = tmp_path / f"{memory}.safetensors"
        run_tool("calibrate", sources[name], text, file, *words, f"memory={memory}")
        files[memory] = load_file(file)
    tokens = files["auto"]["sequences"][:4].long()
    model, inputs, values = load(sources[name]), [], []

    def note(module: Any, args: Any, output: Any) -> None:
        inputs.append(args[0])
        values.append(output)

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(note)
    distribution = model(tokens).logits.log_softmax(-1)
    chance = [torch.rand(24, 1, generator=torch.Generator().manual_seed(1_000_003 + index)) for index in range(4)]
    labels = (distribution.exp().cumsum(-1) < torch.stack(chance)).sum(-1, keepdim=True)
    gradients = torch.autograd.grad(-distribution.gather(-1, labels).sum(), values)
    for sums in files.values():
        assert sums.keys() == files["auto"].keys()
        assert all(torch.equal(tensor, files["auto"][key]) for key, tensor in sums.items())  # the same arithmetic
        for layer, (x, y) in enumerate(zip(inputs, gradients, strict=True)):
            x, y = x.flatten(0, 1), y.flatten(0, 1)
            found = sums[f"layers.{layer}.input_moment"], sums[f"layers.{layer}.gradient_moment"]
            for moment, part in zip(found, (x, y), strict=True):
                moment, expected = moment[-part.shape[1] :, -part.shape[1] :], part.T @ part
                # float32 sums in another order; a window, a rotation or a label more or less shows at 1e-2.
                assert (moment - expected).abs().max() < 1e-5 * expected.abs().max(), (layer, len(moment))


REAL = {
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "mistral-7b-v0.1": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=4096, tie_word_embeddings=False,
    ),
    "smollm3-3b": dict(
        model_type="smollm3", vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
    ),
    "mistral-nemo": dict(
        model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_table_covers_real_models(name: str) -> None:
    """Without memory for them: names and shapes are transformers' on the meta device, in Megatron nothing is lost."""
    config = REAL[name]
    original = parse_architecture(config, name)
    method = "value" if original.qk_norm else "joint"
    mla = MHA2MLAConfig(PartialRopeConfig(qk_rope_head_dim=16), LowRankConfig(method=method, kv_lora_rank=256))
    converted = dataclasses.replace(original, model_type="mha2mla_llama", mla=original.resolve(mla))
    as_mla = converted_config(config, converted, "auto")
    with torch.device("meta"):
        models = [
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)),
            MHA2MLALlamaForCausalLM(MHA2MLALlamaConfig(**as_mla)),
        ]
    assert parse_architecture(as_mla, name) == converted
    for model, architecture in zip(models, (original, converted), strict=True):
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            del expected["lm_head.weight"]
        assert architecture.tensor_shapes() == expected
        assert sorted(key for row in parameter_map(architecture) for key in row.hf) == sorted(expected)
        total = sum(
            torch.Size(s).numel() for key, s in megatron_shapes(architecture).items() if "rope_pairs" not in key
        )
        assert total == sum(parameter.numel() for parameter in model.parameters())
    if name == "smollm3-3b":
        assert converted.no_rope_layers == tuple(range(3, 36, 4)) and converted.layout(3).qk_rope_head_dim == 0


REFUSED = {
    "joint keys": ("qwen3", ["low_rank.method=joint", "low_rank.kv_lora_rank=8"], ["joint", "norm", "value"]),
    "split keys": ("qwen3", ["low_rank.method=split", "low_rank.kv_lora_rank=8"], ["split", "norm", "value"]),
    "keys": ("qwen3", ["low_rank.method=key", "low_rank.kv_lora_rank=8"], ["key", "norm", "value"]),
    "query map": (
        "qwen3",
        ["partial_rope.query_map=true", "partial_rope.scores=s.safetensors"],
        ["partial_rope.query_map", "norms"],
    ),
    "rotation": ("smollm3", ["partial_rope.qk_rope_head_dim=[4,4,4,0]"], ["layer 1", "rotates nothing"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, sources: dict[str, Path], case: str) -> None:
    name, words, named = REFUSED[case]
    line = refused("convert_mha_to_mla", sources[name], tmp_path / "mla", *words)
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == []


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "layer type": ("qwen2-windows", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    "too few types": ("qwen2-windows", {"layer_types": ["full_attention"]}, "layer_types"),
    "window": ("mistral-window", {"sliding_window": 0}, "sliding_window"),
    "rotations": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    "interval": ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    "first window": ("qwen2-windows", {"layer_types": None, "max_window_layers": -1}, "max_window_layers"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case: str) -> None:
    name, changes, named = BAD_CONFIGS[case]
    with pytest.raises(UserError, match=named):
        parse_architecture({**config_of(name), **changes}, "test")


def test_context_parallel_windows_are_refused() -> None:
    architecture = parse_architecture(config_of("mistral-window"), "test")
    with pytest.raises(UserError, match="context_parallel_size: 2 with sliding windows"):
        check_layout(architecture, ParallelConfig(context_parallel_size=2), 2)
