"""The Megatron model in one process: an original model against transformers, a converted one against plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from mha2mla_megatron.architecture import Architecture, parse_architecture
from mha2mla_megatron.checkpoint.mapping import parameter_map
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.frequencies import inverse_frequencies
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM
from mha2mla_megatron.model.implementation import choose_implementation
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel
from mha2mla_megatron.model.provider import (
    build_model,
    sharded_weights,
    transformer_config,
)
from tests.megatron_cases import LLAMA3, converted_config, original_config, random_tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
METHODS = ("joint", "split", "key", "value", "none")
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ORIGINALS = {
    "grouped": original_config(),
    "tied": original_config(tie_word_embeddings=True),
    "multi-head": original_config(num_key_value_heads=4),
    "multi-query": original_config(num_key_value_heads=1),
    "wide-heads": original_config(head_dim=20),
    "attention-bias": original_config(attention_bias=True),
    "mlp-bias": original_config(mlp_bias=True),
    "all-biases": original_config(attention_bias=True, mlp_bias=True),
    "llama3": original_config(rope_parameters=LLAMA3),
    "linear": original_config(rope_parameters=LINEAR),
    "yarn": original_config(rope_parameters=YARN),
    "qwen2": {**original_config(), "model_type": "qwen2"},
    "mistral": {**original_config(), "model_type": "mistral", "sliding_window": None},
}
MEGATRON_NAMES = {
    "q_proj": "linear_q", "k_rope_proj": "linear_k_rope", "kv_down_proj": "linear_kv_down", "k_up_proj": "linear_k_up",
    "k_nope_proj": "linear_k_nope", "v_up_proj": "linear_v_up", "v_proj": "linear_v", "o_proj": "linear_proj",
    "rope_pairs": "rope_pairs",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    initialize_parallel(ParallelConfig())


def megatron_model(architecture: Architecture, tensors: dict[str, torch.Tensor], **settings: Any) -> Any:
    """The float32 model with these Hugging Face tensors in it."""
    dtype = settings.pop("dtype", torch.float32)
    model = build_model(architecture, transformer_config(architecture, ParallelConfig(), dtype, **settings))
    state = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    if not architecture.tie_word_embeddings:
        state["output_layer.weight"] = tensors["lm_head.weight"]
    for layer in range(architecture.num_layers):
        hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        state[megatron + "input_layernorm.weight"] = tensors[hf + "input_layernorm.weight"]
        state[megatron + "pre_mlp_layernorm.weight"] = tensors[hf + "post_attention_layernorm.weight"]
        mlp, attention = hf + "mlp.", hf + "self_attn."
        for kind in ("weight", "bias"):
            if f"{mlp}down_proj.{kind}" in tensors:
                state[f"{megatron}mlp.linear_fc2.{kind}"] = tensors[f"{mlp}down_proj.{kind}"]
                gate_up = tensors[f"{mlp}gate_proj.{kind}"], tensors[f"{mlp}up_proj.{kind}"]
                state[f"{megatron}mlp.linear_fc1.{kind}"] = torch.cat(gate_up)
            if architecture.mla is None and f"{attention}q_proj.{kind}" in tensors:
                qkv = [tensors[f"{attention}{x}_proj.{kind}"] for x in "qkv"]
                by_group = zip(*(t.chunk(architecture.num_key_value_heads) for t in qkv), strict=True)
                state[f"{megatron}self_attention.linear_qkv.{kind}"] = torch.cat(
                    [torch.cat(group) for group in by_group]
                )
        for name in (name.removeprefix(attention) for name in tensors if name.startswith(attention)):
            projection, dot, kind = name.partition(".")
            if architecture.mla is not None or projection == "o_proj":
                state[f"{megatron}self_attention.{MEGATRON_NAMES[projection]}{dot}{kind}"] = tensors[attention + name]
    model.load_state_dict(state)
    return model


def logits_of(model: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    with torch.no_grad():
        return model(TOKENS, positions, None)


@pytest.mark.parametrize("config", ORIGINALS.values(), ids=ORIGINALS)
def test_original_model_gives_transformers_logits(config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    architecture = parse_architecture(config, "test")
    shapes = architecture.tensor_shapes()
    tensors = {name: random_tensor(name, shape, architecture.head_dim) for name, shape in shapes.items()}
    missing = reference.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys in ([], ["lm_head.weight"])
    with torch.no_grad():
        expected = reference(TOKENS).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(megatron_model(architecture, tensors)), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("method", METHODS)
def test_converted_model_follows_the_formulas(method: str, biases: bool, shared: bool) -> None:
    changes = dict(attention_bias=True, attention_output_bias=True, mlp_bias=True) if biases else {}
    architecture = parse_architecture(converted_config(method, shared, rope_parameters=LLAMA3, **changes), "test")
    tensors = random_tensors(architecture)
    expected = reference_logits(architecture, tensors)
    assert expected.abs().max() > 1
    model = megatron_model(architecture, tensors)
    torch.testing.assert_close(logits_of(model), expected.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        converted_config(
            "joint", True, hidden_size=36, num_key_value_heads=3, num_attention_heads=6, attention_bias=True
        ),
        converted_config("split", True, hidden_size=36, num_key_value_heads=3, num_attention_heads=3),
        converted_config("value", True, num_key_value_heads=1),
        converted_config("none", True),
    ],
    ids=["joint", "split", "multi-query", "none"],
)
def test_shared_rotated_keys_train_as_in_transformers(config: dict[str, Any]) -> None:
    """Logits, and the gradient of every parameter; both in float32, which sums in another order."""
    architecture = parse_architecture(config, "test")
    tensors = random_tensors(architecture)
    reference: Any = MHA2MLALlamaForCausalLM(MHA2MLALlamaConfig(**config))
    reference.load_state_dict(tensors)
    model = megatron_model(architecture, tensors).train()
    logits = [reference(TOKENS).logits, model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)]
    assert logits[0].abs().max() > 1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-4)
    for one in logits:
        torch.nn.functional.cross_entropy(one[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for row in parameter_map(architecture):
        if row.megatron.endswith("rope_pairs"):
            continue
        expected = row.layout.pack([theirs[name] for name in row.hf], architecture)
        found = ours.pop(row.megatron.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"))
        assert (found - expected).norm() < 1e-5 * expected.norm(), row.megatron
    assert not ours


def test_shared_rotated_keys_have_one_table_for_all_heads() -> None:
    """Which Megatron's own rotation takes for packed sequences, that start at position 0 each."""
    architecture = parse_architecture(converted_config("joint", True), "test")
    tensors, frequencies = random_tensors(architecture), inverse_frequencies(architecture)
    model, bounds, x = megatron_model(architecture, tensors), torch.tensor([0, 5, 24]), torch.randn(24, 4, 16)
    positions = torch.cat((torch.arange(5), torch.arange(19)))
    angles = torch.outer(torch.arange(19), frequencies).repeat(1, 2)[:, None, None]
    for layer in range(1, 4):
        attention, r = model.decoder.layers[layer].self_attention, architecture.layout(layer).qk_rope_head_dim
        turns = torch.outer(positions, frequencies[tensors[f"model.layers.{layer}.self_attn.rope_pairs"][0]])
        turned = torch.complex(*x[..., :r].chunk(2, -1)) * torch.polar(torch.ones_like(turns), turns)[:, None]
        expected = torch.cat((turned.real, turned.imag, x[..., r:]), -1)
        for table in attention.rotary_tables(angles):
            assert table.shape == (19, 1, 1, r)
            found = apply_rotary_pos_emb(x, table, attention.config, bounds, cp_group=attention.pg_collection.cp)
            torch.testing.assert_close(found, expected)


