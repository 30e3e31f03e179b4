"""Quantised caches: ours, and transformers' with the backends that are installed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from mha2mla_megatron.evaluation.cache import stored_bytes
from mha2mla_megatron.evaluation.cached_perplexity import make_cache, window_nll_through
from mha2mla_megatron.evaluation.perplexity import window_nll
from mha2mla_megatron.hf.backend_cache_mha2mla import quantized_cache
from mha2mla_megatron.hf.latent_cache_mha2mla import LatentQuantizedCache
from mha2mla_megatron.hf.quantise_mha2mla import QuantizedRows, fit_grid, pack, unpack
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool
from tests.test_latent_cache import GREEDY, RANKS, TOKENS, decoded, make_model

PER_LAYER = [0, 16, 6]
SMALL: dict[str, Any] = {"group_size": 4, "residual_length": 2}
INSTALLED = {"hqq": is_hqq_available(), "quanto": is_optimum_quanto_available()}
BACKENDS = [
    pytest.param(backend, nbits, axis, marks=pytest.mark.skipif(not INSTALLED[backend], reason=f"no {backend} here"))
    for backend, bits, axes in (("hqq", (2, 4, 8), (0, 1)), ("quanto", (2, 4), (0, -1)))
    for nbits in bits
    for axis in axes
]


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Channels of very different ranges, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator) * torch.logspace(-2, 1, shape[-1])
    return rows + 3 * (torch.rand(*shape, generator=generator) < 0.01)


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_error_against_float64(nbits: int) -> None:
    """No group is worse than the plain grid over its range, computed in float64, but for the grid's float16."""
    x = random_rows(2, 1, 5, 32, 7)
    x[0, 0, 0, :, 0] = 2.0  # a group without a range
    rows = QuantizedRows(nbits, 32)
    rows.append(x.flatten(-3, -2))
    error = (rows.dequantize(x[:, :, 0]).unflatten(-2, (-1, 32)).double() - x.double()).square().sum(-2)
    low, high = x.double().amin(-2, keepdim=True), x.double().amax(-2, keepdim=True)
    step = (high - low) / (2**nbits - 1)
    plain = (((x.double() - low) / step.clamp(min=1e-30)).round() * step + low - x.double()).square().sum(-2)
    rounding = 32 * ((high - low).abs().maximum(low.abs()).squeeze(-2) * 2**-10).square()
    assert (error <= plain * 1.01 + rounding).all()
    assert error[0, 0, 0, 0] == 0
    assert nbits == 8 or error.sum() < 0.9 * plain.sum(), "the search of the grid has no effect"
    if nbits == 8:
        largest = (rows.dequantize(x[:, :, 0]).unflatten(-2, (-1, 32)) - x).abs().amax(-2)
        assert (largest <= step.squeeze(-2) * 0.5 + rounding.sqrt()).all()


