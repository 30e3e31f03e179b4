"""One rotated key for all heads (partial_rope.shared): its choice, and the models that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mha2mla_megatron.calibration.key_mixtures import KeyMixtures, Run, longest_run
from mha2mla_megatron.calibration.mixed_keys import best_dims, rotated_queries, split_keys
from mha2mla_megatron.calibration.substitution import Rotations, neighbours, rotations
from tests.conftest import make_llama, make_tokenizer, refused, run_tool

D, S = 16, 32
FLOAT32 = 2e-5
"""Of logits near 1, after three layers in float32 that add in another order."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotate(x: torch.Tensor, frequencies: torch.Tensor, position: float) -> torch.Tensor:
    """Half-split dims [..., 2 n], each pair turned by position * frequency."""
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
    return torch.cat((turned.real, turned.imag), -1)


def make_model(folder: Path, text: Path, **options: Any) -> tuple[Path, Path]:
    """A random original and its statistics."""
    model = make_tokenizer(make_llama(folder / "model", **options))
    run_tool("calibrate", model, text, folder / "s.safetensors", f"sequence_length={S}", "samples=8", "batch_size=8")
    return model, folder / "s.safetensors"


def convert(model: Path, target: Path, statistics: Path, *words: str) -> Path:
    run_tool("convert_mha_to_mla", model, target, f"statistics={statistics}", "dtype=float32", *words)
    return target


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def logits(folder: Path, statistics: Path) -> torch.Tensor:
    return load(folder)(load_file(statistics)["sequences"][:4].long()).logits


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path]:
    return make_model(tmp_path_factory.mktemp("grouped"), text, bias=True, seed=3)


# The choice


def as_they_are(prices: torch.Tensor, heads: int) -> Rotations:
    """No pair is turned by another frequency. prices: [G, P]."""
    pairs = prices.shape[1]
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return Rotations(torch.diag_embed(prices).transpose(0, 1), one.repeat(pairs, heads, pairs, 1))


def test_all_mixtures_together_are_the_rotated_product() -> None:
    """With all G P mixtures kept nothing is left of the keys, and the rotated queries and keys have the products of the
    heads' own, at any distance."""
    groups, per_group, pairs, h = 3, 2, 4, 40
    keys, queries = random(groups, 2 * pairs, h, seed=1), random(groups * per_group, 2 * pairs, h, seed=2)
    root, prices = random(h, h, seed=3), random(groups, pairs, seed=4).square()
    choices = KeyMixtures(keys, root @ root.T, as_they_are(prices, groups * per_group))
    every = choices.best(groups * pairs)
    assert every.gain == pytest.approx(prices.sum().item(), rel=1e-9)
    gains = [choices.best(count).gain for count in range(groups * pairs + 1)]
    steps = torch.tensor(gains, dtype=torch.float64).diff()
    assert gains[0] == 0 and (steps > 0).all() and (steps.diff() <= 0).all()
    split = split_keys(keys, every)
    assert split.left.abs().max() < 1e-9 * keys.abs().max() and (every.pairs.diff() >= 0).all()
    frequencies, distance = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64), 7.0
    x, y = random(h, seed=5), random(h, seed=6)
    shared = rotated_queries(queries, every) @ x @ rotate(split.rotated @ y, frequencies[every.pairs], distance)
    own = keys.repeat_interleave(per_group, 0) @ y
    exact = ((queries @ x) * rotate(own, frequencies, distance)).sum(-1)
    assert torch.allclose(shared, exact, rtol=1e-9, atol=1e-9 * exact.abs().max().item())