def test_everything_rotated_and_nothing_factored_is_the_original_model() -> None:
    config = original_config(attention_bias=True)
    original = parse_architecture(config, "test")
    mla = {"partial_rope": {"strategy": "full"}, "low_rank": {"method": "none"}}
    converted = parse_architecture(
        {**config, "model_type": "mha2mla_llama", "attention_output_bias": True, "mha2mla": mla}, "test"
    )
    tensors = random_tensors(original)
    same = {name.replace("k_proj", "k_rope_proj"): tensor for name, tensor in tensors.items()}
    for layer in range(original.num_layers):
        same[f"model.layers.{layer}.self_attn.rope_pairs"] = torch.arange(8).repeat(2, 1)
    assert torch.equal(logits_of(megatron_model(converted, same)), logits_of(megatron_model(original, tensors)))


@pytest.mark.parametrize("config", [original_config(), converted_config("joint")], ids=["original", "converted"])
def test_bf16_model_is_near_the_float32_model(config: dict[str, Any]) -> None:
    architecture = parse_architecture(config, "test")
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in random_tensors(architecture).items()}
    low, high = (
        megatron_model(architecture, tensors, dtype=dtype, params_dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    logits = logits_of(low)
    assert logits.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in low.parameters())
    expected = logits_of(high)
    assert (logits - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
    ids=["full", "selective"],
)
def test_recomputing_activations_changes_no_gradient(recompute: dict[str, Any]) -> None:
    architecture = parse_architecture(converted_config("split", attention_bias=True), "test")
    tensors = random_tensors(architecture)
    gradients = []
    for settings in ({}, recompute):
        model = megatron_model(architecture, tensors, **settings).train()
        model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)


