"""The static quantised cache and its kernels: the dynamic cache's numbers, in memory of a fixed size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from mha2mla_megatron.evaluation.cache import stored_bytes
from mha2mla_megatron.hf.decode_packed_mha2mla import choose_packed_tiles, flash_decode_packed
from mha2mla_megatron.hf.latent_cache_mha2mla import LatentQuantizedCache
from mha2mla_megatron.hf.packed_tokens_mha2mla import PackedTokens
from mha2mla_megatron.hf.quantise_triton_mha2mla import append_token
from mha2mla_megatron.hf.static_cache_mha2mla import StaticLatentLayer
from tests.conftest import run_cases_in_eight_processes, start_cases
from tests.kernel_variants import counted_variants
from tests.test_latent_cache import GREEDY, RANKS, TOKENS, decoded, make_model
from tests.test_quantised_cache import PER_LAYER, SMALL, random_rows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STATIC = {"backend": "latent", "static": True}


@pytest.mark.parametrize(("words", "line"), [((24, 0), "24 cases\n"), (("model",), "5 models\n")], ids=["24", "model"])
def test_interpreted_kernels(words: tuple[object, ...], line: str) -> None:
    pytest.importorskip("triton")
    out, err = start_cases("packed_kernel_cases", *words, TRITON_INTERPRET="1").communicate()
    assert out == line, out + err


def test_layers_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 layers of all widths and caches of two lengths: as in tests/test_decode_kernel.py; bytes can be moved 16 at
    once, and writing a token and averaging depend on both, the power of two and the columns."""
    pytest.importorskip("triton")
    length = torch.tensor(70)
    with counted_variants(monkeypatch) as variants:
        for rope_dim, rank in [(0, 184), *zip(range(2, 42, 2), range(24, 184, 8), strict=True)]:
            for capacity in (1000, 2000):
                q_rope, q_key, k_rope, latents = (
                    torch.zeros(2, heads, 1, width).bfloat16()
                    for heads, width in ((9, 3 * rope_dim), (9, rank), (1, 3 * rope_dim), (1, rank))
                )
                rope, unrotated = (PackedTokens(new[:, 0], capacity, 4, 32, 64) for new in (k_rope, latents))
                every = slice(0, rank)
                flash_decode_packed(q_rope, q_key, rope, unrotated, every, every, length, None, 0.1)
                for part, new in ((rope, k_rope), (unrotated, latents)):
                    if part.width:
                        append_token(part, new[:, 0], length)
    counts = {name: len(found) for name, found in variants.items()}
    assert counts == {
        "_deal_query": 1, "_score_packed": 6, "_average_packed": 9, "_combine_splits": 4, "_append_token": 13
    }  # fmt: skip


PIECES = ([31], [1] * 31, [9, 1, 1, 13, 7], [5, 1, 1, 4] + [1] * 20, [2, 29])