def test_the_first_mixture_costs_least() -> None:
    """Of one frequency: no other mixture explains more of the heads' keys, priced by what their rotation is worth. And
    what is left is uncorrelated to what is kept."""
    groups, h = 4, 12
    keys, root, prices = random(groups, 2, h, seed=1), random(h, h, seed=2), random(groups, 1, seed=3).square()
    moment = root @ root.T
    first = KeyMixtures(keys, moment, as_they_are(prices, groups)).best(1)
    k = torch.complex(*keys.unbind(1))  # [G, h]
    second = k @ moment.to(k.dtype) @ k.mH

    def explained(reads: torch.Tensor) -> float:
        """The sum over heads of price times squared correlation with sum_g reads_g k_g."""
        with_keys, energy = second @ reads.conj(), (reads @ second @ reads.conj()).real
        return (prices[:, 0] * with_keys.abs().square() / energy / second.diagonal().real).sum().item()

    (reads,) = first.reads[..., 0]
    assert explained(reads) == pytest.approx(first.gain, rel=1e-9)
    for seed in range(200):
        other = torch.view_as_complex(random(groups, 2, seed=seed)) * (0.1 if seed % 2 else 10)
        assert explained(reads + other) <= first.gain * (1 + 1e-12)
    split = split_keys(keys, first)
    cross = torch.complex(*split.left.unbind(1)) @ moment.to(k.dtype) @ torch.complex(*split.rotated).conj()
    assert cross.abs().max() < 1e-9 * second.abs().max()


def test_a_pair_is_worth_less_with_a_neighbours_frequency() -> None:
    """By as much as least squares cannot make of it, over samples of what it adds with its own and with the
    neighbour's; and its query is turned and scaled by the coefficients."""
    groups, per_group, pairs, samples = 2, 2, 8, 50
    heads, shifts = groups * per_group, neighbours(pairs)
    drawn = random(len(shifts), heads, pairs, samples, 3, seed=1)
    drawn[..., 0] += 2 * drawn[..., 1]
    drawn[:, :, :, :, 0] = drawn[:1, :, :, :, 0]  # t does not depend on the neighbour
    moments = drawn.mT @ drawn / samples
    alone = 0.5 * moments[0, ..., 0, 0]  # of no rotation at all, and no query map: [H, P]
    losses = alone.unflatten(0, (groups, per_group)).sum(1)
    found = rotations(losses, moments)
    for b in range(pairs):
        for p in range(pairs):
            for group in range(groups):
                expected = losses[group, p].item() if b == p else 0.0
                if b - p in shifts:
                    for head in range(group * per_group, (group + 1) * per_group):
                        t, f = drawn[shifts.index(b - p), head, p].split([1, 2], -1)
                        fit = torch.linalg.lstsq(f, t).solution
                        expected += (alone[head, p] - 0.5 * (t - f @ fit).square().mean()).item()
                        # A ridge of 1e-9 keeps the fit defined where f1 and f2 are proportional.
                        assert torch.allclose(found.query_maps[b, head, p], fit[:, 0], atol=1e-7)
                assert found.gains[b, group, p].item() == pytest.approx(expected, abs=1e-7), (b, p, group)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_cut_is_the_best(groups: int) -> None:
    """Against every cut of the frequencies into runs, for every number of mixtures that some price of a mixture leaves;
    for others, which the best of two neighbours stands in for, never more than the best. And one of each given
    frequency."""
    pairs, h = 16, 60
    keys, root = random(groups, 2 * pairs, h, seed=1), random(h, h, seed=2)
    keys[:, 1:pairs:2] += keys[:, 0:pairs:2]  # neighbours that are alike
    given = as_they_are(random(groups, pairs, seed=3).square(), groups)
    for shift in neighbours(pairs):
        own = torch.arange(max(0, -shift), min(pairs, pairs - shift))
        given.gains[own + shift, :, own] = given.gains[own, :, own] * 0.9 ** abs(shift)
    choices = KeyMixtures(keys, root @ root.T, given)

    def cuts(start: int) -> list[list[Run]]:
        if start == pairs:
            return [[]]
        found = []
        for size in (1, 2):
            if start + size <= pairs:
                worth = given.gains[start : start + size, :, start : start + size].sum((1, 2))
                run = Run(start, start + size, start + int(worth.argmax()))
                found += [[run, *rest] for rest in cuts(start + size)]
        return found

    assert longest_run(pairs) == 2
    worths = (sorted((worth for run in cut for worth in choices.worths(run)), reverse=True) for cut in cuts(0))
    every = torch.tensor(list(worths), dtype=torch.float64).cumsum(1)
    best = every.max(0).values.tolist()  # of count - 1
    exact = 0
    for count in range(1, groups * pairs):
        gain, before = choices.best(count).gain, best[count - 2] if count > 1 else 0.0
        assert gain <= best[count - 1] * (1 + 1e-9)
        # A price leaves `count` where the best gains bend there.
        if all(
            (best[count - 1] - best[i - 1]) * (j - count) > (best[j - 1] - best[count - 1]) * (count - i)
            for i in range(1, count)
            for j in range(count + 1, groups * pairs + 1)
        ):
            assert gain == pytest.approx(best[count - 1], rel=1e-9), count
            exact += 1
        assert gain >= before
    assert exact > groups * pairs / 3
    frequencies = torch.tensor([0, 1, 5, 6, 12])
    of_each = choices.of_frequencies(frequencies)
    assert torch.equal(of_each.pairs, frequencies)
    turned = (of_each.writes.abs().sum(1) > 0).sum(1)  # how many pairs each stands for
    assert turned.tolist() == [1, 2, 2, 2, 2]  # the run of 0 would have 1 in it, and 5 has 4 as 6 has 7