def test_sixteen_bits_are_float16() -> None:
    x = random_rows(1, 1, 8, 3)
    rows = QuantizedRows(16, 4)
    rows.append(x)
    assert torch.equal(rows.dequantize(x), x.half().float()) and rows.nbytes == 2 * x.numel()
    rows.append(torch.full_like(x, 1e30))
    assert rows.dequantize(x).isfinite().all()


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_packing(nbits: int) -> None:
    codes = torch.randint(0, 2**nbits, (2, 1, 3, 8, 5), dtype=torch.uint8)
    packed = pack(codes, nbits)
    assert packed.shape == (2, 1, 3, nbits, 5) and torch.equal(unpack(packed, nbits), codes)
    assert packed[0, 0, 0, 0, 0] == sum(int(codes[0, 0, 0, i, 0]) << (i * nbits) for i in range(8 // nbits))
    scale, zero = fit_grid(torch.zeros(1, 4, 2), nbits)
    assert scale.dtype == zero.dtype == torch.float16 and not scale.any()


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 16), (2, 4)], ids=str)
def test_bytes_are_the_formula(method: str, bits: tuple[int, int]) -> None:
    """Of all tensors that the cache object holds: blocks of 4 tokens, then a window of 2 to 5, here 4 of 24 tokens."""
    nbits, rope_nbits = bits
    model = make_model(method, PER_LAYER, None if method == "none" else 9)
    cache = model.latent_cache(nbits=nbits, rope_nbits=rope_nbits, **SMALL)
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
        model(TOKENS, past_key_values=cache)

    def block(width: int, bits: int) -> int:
        return 4 * width * 2 if bits == 16 else width * (4 * bits // 8 + 2 + 2)

    expected = 0
    for layer in range(3):
        rope = model.config.layout(layer).rope_dim
        latent = model.config.layout(layer).cache_elements - rope
        expected += 2 * (5 * (block(latent, nbits) + block(rope, rope_nbits)) + 4 * 4 * (latent + rope))
    assert cache.nbytes == stored_bytes(cache) == expected
    assert [layer.keys.untyped_storage().nbytes() for layer in cache.layers] == [
        layer.keys.numel() * 4 for layer in cache.layers
    ]


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_growth_leaves_old_codes(nbits: int) -> None:
    """The same codes after growth, and whether tokens came together or one by one."""
    model = make_model(r=PER_LAYER)
    layers = []
    keys, values = random_rows(2, 1, 31, 7), random_rows(2, 1, 31, 4, seed=1)
    for pieces in ([31], [1] * 31, [9, 1, 0, 14, 7]):
        layer = LatentQuantizedCache(model.config, nbits=nbits, **SMALL).layers[0]
        start = 0
        for piece in pieces:
            before = [part.clone() for rows in layer.packed for part in rows._parts().values()]
            seen = layer.update(keys[..., start : start + piece, :], values[..., start : start + piece, :])
            start += piece
            after = [part for rows in layer.packed for part in rows._parts().values()]
            for old, new in zip(before, after, strict=False):
                assert torch.equal(new[:, :, : old.shape[2]], old)
            assert seen[0].shape == (2, 1, start, 7) and layer.get_seq_length() == start
            assert torch.equal(seen[0][..., start - piece :, :], keys[..., start - piece : start, :])
        layers.append(layer)
    assert layers[0].packed[0].tokens == 28 and layers[0].keys.shape[-2] == 3
    for layer in layers[1:]:
        for rows, others in zip(layer.packed, layers[0].packed, strict=True):
            for part, other in zip(rows._parts().values(), others._parts().values(), strict=True):
                assert torch.equal(part, other)


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("r", [0, 16, PER_LAYER], ids=str)
@pytest.mark.parametrize("decode", ["expanded", "absorbed"])
def test_logits(method: str, r: Any, decode: str) -> None:
    """Nearer to full precision with more bits, left padding included; the bounds are twice what was seen."""
    model = make_model(method, r, bias=True)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    exact = decoded(model, decode, mask=mask)
    errors = {}
    for nbits in (8, 4, 2):
        cache = model.latent_cache(nbits=nbits, rope_nbits=nbits, group_size=4, residual_length=0)
        logits = decoded(model, decode, cache, mask)
        assert logits.isfinite().all()
        errors[nbits] = ((logits - exact)[mask.bool()].square().mean() / exact.var()).sqrt().item()
    print({nbits: round(error, 5) for nbits, error in errors.items()})
    assert errors[8] < 0.01 and errors[4] < 0.2 and errors[8] < errors[4] < errors[2]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["joint", "split", "none"])
