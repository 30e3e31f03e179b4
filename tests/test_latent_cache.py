"""The latent cache and the absorbed form against the expanded one, in every way that generate decodes."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from mha2mla_megatron.evaluation.cache import cache_bytes_per_token
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.decode_mha2mla import absorbed_is_cheaper, visible_rows
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
RANKS: dict[str, Any] = {"joint": [15, 14, 9], "split": 9, "key": 7, "value": 11, "none": None}
KEY_RANK = 7
"""Width of the keys' latent of split."""
GREEDY: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)


def make_config(
    method: str = "joint", r: Any = 4, c: Any = None, groups: int = 2, bias: bool = False, **changes: Any
) -> MHA2MLALlamaConfig:
    low_rank = {"method": method, "kv_lora_rank": RANKS[method] if c is None else c}
    if method == "split":
        low_rank["k_lora_rank"] = KEY_RANK
    if method == "joint" and c is None:
        low_rank["k_lora_rank"] = [7, 10, 9]
    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
        attention_bias=bias, attention_output_bias=bias,
        mha2mla={"partial_rope": {"qk_rope_head_dim": r}, "low_rank": low_rank},
    )  # fmt: skip
    return MHA2MLALlamaConfig(**{**settings, **changes})


def make_model(*args: Any, attention: str = "sdpa", **changes: Any) -> MHA2MLALlamaForCausalLM:
    """A random model, biases included, whose attention is far from uniform."""
    torch.manual_seed(0)
    model = MHA2MLALlamaForCausalLM._from_config(make_config(*args, **changes), attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def decoded(model: Any, decode: str, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of TOKENS in pieces of 5, 1, 1, 4 and 1 tokens over a cache."""
    model.config.mla_decode = decode
    cache = DynamicCache() if cache is None else cache
    logits = []
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12)):
            seen = None if mask is None else mask[:, :stop]
            logits.append(model(TOKENS[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("r", [0, 4, 16, [0, 16, 6]], ids=str)
def test_absorbed_equals_expanded(method: str, r: Any) -> None:
    """Absorbed and expanded differ by float32 sums in another order; a wrong row or group shows at 1e-1."""
    for groups, bias in product((1, 2, 4), (False, True)):
        model = make_model(method, r, groups=groups, bias=bias)
        with torch.no_grad():
            whole = model(TOKENS, use_cache=False).logits
        for decode in ("expanded", "absorbed", "auto"):
            assert (decoded(model, decode) - whole).abs().max() < 1e-4, (groups, bias, decode)
        static = StaticCache(config=model.config, max_cache_len=15)
        assert (decoded(model, "absorbed", static) - whole).abs().max() < 1e-4, (groups, bias, "static")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding(attention: str) -> None:
    """A bool mask (sdpa) and an additive one (eager): visible tokens' logits are the expanded form's, none is NaN."""
    model = make_model(attention=attention)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    expanded, absorbed = (decoded(model, decode, mask=mask) for decode in ("expanded", "absorbed"))
    assert (absorbed - expanded)[mask.bool()].abs().max() < 1e-4
    assert absorbed.isfinite().all()


def test_attention_weights_with_eager() -> None:
    weights = {}
    for decode in ("expanded", "absorbed"):
        model = make_model(attention="eager", mla_decode=decode)
        with torch.no_grad():
            cache = model(TOKENS[:, :6]).past_key_values
            weights[decode] = model(TOKENS[:, 6:8], past_key_values=cache, output_attentions=True).attentions
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights.values(), strict=True))
    assert weights["absorbed"][0].shape == (2, 4, 2, 8)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "static, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 5, "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["joint", "split", "none"])
def test_generate_equals_the_expanded_dynamic_cache(method: str, mode: str) -> None:
    options = {**GREEDY, **MODES[mode]}
    prompt = TOKENS[:1].repeat(1, 2) if mode == "prompt lookup" else TOKENS
    mask = torch.ones_like(prompt)
    if mode != "prompt lookup":
        mask[0, :3] = 0
    model = make_model(method, [0, 16, 4])
    expected = {k: v for k, v in options.items() if not k.startswith(("cache_", "prompt_lookup", "prefill_"))}

    def generate(decode: str, **options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        model.config.mla_decode = decode
        return model.generate(prompt, attention_mask=mask, **options).tolist()

    assert generate("absorbed", **options) == generate("expanded", **expected)


def test_assisted_decoding_rolls_back() -> None:
    """Another model's guesses are mostly wrong, so the cache is cropped in nearly every step."""
    model, assistant = make_model("joint"), make_model("split", 0)
    expected = model.generate(TOKENS[:1], **{**GREEDY, "max_new_tokens": 20})
    model.config.mla_decode = assistant.config.mla_decode = "absorbed"
    assisted = model.generate(TOKENS[:1], assistant_model=assistant, **{**GREEDY, "max_new_tokens": 20})
    assert assisted.tolist() == expected.tolist()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_continued_conversation_and_reused_prefix(static: bool) -> None:
    """The cache comes back from generate and goes on; a copy of it is a prefix for another continuation."""
    model = make_model(mla_decode="absorbed")
    cache: Any = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
    first = model.generate(TOKENS, past_key_values=cache, **GREEDY)
    prefix = copy.deepcopy(cache)
    turn = torch.cat((first, TOKENS[:, :4]), dim=1)
    expected = model.generate(turn, **GREEDY)
    assert model.generate(turn, past_key_values=cache, **GREEDY).tolist() == expected.tolist()
    other = torch.cat((first, TOKENS[:, 5:7]), dim=1)
    again = model.generate(other, past_key_values=prefix, **GREEDY)
    assert again.tolist() == model.generate(other, **GREEDY).tolist()


def test_static_step_compiles_in_one_graph() -> None:
    """Prefill, then steps through one compiled graph, as generate does on a GPU; not one graph break or recompile."""
    model = make_model(r=[0, 16, 4], mla_decode="absorbed")
    expected = model.generate(TOKENS, **GREEDY)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # generate compiles on a GPU only
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = model.generate(TOKENS, cache_implementation="static", compile_config=config, **GREEDY)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled.tolist() == expected.tolist()


@pytest.mark.parametrize("method", RANKS)
def test_bytes_are_the_formula(method: str) -> None:
    """Dynamic: what a forward leaves behind. Static: what is allocated, in place from the first to the last token."""
    r, c = [0, 16, 4], None if method == "none" else 9
    model = make_model(method, r, c)
    elements = {
        "joint": [9, 2 * 16 + 9, 2 * 4 + 9],
        "split": [7 + 9, 2 * 16 + 9, 2 * 4 + 7 + 9],  # a layer that rotates every dim has no key latent
        "key": [9 + 32, 32 + 32, 8 + 9 + 32],
        "value": [32 + 9, 32 + 9, 32 + 9],
        "none": [64, 64, 64],
    }[method]
    assert cache_bytes_per_token(model) == 4 * sum(elements)
    assert [model.config.layout(layer).cache_elements for layer in range(3)] == elements
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
        storages = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
        model(TOKENS[:, :1], past_key_values=cache)
    assert sum(storage.nbytes() for storage in storages) == 2 * 20 * 4 * sum(elements)
    after = [part.data_ptr() for layer in cache.layers for part in (layer.keys, layer.values)]
    assert after == [storage.data_ptr() for storage in storages]


def test_offloaded_cache_layers_move_both_parts() -> None:
    """What cache_implementation="offloaded" does to a layer (the copies need a GPU's streams)."""
    model = make_model()
    with torch.no_grad():
        cache = model(TOKENS).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_gradients_and_adapters_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An up-projection that is no plain Linear (an adapter, a quantised one) is called, not read."""
    from mha2mla_megatron.hf import modeling_mha2mla

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("absorbed")

    monkeypatch.setattr(modeling_mha2mla, "absorbed_attention", fail)
    model = make_model(mla_decode="absorbed")
    cache = model(TOKENS[:, :6]).past_key_values
    model(TOKENS[:, 6:7], past_key_values=cache).logits.sum().backward()
    with torch.no_grad(), pytest.raises(AssertionError, match="absorbed"):
        model(TOKENS[:, 7:8], past_key_values=cache)

    class Adapter(torch.nn.Linear):
        pass

    for layer in model.model.layers:
        layer.self_attn.v_up_proj.__class__ = Adapter
    with torch.no_grad():
        model(TOKENS[:, 7:8], past_key_values=cache)


def test_masks() -> None:
    four, padding = torch.ones(2, 1, 1, 5, dtype=torch.bool), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert visible_rows(None, 1, static=False) == (None, True)
    assert not visible_rows(None, 2, static=False)[1] and not visible_rows(None, 1, static=True)[1]
    assert visible_rows(four, 1, static=True) == (four, True)
    mask, usable = visible_rows(padding, 1, static=False)
    assert usable and mask is not None and mask.tolist() == [[[[False, True, True]]], [[[True, True, True]]]]
    assert not visible_rows(padding, 2, static=False)[1] and not visible_rows(object(), 1, static=False)[1]


def test_cost_rule() -> None:
    """Absorbed for a few tokens, expanded for many and wherever nothing is factored."""
    llama = LatentLayout(4096, 32, 32, 128, 16, "joint", 2048)
    assert absorbed_is_cheaper(llama, 1) and absorbed_is_cheaper(llama, 112) and not absorbed_is_cheaper(llama, 113)
    assert not absorbed_is_cheaper(LatentLayout(4096, 32, 32, 128, 16, "none", None), 1)
    # One row of 2 heads, c = 8: 2 x (2 x 2 + 8 + 8) multiplications against 8 x (2 x 2 + 2 x 4) + 2 x 8.
    small = LatentLayout(8, 2, 2, 4, 2, "joint", 8)
    costs = [(rows * 20, 8 * 12 + rows * 8) for rows in (2, 16, 18)]
    assert [absorbed_is_cheaper(small, s) for s in (1, 8, 9)] == [a <= e for a, e in costs]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "huge rank": ({"c": 1 << 40}, "kv_lora_rank: 1099511627776"),
    "rank of one layer": ({"c": [8, 8, 1 << 30]}, "kv_lora_rank"),
    "negative rank": ({"c": -3}, "kv_lora_rank: -3"),
    "no rank": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "split",
                "kv_lora_rank": None}}}, "kv_lora_rank: None"),
    "negative r": ({"r": -2}, "qk_rope_head_dim: -2"),
    "no r": ({"r": None}, "qk_rope_head_dim"),
    "r is no number": ({"r": "four"}, "qk_rope_head_dim: 'four'"),
    "fractional r": ({"r": 4.0}, "qk_rope_head_dim: 4.0"),
    "odd r": ({"r": 3}, "qk_rope_head_dim: 3"),
    "r above d": ({"r": 18}, "qk_rope_head_dim: 18"),
    "list of another length": ({"r": [4, 4]}, "length"),
    "method": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "x", "kv_lora_rank": 4}}},
               "low_rank.method: 'x'"),
    "rank of keys": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "split",
                     "kv_lora_rank": 9, "k_lora_rank": 25}}}, "k_lora_rank: 25 is not a number from 1 to the keys'"),
    "rank of keys, joint": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "joint",
                            "kv_lora_rank": 9, "k_lora_rank": 10}}}, "k_lora_rank: 10 is not a number from 1 to"),
    "rank of keys, value": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method": "value",
                            "kv_lora_rank": 9, "k_lora_rank": 4}}}, "k_lora_rank: 4, but low_rank.method is value"),
    "ranks of keys of another length": ({"mha2mla": {"partial_rope": {"qk_rope_head_dim": 4}, "low_rank": {"method":
                                        "split", "kv_lora_rank": 9, "k_lora_rank": [4, 4]}}}, "length"),
    "no settings": ({"mha2mla": {"partial_rope": 3}}, "partial_rope"),
    "heads": ({"groups": 3}, "num_key_value_heads 3"),
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads: -4"),
    "negative groups": ({"groups": -2}, "num_key_value_heads: -2"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads: 0"),
    "huge hidden size": ({"hidden_size": 1 << 40}, "hidden_size: 1099511627776"),
    "negative head dim": ({"head_dim": -8}, "head_dim: -8"),
    "negative vocabulary": ({"vocab_size": -1}, "vocab_size: -1 is not a number from 1"),
    "millions of layers": ({"num_hidden_layers": 1 << 24}, "num_hidden_layers: 16777216 is not a number from 1 to 163"),
    "no mapping": ({"mha2mla": 7}, "config.mha2mla.partial_rope"),
    "types are no list": ({"layer_types": 3}, "layer_types: not a list with an entry for each of 3 layers"),
    "too few types": ({"layer_types": ["full_attention"]}, "layer_types: not a list with an entry for each of 3"),
    "unknown type": ({"layer_types": ["full_attention"] * 2 + ["x"]}, "layer_types: 'x' is not one of full_attention"),
    "too few layers with rope": ({"no_rope_layers": [1]}, "no_rope_layers: not a list"),
    "window": ({"layer_types": ["sliding_attention"] * 3, "sliding_window": -5}, "sliding_window: -5 is not a number"),
    "no window": ({"layer_types": ["sliding_attention"] * 3}, "sliding_window: None is not a number from 1 on"),
    "decode": ({"mla_decode": "fast"}, "mla_decode: 'fast'"),
    "kernel": ({"mla_kernel": "cuda"}, "mla_kernel: 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case: str) -> None:
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    line = str(error.value)
    assert message in line and "\n" not in line