@pytest.mark.parametrize("bits", [(8, 16), (4, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("residual_length", [0, 2, 9, 40])
def test_same_tokens_as_the_dynamic_cache(bits: tuple[int, int], residual_length: int) -> None:
    """Whatever the pieces, every update sees what the dynamic cache's sees, bit for bit, and zeros behind it."""
    keys, values = random_rows(2, 1, 31, 7), random_rows(2, 1, 31, 4, seed=1)
    settings = {"group_size": 4, "residual_length": residual_length}
    for pieces in PIECES:
        dynamic: Any = LatentQuantizedCache(make_model().config, *bits, **settings).layers[0]
        static = StaticLatentLayer(31, *bits, **settings)
        for again in range(2):
            start = 0
            for piece in pieces:
                new = keys[..., start : start + piece, :], values[..., start : start + piece, :]
                start += piece
                for seen, expected in zip(static.update(*new), dynamic.update(*new), strict=True):
                    assert torch.equal(seen[..., :start, :], expected)
                    assert seen.shape[2] == 31 and not seen[..., start:, :].any()
                assert static.get_seq_length() == start
            dynamic.reset()
            static.reset()
            assert static.get_seq_length() == 0, again


def test_small_caches() -> None:
    """Room for less than a group, for one token, and layers without rotated keys."""
    for length in (1, 5, 6, 7):
        static = StaticLatentLayer(length, 4, 4, 4, 2)
        for token in range(length):
            seen, rope = static.update(torch.full((1, 1, 1, 3), 1.0 + token), torch.zeros(1, 1, 1, 0))
            assert torch.allclose(seen[0, 0, : token + 1, 0], torch.arange(1.0, token + 2), atol=2e-3)
            assert rope.shape == (1, 1, length, 0)


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("decode", ["expanded", "absorbed"])
def test_logits_of_the_dynamic_cache(method: str, decode: str) -> None:
    """The same rows; longer ones, with zeros that are hidden, so float32 sums differ by rounding."""
    model = make_model(method, PER_LAYER)
    dynamic = decoded(model, decode, model.latent_cache(nbits=4, **SMALL))
    static = decoded(model, decode, model.static_latent_cache(15, nbits=4, **SMALL))
    # A rounding may move a code of the layers behind: not beyond a small part of what 4 bits cost.
    assert (static - dynamic).abs().max() < 1e-3 < 0.02 < (dynamic - decoded(model, decode)).abs().max()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate(mode: str) -> None:
    model = make_model(r=PER_LAYER)
    options = {**GREEDY, **MODES[mode], "max_new_tokens": 20, "cache_implementation": "quantized"}
    results = []
    for config in ({"backend": "latent"}, STATIC):
        torch.manual_seed(3)
        results.append(model.generate(TOKENS, cache_config={**config, "nbits": 4, **SMALL}, **options).tolist())
    assert results[0] == results[1]


def test_conversation_and_prefix() -> None:
    model = make_model(r=PER_LAYER)
    caches: list[Any] = [model.latent_cache(nbits=4, **SMALL), model.static_latent_cache(60, nbits=4, **SMALL)]
    results = []
    for cache in caches:
        first = model.generate(TOKENS, past_key_values=cache, **GREEDY)
        prefix = copy.deepcopy(cache)
        turn = torch.cat((first, TOKENS[:, :5]), dim=1)
        results.append([model.generate(turn, past_key_values=c, **GREEDY).tolist() for c in (cache, prefix)])
    assert results[0] == results[1] and results[1][0] == results[1][1]


def test_step_compiles_in_one_graph() -> None:
    """Steps that append, and pack a group every fourth time, through one graph without a break or a recompile."""
    model = make_model(r=[0, 16, 4], mla_decode="absorbed")
    options: dict[str, Any] = dict(cache_implementation="quantized", cache_config={**STATIC, "nbits": 4, **SMALL})
    options |= {**GREEDY, "max_new_tokens": 16}
    expected = model.generate(TOKENS, disable_compile=True, **options)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = model.generate(TOKENS, compile_config=config, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled.tolist() == expected.tolist()


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 16), (2, 4)], ids=str)
def test_bytes_are_the_formula(method: str, bits: tuple[int, int]) -> None:
    """Groups of 4 tokens that 27 leave, and a window of 6; float32. Nothing is allocated later."""
    nbits, rope_nbits = bits
    model = make_model(method, PER_LAYER, None if method == "none" else 9)
    cache: Any = model.static_latent_cache(27, nbits=nbits, rope_nbits=rope_nbits, **SMALL)
    assert cache.nbytes == 0
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
        addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
        for _ in range(10):
            model(TOKENS[:, :1], past_key_values=cache)

    def block(width: int, bits: int) -> int:
        return 4 * width * 2 if bits == 16 else width * (4 * bits // 8 + 2 + 2)

    expected = 0
    for layer in range(3):
        rope = model.config.layout(layer).rope_dim
        latent = model.config.layout(layer).cache_elements - rope
        expected += 2 * (6 * (block(latent, nbits) + block(rope, rope_nbits)) + 6 * 4 * (latent + rope))
    assert cache.nbytes == expected == stored_bytes(cache) - 3 * 8  # each layer's count of tokens
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cache_len": 0}, "max_cache_len: 0"),
        ({"max_cache_len": 19}, "max_cache_len: 19 tokens fit, but prompt and answer may take 20"),
        ({"nbits": 3}, "nbits: 3"),
        ({"backend": "quanto"}, "static, but"),
    ],
    ids=["length", "room", "nbits", "backend"],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_model().generate(TOKENS, cache_implementation="quantized", cache_config={**STATIC, **settings}, **GREEDY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_before_it_is_written() -> None:
    """A cache made by hand, full to the last token, and one token more; rolling back."""
    model = make_model()
    tokens = 12 + GREEDY["max_new_tokens"] - 1
    model.generate(TOKENS, past_key_values=model.static_latent_cache(tokens), **GREEDY)
    small = model.static_latent_cache(tokens - 1)
    with pytest.raises(ValueError, match="max_cache_len: 19 tokens fit"):
        model.generate(TOKENS, past_key_values=small, **GREEDY)
    assert small.nbytes == 0
    options: dict[str, Any] = dict(cache_implementation="quantized", cache_config=dict(STATIC), **GREEDY)
    with pytest.raises(ValueError, match="crop: a latent cache of fixed size cannot remove tokens"):
        model.generate(TOKENS[:1], prompt_lookup_num_tokens=3, **options)


@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles(element_size: int) -> None:
    """Powers of two; no more registers for the average than there are."""
    for m in (1, 9, 32, 160):
        for v in (16, 96, 100, 512, 1024, 2048, 4096):
            tiles = choose_packed_tiles(7, m, 5000, v, element_size, 132)
            sizes = (tiles.block_m, tiles.block_n, tiles.block_c, tiles.warps)
            assert all(n & (n - 1) == 0 for n in sizes)
            assert tiles.block_m * tiles.block_c <= 64 * 32 * tiles.warps * (1 + (element_size == 2))
            assert min(tiles.block_n, tiles.score_k) >= 64  # see PackedTiles
            assert 1 <= tiles.splits <= 5000 // 64 + 1


@pytest.mark.gpu
@needs_gpu
def test_random_shapes_on_the_gpu() -> None:
    """96 shapes, with the code for NVIDIA's instructions."""
    run_cases_in_eight_processes("packed_kernel_cases", 12)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_on_the_gpu(dtype: torch.dtype) -> None:
    """One recorded step, replayed past several packed groups, gives the dynamic cache's logits."""
    model = make_model(r=PER_LAYER, mla_decode="absorbed", max_position_embeddings=128).to("cuda", dtype)
    prompt, steps = TOKENS.cuda(), 40
    static, dynamic = model.static_latent_cache(64, nbits=4, **SMALL), model.latent_cache(nbits=4, **SMALL)
    token = torch.ones(2, 1, dtype=torch.long, device="cuda")
    with torch.no_grad():
        for cache in (static, dynamic):
            model(prompt, past_key_values=cache)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(token, past_key_values=static)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        model(token, past_key_values=dynamic)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=static).logits
        errors = []
        for i in range(steps):
            token.fill_(3 + i)
            graph.replay()
            expected = model(token, past_key_values=dynamic).logits
            errors.append(((logits - expected).float().norm() / expected.float().norm()).item())
    # A rounding can move a 4-bit code of the small random model; a wrong row or group is off by its whole size.
    print([round(error, 4) for error in errors])
    assert max(errors) < (0.02 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
@needs_gpu
def test_compiled_generate_on_the_gpu() -> None:
    """generate compiles the step by itself; in 8 bits its tokens are full precision's."""
    model = make_model(r=PER_LAYER, mla_decode="absorbed").to("cuda")
    options = {**GREEDY, "max_new_tokens": 24}
    config = {**STATIC, "nbits": 8, "rope_nbits": 16, **SMALL}
    packed = model.generate(TOKENS.cuda(), cache_implementation="quantized", cache_config=config, **options)
    assert packed.tolist() == model.generate(TOKENS.cuda(), **options).tolist()