def test_best_dims_lose_least() -> None:
    """The expected squared error over independent queries and keys, against that of random choices of as many dims; and
    with as many as the keys' rank nothing is lost."""
    groups, per_group, d, h, count = 2, 3, 6, 20, 2
    queries, keys = random(groups * per_group, d, h, seed=1), random(groups, d, h, seed=2)
    keys[:, 4:] = keys[:, :2]  # of rank 4
    root = random(h, h, seed=3)
    moment = root @ root.T

    def error(for_queries: torch.Tensor, for_keys: torch.Tensor) -> torch.Tensor:
        """E[(q^T k - q'^T k')^2], summed over query heads: tr(D Sk D^T Sq) with D = I - A^T B. [G]"""
        sq = (queries @ moment @ queries.mT).unflatten(0, (groups, -1)).sum(1)
        difference = torch.eye(d, dtype=torch.float64) - for_queries.mT @ for_keys
        return torch.einsum("gij,gjk,glk,gli->g", difference, keys @ moment @ keys.mT, difference, sq)

    exact = error(*best_dims(queries, keys, moment, 4))
    best = error(*best_dims(queries, keys, moment, count))
    assert (exact < 1e-9 * best).all()
    for seed in range(100):
        # Any projection on `count` dims, from the best one on.
        a, b = best_dims(queries, keys, moment, count)
        other = error(a + 0.1 * random(*a.shape, seed=seed), b + 0.1 * random(*b.shape, seed=1000 + seed))
        assert (other > best).all()


# The models


FACTORED = ["low_rank.method=joint", "low_rank.kv_lora_rank=12", "low_rank.objective=outputs", "low_rank.damping=1e-12"]


@pytest.mark.parametrize(
    ("words", "tolerance"), [(["low_rank.method=none"], FLOAT32), (FACTORED, 1e-3)], ids=["none", "joint"]
)
def test_with_one_head_it_is_that_head(tmp_path: Path, text: Path, words: list[str], tolerance: float) -> None:
    """With one key/value head there is nothing to share: the same function as with pairs of its own, biases too.

    Factors are the same ones only under an objective that does not depend on the basis of a head's dims, and that as
    far as a moment of 256 tokens in float32 can be turned into another basis.
    """
    model, statistics = make_model(tmp_path, text, groups=1, bias=True)
    words = [*words, "partial_rope.qk_rope_head_dim=6"]
    own = convert(model, tmp_path / "own", statistics, *words)
    shared = convert(model, tmp_path / "shared", statistics, *words, "partial_rope.shared=true")
    found, expected = logits(shared, statistics), logits(own, statistics)
    assert (found - expected).abs().max() < tolerance
    assert (expected - logits(model, statistics)).abs().max() > 100 * FLOAT32
    for layer in range(3):
        pairs = f"model.layers.{layer}.self_attn.rope_pairs"
        a, b = (load_file(folder / "model.safetensors")[pairs] for folder in (own, shared))
        assert torch.equal(a, b)