def test_checkpoint_names_do_not_depend_on_where_the_norms_are() -> None:
    original, converted = (
        sharded_names(parse_architecture(config, "test")) for config in (original_config(), converted_config("joint"))
    )
    assert original["decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"] == (32,)
    assert converted["decoder.layers.3.input_layernorm.weight"] == (32,)
    for names in (original, converted):
        assert names["decoder.layers.3.mlp.linear_fc1.layer_norm_weight"] == (32,)
        assert not [name for name in names if "_extra_state" in name or "pre_mlp_layernorm" in name]
    assert converted["decoder.layers.1.self_attention.rope_pairs"] == (2, 2)
    assert not [name for name in converted if name.startswith("decoder.layers.0.") and "rope" in name]


def test_missing_transformer_engine_is_named() -> None:
    architecture = parse_architecture(original_config(), "test")
    assert choose_implementation("auto") == "local"
    with pytest.raises(UserError, match="transformer_engine needs a GPU and the package"):
        build_model(
            architecture, transformer_config(architecture, ParallelConfig(), torch.float32), "transformer_engine"
        )


@pytest.mark.parametrize("switch", ["apply_rope_fusion", "fused_single_qkv_rope", "flash_decode", "tp_comm_overlap"])
def test_kernels_that_the_converted_attention_cannot_use_are_refused(switch: str) -> None:
    architecture = parse_architecture(converted_config("joint"), "test")
    with pytest.raises(UserError, match=f"{switch}: not possible with the converted attention"):
        transformer_config(architecture, ParallelConfig(), torch.float32, **{switch: True})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported; valid: default, linear"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not supported; valid: default, linear"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "attention factor of 1.13863"),
    ],
)
def test_rope_scalings_that_cannot_be_exact_are_refused(rope: dict[str, Any], message: str) -> None:
    architecture = parse_architecture(original_config(rope_parameters={"rope_theta": 100.0, **rope}), "test")
    with pytest.raises(UserError, match=message):
        inverse_frequencies(architecture)


def sharded_names(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> global shape."""
    model = build_model(architecture, transformer_config(architecture, ParallelConfig(), torch.float32))
    return {v.key: tuple(getattr(v, "global_shape", v.data.shape)) for v in sharded_weights(model).values()}


def random_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: random_tensor(name, shape, architecture.head_dim) for name, shape in architecture.tensor_shapes().items()
    }


def reference_logits(architecture: Architecture, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The converted model in float64, one head at a time, from its Hugging Face tensors: logits [b, s, V]."""
    weights = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    _, heads, groups, d = architecture.heads
    length = TOKENS.shape[1]
    turns = torch.outer(torch.arange(length).double(), inverse_frequencies(architecture).double())  # [s, d/2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + architecture.rms_norm_eps).sqrt() * weights[name]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """x [b, s, r] turned as r/2 complex numbers whose parts are dims i and i + r/2."""
        real, imaginary = x.chunk(2, -1)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(turns), turns)[:, pairs]
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.embed_tokens.weight"][TOKENS]
    for layer in range(architecture.num_layers):
        p, layout = f"model.layers.{layer}.self_attn.", architecture.layout(layer)
        r = layout.qk_rope_head_dim
        width = len(weights[p + "q_proj.weight"]) // heads
        rest = width - r
        n = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        latent = linear(n, p + "kv_down_proj") if p + "kv_down_proj.weight" in weights else n
        c_k = latent[..., : weights[p + "k_up_proj.weight"].shape[1] if layout.factors_key else 0]
        c_v = latent[..., latent.shape[-1] - weights[p + "v_up_proj.weight"].shape[1] if layout.factors_value else 0 :]
        key_name = "k_up_proj" if layout.factors_key else "k_nope_proj"
        nope = linear(c_k if layout.factors_key else n, p + key_name) if rest else n[..., :0]
        value = linear(c_v, p + "v_up_proj") if layout.factors_value else linear(n, p + "v_proj")
        query, rope = linear(n, p + "q_proj"), linear(n, p + "k_rope_proj") if r else n[..., :0]
        shared = layout.rope_heads == 1
        contexts = []
        for head in range(heads):
            g = head // (heads // groups)
            q, v = query[..., head * width : (head + 1) * width], value[..., g * d : (g + 1) * d]
            scores = q[..., r:] @ nope[..., g * rest : (g + 1) * rest].mT
            if r:
                own = 0 if shared else g
                pairs = weights[p + "rope_pairs"][own]
                scores = scores + rotate(q[..., :r], pairs) @ rotate(rope[..., own * r : (own + 1) * r], pairs).mT
            contexts.append((scores / d**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(contexts, -1), p + "o_proj")
        n, p = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight"), f"model.layers.{layer}.mlp."
        x = x + linear(torch.nn.functional.silu(linear(n, p + "gate_proj")) * linear(n, p + "up_proj"), p + "down_proj")
    return linear(norm(x, "model.norm.weight"), "lm_head")