def test_generate_in_8_bits_equals_full_precision(method: str, mode: str) -> None:
    """Past most of the cache being quantised. Both ways to ask for it are the same cache."""
    model = make_model(method, PER_LAYER)
    prompt = TOKENS[:1] if mode == "prompt lookup" else TOKENS
    mask = torch.ones_like(prompt)
    if mode != "prompt lookup":
        mask[0, :3] = 0

    def generate(**options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        options = {**GREEDY, **MODES[mode], "max_new_tokens": 12, **options}
        return model.generate(prompt, attention_mask=mask, **options).tolist()

    settings = {"nbits": 8, "rope_nbits": 16, **SMALL}
    cache = model.latent_cache(**settings)
    tokens = generate(past_key_values=cache)
    assert cache.layers[0].packed[0].tokens >= 16
    assert tokens == generate()
    config = {"backend": "latent", **settings}
    assert generate(cache_implementation="quantized", cache_config=config) == tokens
    assert config == {"backend": "latent", **settings}


def test_assistant_with_a_cache_of_its_own() -> None:
    """Another model's guesses are mostly wrong; both models' caches are made by generate and cropped after each."""
    model, assistant = make_model(r=PER_LAYER), make_model("split", 0)
    config = {"backend": "latent", "nbits": 8, "rope_nbits": 16, **SMALL}
    options = {**GREEDY, "max_new_tokens": 20}
    tokens = model.generate(
        TOKENS[:1], assistant_model=assistant, cache_implementation="quantized", cache_config=config, **options
    )
    assert tokens.tolist() == model.generate(TOKENS[:1], **options).tolist()
    with pytest.raises(ValueError, match="Passing both"):
        model.generate(TOKENS, cache_implementation="quantized", past_key_values=model.latent_cache(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    """Values come back in the model's type, and in 8 bits as near as its own rounding."""
    keys, values = random_rows(2, 1, 40, 5).to(dtype), random_rows(2, 1, 40, 3, seed=1).to(dtype)
    cache = LatentQuantizedCache(make_model().config, nbits=8, **SMALL)
    cache.update(keys, values, 0)
    seen, rope = cache.update(keys[..., :0, :], values[..., :0, :], 0)
    assert seen.dtype == rope.dtype == dtype and (seen - keys).abs().max() < 0.03 * keys.abs().max()
    model = make_model(r=PER_LAYER).to(dtype)
    assert model.generate(TOKENS, past_key_values=model.latent_cache(**SMALL), **GREEDY).shape == (2, 21)


def test_conversation_and_prefix() -> None:
    """The cache goes on after generate; a deep copy is a prefix of its own."""
    model = make_model(r=PER_LAYER)
    cache = model.latent_cache(nbits=8, rope_nbits=8, **SMALL)
    first = model.generate(TOKENS, past_key_values=cache, **GREEDY)
    prefix = copy.deepcopy(cache)
    turn = torch.cat((first, TOKENS[:, :4]), dim=1)
    continued = model.generate(turn, past_key_values=cache, **GREEDY)
    assert continued.tolist() == model.generate(turn, **GREEDY).tolist()
    assert cache.get_seq_length() > prefix.get_seq_length() == first.shape[1] - 1
    assert model.generate(turn, past_key_values=prefix, **GREEDY).tolist() == continued.tolist()


def test_batch_operations() -> None:
    keys, values = random_rows(3, 1, 11, 5), random_rows(3, 1, 11, 0)
    cache = LatentQuantizedCache(make_model().config, **SMALL)
    cache.update(keys, values, 0)
    nothing = keys[..., :0, :], values[..., :0, :]
    before = cache.update(*nothing, 0)[0]
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    layer = cache.layers[0]
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.update(*(part[:1].expand(4, -1, -1, -1) for part in nothing))[0], before[[0, 0, 2, 2]])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_crop_is_exact_or_refused() -> None:
    config = make_model().config
    keys, values = random_rows(1, 1, 23, 5), random_rows(1, 1, 23, 3)
    layer, never = (LatentQuantizedCache(config, **SMALL).layers[0] for _ in range(2))
    for one in (layer, never):
        one.update(keys[..., :13, :], values[..., :13, :])
    layer.activate_past_recording()
    layer.update(keys[..., 13:, :], values[..., 13:, :])
    layer.crop(-9)
    never.update(keys[..., 13:14, :], values[..., 13:14, :])
    assert stored_bytes(layer) == stored_bytes(never) and layer.get_seq_length() == 14
    assert torch.equal(layer.keys, never.keys)
    with pytest.raises(ValueError, match="crop: -3 is not from -2 to 0"):
        layer.crop(-3)


BAD_SETTINGS: dict[str, tuple[Any, str]] = {
    "nbits": ({"backend": "latent", "nbits": 3}, "nbits: 3"),
    "rope": ({"backend": "latent", "rope_nbits": 32}, "rope_nbits: 32"),
    "group": ({"backend": "latent", "group_size": 6}, "group_size: 6"),
    "no group": ({"backend": "latent", "group_size": 0}, "group_size: 0"),
    "window": ({"backend": "latent", "residual_length": -1}, "residual_length: -1"),
    "unknown": ({"backend": "latent", "bits": 4}, "'bits'"),
    "backend": ({"backend": "HQ"}, "'HQ' is not one of latent, hqq, quanto"),
    "no backend's name": ({"backend": 4}, "backend 4 is not one of latent, hqq, quanto"),
    "a number": (4, "cache_config: 4 is not a dict of settings, such as {'backend': 'latent', 'nbits': 4}"),
    "a list": ([], "cache_config: [] is not a dict"),
    "a backend": ("hqq", "cache_config: 'hqq' is not a dict"),
    "no names": ({2: 4}, "cache_config: {2: 4} is not a dict"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_one_line(case: str) -> None:
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError) as error:
        make_model().generate(TOKENS, cache_implementation="quantized", cache_config=settings, **GREEDY)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "backend", ["LATENT", "Latent", *[b.upper() for b, installed in INSTALLED.items() if installed]]
)
def test_a_backend_in_any_case(backend: str) -> None:
    """LongBench's users write HQQ."""
    model, nbits = make_model(), 4
    one, other = (
        model.generate(
            TOKENS, cache_implementation="quantized", cache_config={"backend": name, "nbits": nbits},
            return_dict_in_generate=True, **GREEDY,
        )
        for name in (backend, backend.lower())
    )  # fmt: skip
    assert one.sequences.tolist() == other.sequences.tolist()
    assert type(one.past_key_values) is type(other.past_key_values)
    assert isinstance(quantized_cache(model.config, backend, nbits=nbits), type(one.past_key_values))


@pytest.mark.parametrize(("backend", "nbits", "axis"), BACKENDS)
@pytest.mark.parametrize("method", ["joint", "none"])
def test_backends(method: str, backend: str, nbits: int, axis: int) -> None:
    """Odd lengths, layers without rotated keys, groups that divide nothing; beams."""
    model = make_model(method, PER_LAYER)
    config = {"backend": backend, "nbits": nbits, "q_group_size": 16, "residual_length": 5, "axis_key": axis,
              "axis_value": axis}  # fmt: skip
    given = dict(config)
    for prompt, options in ((TOKENS, {}), (TOKENS[:1, :1], {}), (TOKENS[:, :7], {"num_beams": 2})):
        tokens = model.generate(prompt, cache_implementation="quantized", cache_config=config, **GREEDY, **options)
        if (method, nbits, axis) == ("joint", 8, 1) and not options:
            assert tokens.tolist() == model.generate(prompt, **GREEDY).tolist()
    assert config == given
    exact = decoded(model, "absorbed")
    logits = decoded(model, "absorbed", quantized_cache(model.config, **config))
    error = (logits - exact).square().mean() / exact.var()
    assert error < {8: 0.001, 4: 0.15, 2: 1.5}[nbits]


@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.skipif(not INSTALLED[b], reason=f"no {b} here"))
                                     for b in INSTALLED])  # fmt: skip
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_backend_sequences_are_apart(backend: str, axis: str) -> None:
    """Reordering moves what is stored; a sequence is as exact beside neighbours of another size as alone.

    Not equal: HQQ's search of the grids ends when their mean error over all sequences does not fall any more.
    """
    config = make_model().config
    keys, values = random_rows(3, 1, 11, 5), random_rows(3, 1, 11, 0)
    keys[1] *= 1000
    axis_key = {"hqq": {"token": 1, "channel": 0}, "quanto": {"token": 0, "channel": -1}}[backend][axis]
    layer, alone = (
        quantized_cache(config, backend, nbits=4, residual_length=4, axis_key=axis_key).layers[0] for _ in range(2)
    )
    for start, stop in ((0, 8), (8, 9), (9, 11)):
        layer.update(keys[..., start:stop, :], values[..., start:stop, :])
        alone.update(keys[2:, :, start:stop, :], values[2:, :, start:stop, :])
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    layer.batch_select_indices(torch.tensor([True, False, True]))
    layer.batch_repeat_interleave(2)
    seen = layer.update(keys[[2, 2, 0, 0], :, :1], values[[2, 2, 0, 0], :, :1])[0]
    wanted = alone.update(keys[2:, :, :1], values[2:, :, :1])[0]
    exact = torch.cat([keys[[2, 0]], keys[[2, 0], :, :1]], dim=-2)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert (seen[0] - exact[0]).norm() <= 1.1 * (wanted[0] - exact[0]).norm()
    assert 0 < (seen[2] - exact[1]).norm() < 0.1 * exact[1].norm()
    with pytest.raises(ValueError, match="cannot remove tokens"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="q_group_size 0"):
        quantized_cache(config, backend, q_group_size=0)