def test_heads_that_are_mixtures_of_one_lose_nothing(tmp_path: Path, text: Path) -> None:
    """Keys of all heads that are one head's, each pair turned and scaled: one rotated key is all of them."""
    model = make_tokenizer(make_llama(tmp_path / "model", bias=True))
    weights = load_file(model / "model.safetensors")
    factors = torch.view_as_complex(random(3, D // 2, 2, seed=1, dtype=torch.float32))
    for layer in range(3):
        for kind in ("weight", "bias"):
            name = f"model.layers.{layer}.self_attn.k_proj.{kind}"
            first, second = weights[name].unflatten(0, (-1, 2, D // 2))[0].float()
            turned = torch.complex(first, second) * factors[layer].view(-1, *[1] * (first.dim() - 1))
            other = torch.cat((turned.real, turned.imag)).to(weights[name].dtype)
            weights[name] = torch.cat((weights[name][:D], other))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    statistics = tmp_path / "s.safetensors"
    run_tool("calibrate", model, text, statistics, f"sequence_length={S}", "samples=8", "batch_size=8")
    words = [f"partial_rope.qk_rope_head_dim={D}", "low_rank.method=none"]
    shared = convert(model, tmp_path / "shared", statistics, *words, "partial_rope.shared=true")
    assert (logits(shared, statistics) - logits(model, statistics)).abs().max() < FLOAT32
    assert load_file(shared / "model.safetensors")["model.layers.0.self_attn.k_rope_proj.weight"].shape[0] == D


def test_pairs_of_one_frequency_that_are_mixtures_of_one_lose_nothing(tmp_path: Path, text: Path) -> None:
    """rope_theta=1 turns all pairs alike. Keys of all heads and of two pairs are one's, turned and scaled: half as many
    rotated keys are all of them."""
    model = make_tokenizer(make_llama(tmp_path / "model", rope_theta=1.0))
    weights = load_file(model / "model.safetensors")
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        keys = torch.complex(*weights[name].unflatten(0, (-1, 2, D // 2)).float().unbind(1))  # [G, P, h]
        factors = torch.view_as_complex(random(len(keys), D // 2, 1, 2, seed=layer, dtype=torch.float32))
        keys = factors * keys[:1, ::2].repeat_interleave(2, 1)
        weights[name] = torch.cat((keys.real, keys.imag), 1).flatten(0, 1).to(weights[name].dtype)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    statistics = tmp_path / "s.safetensors"
    run_tool("calibrate", model, text, statistics, f"sequence_length={S}", "samples=8", "batch_size=8")
    words = ["low_rank.method=none", f"partial_rope.qk_rope_head_dim={D // 2}"]
    for strategy in ("activation", "uniform"):
        for key in ("shared", "mixed"):
            folder = tmp_path / f"{strategy}_{key}"
            convert(model, folder, statistics, *words, f"partial_rope.strategy={strategy}", f"partial_rope.{key}=true")
            assert (logits(folder, statistics) - logits(model, statistics)).abs().max() < FLOAT32


def test_mixed_keys_of_each_head(tmp_path: Path, grouped: tuple[Path, Path], text: Path) -> None:
    """Of one head it is what shared is; with all dims rotated nothing is lost; a head may have a frequency twice, in
    Hugging Face's form and in Megatron's."""
    one, its_statistics = make_model(tmp_path / "one", text, groups=1, bias=True)
    words = ["partial_rope.qk_rope_head_dim=6", "low_rank.method=joint", "low_rank.kv_lora_rank=12"]
    shared, mixed = (
        load_file(
            convert(one, tmp_path / key, its_statistics, *words, f"partial_rope.{key}=true") / "model.safetensors"
        )
        for key in ("shared", "mixed")
    )
    assert shared.keys() == mixed.keys()
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in shared.items())

    model, statistics = grouped
    words = ["partial_rope.mixed=true", "low_rank.method=none"]
    whole = convert(model, tmp_path / "whole", statistics, *words, f"partial_rope.qk_rope_head_dim={D}")
    assert (logits(whole, statistics) - logits(model, statistics)).abs().max() < FLOAT32
    words = ["partial_rope.mixed=true", "partial_rope.qk_rope_head_dim=6", "low_rank.method=joint"]
    folder = convert(model, tmp_path / "mla", statistics, *words, "low_rank.kv_lora_rank=20")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.rope_pairs"
    assert stored[name].shape == (2, 3)
    run_tool("verify_conversion", model, folder)
    run_tool("convert_hf_to_megatron", folder, tmp_path / "megatron")
    run_tool("verify_conversion", folder, tmp_path / "megatron")
    stored[name] = stored[name][:, [0, 0, 1]].contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    run_tool("verify_conversion", folder, folder)


@pytest.mark.parametrize("key", ["shared", "mixed"])
def test_beside_all_unrotated_dims_no_product_is_lost(tmp_path: Path, grouped: tuple[Path, Path], key: str) -> None:
    """With n = d the products of each query head with its keys at one position, where rotations cancel, are the
    original's, read off the files' weights; with fewer dims they are not. (No query map, which changes them.)"""
    model, statistics = grouped
    words = [f"partial_rope.{key}=true", "partial_rope.qk_rope_head_dim=8", "partial_rope.query_map=false"]
    original = load_file(model / "model.safetensors")

    def largest_error(name: str, *more: str) -> float:
        folder = convert(model, tmp_path / name, statistics, *words, "low_rank.method=none", *more)
        converted, worst = load_file(folder / "model.safetensors"), 0.0
        for layer in range(3):
            prefix = f"model.layers.{layer}.self_attn."
            q, k = (original[f"{prefix}{one}_proj.weight"].double().unflatten(0, (-1, D)) for one in "qk")
            new_q, k_nope, k_rope = (
                converted[f"{prefix}{one}_proj.weight"].double().unflatten(0, (heads, -1))
                for one, heads in (("q", len(q)), ("k_nope", len(k)), ("k_rope", 1 if key == "shared" else len(k)))
            )
            for head in range(len(q)):
                group = head // (len(q) // len(k))
                keys = torch.cat((k_rope[group % len(k_rope)], k_nope[group]))
                exact = q[head].T @ k[group]
                worst = max(worst, ((new_q[head].T @ keys - exact).norm() / exact.norm()).item())
        return worst

    assert largest_error("all", f"partial_rope.qk_nope_head_dim={D}") < FLOAT32
    if key == "shared":  # a head's own mixtures may be so few pairs' that d - r dims are all that is left
        some, fewest = largest_error("some", "partial_rope.qk_nope_head_dim=11"), largest_error("fewest")
        assert 1e-3 < some < fewest


@pytest.mark.parametrize(("key", "least"), [("shared", 8), ("mixed", 12)])
def test_queries_and_keys_wider_than_values(tmp_path: Path, grouped: tuple[Path, Path], key: str, least: int) -> None:
    """A budget may then give a layer more than d/2 rotated dims; the cache is r and c as before; every form of the
    model is the same one; and it decodes from its cache."""
    model, statistics = grouped
    words = ["cache_budget=0.7", f"partial_rope.{key}=true", f"partial_rope.qk_nope_head_dim={D}", "heal.steps=3"]
    words += [f"allocation.min_rope={least}", f"allocation.max_rope={D}", "allocation.rope_per_layer=true"]
    folder = convert(model, tmp_path / "mla", statistics, *words)
    layers = json.loads((folder / "conversion_report.json").read_text())["layers"]
    assert any(layer["qk_rope_head_dim"] > D // 2 for layer in layers)
    heads = 1 if key == "shared" else 2
    for layer in layers:
        assert layer["cache_elements_after"] == heads * layer["qk_rope_head_dim"] + layer["latent_width"]
        assert layer["qk_nope_head_dim"] == D
    run_tool("verify_conversion", model, folder)
    run_tool("convert_hf_to_megatron", folder, tmp_path / "megatron")
    run_tool("verify_conversion", folder, tmp_path / "megatron")
    run_tool("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back")
    found, expected = (load_file(one / "model.safetensors") for one in (tmp_path / "back", folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    loaded, tokens = load(folder), load_file(statistics)["sequences"][:2, :20].long()
    for mla_decode in ("expanded", "absorbed"):
        loaded.config.mla_decode = mla_decode
        with torch.no_grad():
            past = loaded(tokens[:, :12], use_cache=True).past_key_values
            steps = [loaded(tokens[:, i : i + 1], past_key_values=past).logits for i in range(12, 20)]
            whole = loaded(tokens, use_cache=False).logits
        assert (torch.cat(steps, 1) - whole[:, 12:]).abs().max() < FLOAT32


@pytest.mark.parametrize("method", ["joint", "split"])
def test_a_budget_with_healing(tmp_path: Path, grouped: tuple[Path, Path], method: str) -> None:
    """r + c elements are cached; the exported model says so, loads, and is nearer to the original than one whose layers
    have pairs of their own, at the same cache and nothing healed."""
    model, statistics = grouped
    words = [f"low_rank.method={method}", "cache_budget=0.5"]
    shared = convert(model, tmp_path / "shared", statistics, *words, "partial_rope.shared=true", "heal.steps=5")
    report = json.loads((shared / "conversion_report.json").read_text())
    for layer in report["layers"]:
        assert layer["cache_elements_after"] == layer["qk_rope_head_dim"] + layer["latent_width"]
        (pairs,) = layer["rope_pairs"]
        assert len(pairs) == layer["qk_rope_head_dim"] // 2 <= D // 4
    loaded = load(shared)
    cache = loaded(torch.arange(9)[None], use_cache=True).past_key_values
    cached = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values)) / 9
    assert cached == report["cache_elements_per_token"]["after"] <= 0.5 * report["cache_elements_per_token"]["before"]
    run_tool("verify_conversion", model, shared)


def test_layers_of_a_budget_share_one_r(tmp_path: Path, grouped: tuple[Path, Path]) -> None:
    """Of all that they can share the one that is predicted to lose least, each layer with a rank of its own. A choice
    for each layer may lose less, by the same measurements, and never more."""
    model, statistics = grouped
    words = ["cache_budget=0.5", "allocation.rope_multiple=2", "allocation.rank_multiple=2"]
    found = {}
    for key, more in {"one": [], "each": ["allocation.rope_per_layer=true"]}.items():
        folder = convert(model, tmp_path / key, statistics, *words, *more)
        found[key] = json.loads((folder / "conversion_report.json").read_text())
    (r,) = {layer["qk_rope_head_dim"] for layer in found["one"]["layers"]}
    assert len({layer["kv_lora_rank"] for layer in found["one"]["layers"]}) > 1
    losses = found["one"]["allocation"]["predicted_loss_by_rope"]
    assert list(losses) == ["0", "2", "4", "6", "8"]
    assert str(r) == min(losses, key=lambda key: losses[key])
    one, each = (sum(layer["predicted_loss"] for layer in found[key]["allocation"]["layers"]) for key in found)
    assert one == losses[str(r)] and each <= one
    assert found["each"]["allocation"]["predicted_loss_by_rope"] == {}
    # Healed, they have d/4 at most, unless more is asked for.
    for key, more, expected in (("healed", [], ["0", "2", "4"]), ("more", ["allocation.min_rope=6"], ["6"])):
        folder = convert(model, tmp_path / key, statistics, *words, *more, "heal.steps=2")
        report = json.loads((folder / "conversion_report.json").read_text())["allocation"]
        assert list(report["predicted_loss_by_rope"]) == expected


CHOICES = {
    "half of the cache": (["cache_budget=0.5"], True),
    "more": (["cache_budget=0.55"], False),
    "as elements": (["cache_elements=25.6"], True),
    "by name": (["cache_budget=0.4", "partial_rope.strategy=activation"], True),
    "not wanted": (["cache_budget=0.4", "partial_rope.shared=false"], False),
    "another strategy": (["cache_budget=0.4", "partial_rope.strategy=high"], False),
    "r is given": (["partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=20"], False),
}


@pytest.mark.parametrize("case", CHOICES)
def test_when_it_is_the_default(tmp_path: Path, grouped: tuple[Path, Path], case: str) -> None:
    (model, statistics), (words, expected) = grouped, CHOICES[case]
    folder = convert(model, tmp_path / "mla", statistics, *words)
    rope = json.loads((folder / "config.json").read_text())["mha2mla"]["partial_rope"]
    assert rope["shared"] is expected
    if expected:
        dims = rope["qk_rope_head_dim"]
        assert all(r % 8 == 0 for r in (dims if isinstance(dims, list) else [dims]))


@pytest.mark.parametrize("groups", [1, 4], ids=["mqa", "mha"])
def test_it_is_the_default_of_grouped_queries_only(tmp_path: Path, text: Path, groups: int) -> None:
    """One key head has nothing to share; with as many as query heads it has not been measured."""
    model, statistics = make_model(tmp_path, text, groups=groups)
    folder = convert(model, tmp_path / "mla", statistics, "cache_budget=0.5")
    assert json.loads((folder / "config.json").read_text())["mha2mla"]["partial_rope"]["shared"] is False


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static", "quantized"])
def test_decoding_is_the_expanded_form(tmp_path: Path, grouped: tuple[Path, Path], cache: str | None) -> None:
    """Greedy tokens through each cache, absorbed, are those that the whole sequence at once predicts, expanded."""
    model, statistics = grouped
    words = ["partial_rope.shared=true", "partial_rope.qk_rope_head_dim=8", "low_rank.method=joint"]
    loaded = load(convert(model, tmp_path / "shared", statistics, *words, "low_rank.kv_lora_rank=20"))
    loaded.config.mla_decode = "absorbed"
    prompt = load_file(statistics)["sequences"][:2, :12].long()
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    if cache == "quantized":  # the window holds all tokens: what is compared is how they are read
        options["cache_config"] = {"backend": "latent", "nbits": 8, "residual_length": 64}
    found = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None, **options
    )
    loaded.config.mla_decode = "expanded"
    predicted = loaded(found, use_cache=False).logits[:, 11:-1].argmax(-1)
    assert torch.equal(found[:, 12:], predicted)


def test_a_model_of_before(tmp_path: Path, grouped: tuple[Path, Path]) -> None:
    """A config.json that does not know the setting is one of pairs of each head's own."""
    model, statistics = grouped
    words = ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    folder = convert(model, tmp_path / "mla", statistics, *words)
    before = logits(folder, statistics)
    config = json.loads((folder / "config.json").read_text())
    del config["mha2mla"]["partial_rope"]["shared"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(folder, statistics), before)
    run_tool("convert_hf_to_megatron", folder, tmp_path / "megatron")
    run_tool("verify_conversion", folder, tmp_path / "megatron")


REFUSED = {
    "no statistics": (["partial_rope.shared=true", "partial_rope.strategy=uniform"], ["shared", "activation"]),
    "all rotations": (["STATISTICS", "partial_rope.shared=true", "partial_rope.strategy=full"], ["shared", "full"]),
    "scores of heads": (
        ["STATISTICS", "partial_rope.shared=true", "partial_rope.strategy=2-norm"],
        ["shared", "2-norm"],
    ),
    "mixed without statistics": (["partial_rope.mixed=true", "partial_rope.strategy=low"], ["mixed", "activation"]),
    "shared and not mixed": (
        ["STATISTICS", "partial_rope.shared=true", "partial_rope.mixed=false"],
        ["shared", "mixed"],
    ),
    "unrotated dims of pairs": (
        ["STATISTICS", "partial_rope.shared=false", "partial_rope.qk_nope_head_dim=16"],
        ["qk_nope_head_dim", "mixed"],
    ),
    "more unrotated dims than a head has": (
        ["STATISTICS", "partial_rope.shared=true", "partial_rope.qk_nope_head_dim=17"],
        ["qk_nope_head_dim", "17", "16"],
    ),
    "no unrotated dims": (
        ["STATISTICS", "partial_rope.shared=true", "partial_rope.qk_nope_head_dim=0"],
        ["qk_nope_head_dim", "0"],
    ),
    "no bool": (["STATISTICS", "partial_rope.shared=maybe"], ["partial_rope.shared", "maybe"]),
    "wider than a head": (["STATISTICS", "partial_rope.shared=true", "partial_rope.qk_rope_head_dim=18"], ["18", "16"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused(tmp_path: Path, grouped: tuple[Path, Path], case: str) -> None:
    (model, statistics), (words, named) = grouped, REFUSED[case]
    words = [f"statistics={statistics}" if word == "STATISTICS" else word for word in words]
    line = refused("convert_mha_to_mla", model, tmp_path / "out", *words)
    assert all(word in line for word in named), line
    assert not (tmp_path / "out").exists()


def test_given_frequencies_of_all_heads(tmp_path: Path, text: Path) -> None:
    """One mixture of each of the given frequencies, in every layer: DeepSeek's layout has the table for that, with a
    base of its own, and transformers' class gives the same logits. Rounding once more: see test_export_deepseek.py."""
    model, statistics = make_model(tmp_path, text, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    words = ["partial_rope.shared=true", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    words.append("partial_rope.qk_rope_head_dim=8")
    for strategy, expected_pairs, base in (("high", [0, 1, 2, 3], 10000.0 ** (8 / D)), ("uniform", [0, 2, 4, 6], 1e4)):
        more = [f"partial_rope.strategy={strategy}"]
        if strategy == "uniform":  # DeepSeek's queries and keys are wider than its values, too
            more.append(f"partial_rope.qk_nope_head_dim={D}")
        shared = convert(model, tmp_path / strategy, statistics, *words, *more)
        for layer in range(3):
            pairs = load_file(shared / "model.safetensors")[f"model.layers.{layer}.self_attn.rope_pairs"]
            assert pairs.tolist() == [expected_pairs]
        run_tool("verify_conversion", model, shared)
        exported = tmp_path / f"deepseek_{strategy}"
        run_tool("export_deepseek", shared, exported)
        config = json.loads((exported / "config.json").read_text())
        assert config["rope_parameters"]["rope_type"] == "default" and config["qk_rope_head_dim"] == 8
        assert config["qk_nope_head_dim"] == (D if strategy == "uniform" else D - 8) and config["v_head_dim"] == D
        assert config["rope_parameters"]["rope_theta"] == pytest.approx(base, rel=1e-6)
        assert (logits(exported, statistics) - logits(shared, statistics)).abs().max() < 2 * FLOAT32
    # A budget can be spent so, too.
    words = ["partial_rope.shared=true", "partial_rope.strategy=high", "cache_budget=0.5", "allocation.per_layer=false"]
    alike = convert(model, tmp_path / "alike", statistics, *words, "allocation.min_rope=8")
    run_tool("export_deepseek", alike, tmp_path / "deepseek_alike")
    assert (logits(tmp_path / "deepseek_alike", statistics) - logits(alike, statistics)).abs().max() < 2 * FLOAT32
    # The strategy that chooses may choose otherwise in each layer, which no single table has.
    words = ["partial_rope.shared=true", "partial_rope.qk_rope_head_dim=8", "low_rank.kv_lora_rank=20"]
    chosen = convert(model, tmp_path / "chosen", statistics, *words)
    assert "differ between layers" in refused("export_deepseek", chosen, tmp_path / "other")