@pytest.mark.parametrize("backend", [b for b, installed in INSTALLED.items() if not installed])
def test_missing_backend(backend: str) -> None:
    with pytest.raises(ImportError, match="install"):
        quantized_cache(make_model().config, backend)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tokenizer(make_llama(folder / "original"))
    run_tool("convert_mha_to_mla", folder / "original", folder / "mla", "partial_rope.qk_rope_head_dim=8",
             "low_rank.method=joint", "low_rank.kv_lora_rank=24")  # fmt: skip
    (folder / "text.txt").write_text("".join(PROSE * 3))
    return folder


def test_exported_folder(converted: Path) -> None:
    """The folder's own code has the caches: nothing of this package is imported for them."""
    model = AutoModelForCausalLM.from_pretrained(converted / "mla", trust_remote_code=True).eval()
    cache = model.latent_cache(nbits=8, **SMALL)
    assert type(cache).__module__.startswith("transformers_modules.")
    expected = model.generate(TOKENS, **GREEDY).tolist()
    assert model.generate(TOKENS, past_key_values=cache, **GREEDY).tolist() == expected
    config = {"backend": "latent", "nbits": 8, **SMALL}
    assert model.generate(TOKENS, cache_implementation="quantized", cache_config=config, **GREEDY).tolist() == expected


def test_evaluation_through_the_cache(converted: Path, tmp_path: Path) -> None:
    """The unquantised cache gives the perplexity of no cache; 2 bits more than 8; bytes are the stored ones."""
    results = {}
    for cache in ("null", "full", "int8", "int4", "int2"):
        words = ["cache_options={group_size: 4, residual_length: 0}"] if cache.startswith("int") else []
        run_tool("evaluate_perplexity", converted / "mla", converted / "text.txt", "window=64", "batch_size=2",
                 f"cache={cache}", "cache_chunk=5", "bos=true", f"output={tmp_path / 'out.json'}", *words)  # fmt: skip
        results[cache] = json.loads((tmp_path / "out.json").read_text())["results"][0]
    nll = {cache: result["nll"] for cache, result in results.items()}
    assert nll["full"] == pytest.approx(nll["null"], rel=1e-6)
    assert abs(nll["int8"] - nll["null"]) < abs(nll["int4"] - nll["null"]) < abs(nll["int2"] - nll["null"])
    assert results["full"]["tokens"] == results["int2"]["tokens"]
    assert results["full"]["cache_bytes_per_token"] == results["null"]["cache_bytes_per_token"] == 3 * (16 + 24) * 4
    # 65 tokens are 16 groups of 4 (2 bits and a grid of 32: 10 bits a value), and 1 in float32.
    assert results["int4"]["cache_bytes_per_sequence"] == 3 * 40 * (16 * (2 + 4) + 4)


def test_chunks_predict_the_same_tokens(converted: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(converted / "original").eval()
    windows = torch.arange(2 * 13).view(2, 13) % 256
    for predicted in (12, 11):
        expected = window_nll(model, windows, predicted)
        for chunk in (1, 4, 13, 50):
            nll, held = window_nll_through(DynamicCache(), model, windows, predicted, chunk)
            assert torch.allclose(nll, expected, rtol=1e-6) and held == 2 * 13 * 768
    assert math.isfinite(float(nll.sum())) and make_cache("m", model.config, "full", {}).get_seq_length() == 0


def test_evaluation_refuses(converted: Path) -> None:
    mla, text = converted / "mla", converted / "text.txt"
    assert "cache: unknown value 'int3'" in refused("evaluate_perplexity", mla, text, "cache=int3")
    assert "cache_chunk" in refused("evaluate_perplexity", mla, text, "cache=int4", "cache_chunk=0")
    words = "window=64", "cache=int4"
    assert "not that of a model converted" in refused("evaluate_perplexity", converted / "original", text, *words)
    assert "group_size: 6" in refused("evaluate_perplexity", mla, text, *words, "cache_options.group_size=6")
    assert "'bits'" in refused("evaluate_perplexity", mla, text, *words, "cache_options.bits=6")
    assert "nbits is a part" in refused("evaluate_perplexity", mla, text, *words, "cache_options.nbits=8")
    assert "no quantised cache" in refused("evaluate_perplexity", mla, text, "cache_options.group_size=8")
