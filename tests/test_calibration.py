"""tools/calibrate.py and tools/merge_statistics.py: every sum against autograd on the model itself, and bad input."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.calibration import pair_moments
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

H, D, L, S = 4, 16, 3, 32
P = D // 2
UNLABELLED = ("query_norms", "key_norms", "input_moment", "score_moments", "substitution_moments")
SUMS = (*UNLABELLED, "gradient_energy", "weighted_input_moment", "gradient_moment", "loss_moments")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    return calibrate(model, text, tmp_path_factory.mktemp("statistics") / "s.safetensors")


def calibrate(model: Path, text: Path, target: Path, *words: str) -> Path:
    run_tool("calibrate", model, text, target, f"sequence_length={S}", "samples=6", *words)
    return target


def metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every tensor of `expected`, to a part of its largest number."""
    assert expected
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and tensor.abs().max() > 0, name
        assert (found[name].double() - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def reference_sums(folder: Path, tokens: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """All sums by the names in the file, float64, with every [S, S, P] tensor at hand.

    Gradients are autograd's, with respect to zeros that are added inside the attention (`probed_attention`). Labels are
    sampled by the rule of the package, which no other can repeat: the one where the cumulated probabilities pass the
    torch.rand numbers of the generator seeded with seed * 1_000_003 + index of the sequence.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model.requires_grad_(False)
    expected = model(tokens, output_attentions=True)
    turn = torch.arange(S)[:, None] * model.model.rotary_emb.inv_freq.double()
    layers: list[dict[str, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.forward = partial(probed_attention, layer.self_attn, turn, layers)
    logits = model(tokens, use_cache=False).logits
    assert torch.allclose(logits, expected.logits, atol=1e-4)  # transformers turns by float32 angles
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(len(tokens))]
    chance = [torch.rand(S, 1, generator=generator) for generator in generators]
    passed = logits.detach().softmax(-1).cumsum(-1) < torch.stack(chance)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), passed.sum(-1).flatten(), reduction="sum").backward()

    sums = {}
    for index, (kept, weights) in enumerate(zip(layers, expected.attentions, strict=True)):
        x, q, k, features = kept["x"], kept["q"], kept["k"], kept["features"]
        key_gradients, value_gradients, effects = (kept[f"{part} probe"].grad for part in ("key", "value", "effect"))
        assert key_gradients is not None and value_gradients is not None and effects is not None
        y = torch.cat((key_gradients, value_gradients), 1).transpose(1, 2).reshape(len(x), -1)  # [b S, (H + G) d]
        energy = y.square().sum(1)
        centred = features - torch.einsum("bhmn,bhmnpx->bhmpx", weights, features)[:, :, :, None]
        layer_sums = {
            "query_norms": q.abs().sum((0, 2)),
            "key_norms": k.abs().sum((0, 2)),
            "input_moment": torch.einsum("ti,tj->ij", x, x),
            "gradient_energy": energy.sum(),
            "weighted_input_moment": torch.einsum("t,ti,tj->ij", energy, x, x),
            "gradient_moment": torch.einsum("ti,tj->ij", y, y),
            "score_moments": torch.einsum("bhmn,bhmnpx,bhmnpy->hpxy", weights, centred, centred),
            "loss_moments": torch.einsum("bhmpx,bhmpy->hpxy", effects, effects),
            "substitution_moments": neighbours_moments(q, k, turn, weights),
        }
        assert set(layer_sums) == set(SUMS)
        sums.update({f"layers.{index}.{name}": tensor for name, tensor in layer_sums.items()})
    return sums


def neighbours_moments(q: torch.Tensor, k: torch.Tensor, turn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(t, f1, f2) of every eighth query, with f1 and f2 of each pair at the angles of the pair before it and of the one
    after it: [2, H, P, 3, 3]. q, k: complex pairs [b, H or G, S, P]; turn: angles [S, P]; weights: [b, H, S, S]."""
    unturned = q.conj()[:, :, :, None] * k.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None] * D**-0.5
    between = turn[None] - turn[:, None]
    turned = unturned * torch.polar(torch.ones_like(between), between)
    before, after = torch.zeros_like(between), torch.zeros_like(between)
    before[..., 1:], after[..., :-1] = between[..., :-1], between[..., 1:]
    sums = []
    for angles, none in ((before, 0), (after, -1)):
        instead = unturned * torch.polar(torch.ones_like(angles), angles)
        features = torch.stack((turned.real, instead.real, instead.imag), -1)
        features = features - torch.einsum("bhmn,bhmnpx->bhmpx", weights, features)[:, :, :, None]
        every_eighth = (weights[:, :, 7::8], features[:, :, 7::8], features[:, :, 7::8])
        sums.append(torch.einsum("bhmn,bhmnpx,bhmnpy->hpxy", *every_eighth) * (S / len(range(7, S, 8))))
        sums[-1][:, none] = 0  # the first pair has none before it, the last one none after it
    return torch.stack(sums)


def probed_attention(
    module: Any, angles: torch.Tensor, layers: list[dict[str, torch.Tensor]], hidden_states: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """Llama's attention, pairs as complex numbers, with zeros added where a gradient is wanted: to each query head's
    unrotated keys, to the values, and to how often (t, f1, f2) of a query's pair is counted in its logits."""

    def heads(linear: torch.nn.Module) -> torch.Tensor:
        return linear(hidden_states).unflatten(-1, (-1, D)).transpose(1, 2)

    q, k, v = heads(module.q_proj), heads(module.k_proj), heads(module.v_proj)
    pairs_q, pairs_k = (torch.complex(*part.chunk(2, -1)) for part in (q, k))
    per_group = q.shape[1] // k.shape[1]
    unturned = pairs_q.conj()[:, :, :, None] * pairs_k.repeat_interleave(per_group, 1)[:, :, None]  # [b, H, m, n, P]
    between = angles[None] - angles[:, None]
    turned = unturned * torch.polar(torch.ones_like(between), between)
    features = torch.stack((turned.real, unturned.real, unturned.imag), -1) * D**-0.5  # t, f1, f2
    key_probe, value_probe = (torch.zeros_like(part, requires_grad=True) for part in (q, v))
    effect_probe = torch.zeros_like(features[:, :, :, 0], requires_grad=True)
    scores = features[..., 0].sum(-1) + q @ key_probe.transpose(2, 3) * D**-0.5
    scores = scores + (features * effect_probe[:, :, :, None]).sum((-2, -1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -torch.inf).softmax(-1) @ (v + value_probe).repeat_interleave(per_group, 1)
    probes = {"key probe": key_probe, "value probe": value_probe, "effect probe": effect_probe}
    kept = {"x": hidden_states.flatten(0, 1), "q": pairs_q, "k": pairs_k, "features": features}
    layers.append({**probes, **{name: tensor.detach() for name, tensor in kept.items()}})
    return module.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_every_sum_is_that_of_autograd(
    tmp_path: Path, text: Path, groups: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_moments, "BLOCK_BYTES", {"cpu": 300_000})  # 5 or 10 queries at a time, the last ones fewer
    model = make_tokenizer(make_llama(tmp_path / "model", groups=groups, bias=bias, tied=not bias, seed=5))
    file = calibrate(model, text, tmp_path / "s.safetensors", "batch_size=4", "seed=3")
    found = load_file(file)
    ids: list[int] = []
    for line in text.read_text().split("\n"):
        ids += AutoTokenizer.from_pretrained(model)(line + "\n", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // S * S]).view(-1, S)
    assert torch.equal(found["sequences"], tokens)
    expected = reference_sums(model, tokens[:6], seed=3)
    assert found.keys() == {*expected, "sequences", "scores"}
    # float32 against float64, back through three layers, leaves up to 3e-6; another label or wrong pair shows at 1e-2.
    assert_close(found, expected, 2e-5)
    count = tokens[:6].numel()
    assert json.loads(metadata(file)["provenance"])["tokens"] == count
    for layer in range(L):
        queries, keys = (expected[f"layers.{layer}.{name}"] / count for name in ("query_norms", "key_norms"))
        of_group = (queries.unflatten(0, (groups, -1)) * keys[:, None]).sum(1)
        assert torch.allclose(found["scores"][layer].double(), of_group, rtol=1e-5)


def test_batches_change_nothing(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    file = calibrate(model, text, tmp_path / "s.safetensors", "batch_size=4")
    found, expected = load_file(file), load_file(statistics)
    assert torch.equal(found.pop("sequences"), expected.pop("sequences"))
    # float32 sums in another order.
    assert_close(found, {name: tensor.double() for name, tensor in expected.items()}, 1e-5)


def test_labels_depend_on_the_seed(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    found, expected = load_file(calibrate(model, text, tmp_path / "s.safetensors", "seed=1")), load_file(statistics)
    for name in SUMS:
        same = torch.equal(found[f"layers.1.{name}"], expected[f"layers.1.{name}"])
        assert same == (name in UNLABELLED), name


def test_stored_sequences_are_the_last(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    """And those of a short text: all it has, for the sums too."""
    every = load_file(statistics)["sequences"]
    file = calibrate(model, text, tmp_path / "s.safetensors", "stored_samples=4")
    assert torch.equal(load_file(file)["sequences"], every[2:6])
    (tmp_path / "short.txt").write_text(PROSE[0] + "\n" + PROSE[1])
    file = calibrate(model, tmp_path / "short.txt", tmp_path / "short.safetensors", "samples=100")
    stored = load_file(file)["sequences"]
    provenance = json.loads(metadata(file)["provenance"])
    assert 0 < len(stored) < 6 and torch.equal(stored, every[: len(stored)])
    assert provenance["tokens"] == stored.numel() and provenance["stored_sequences"] == len(stored)


def test_two_runs_merge_into_one(tmp_path: Path, model: Path) -> None:
    """The halves of a text, the first filled up with unknown characters (a token each) to whole sequences."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines: list[str] = list(PROSE[:3])
    lines[2] += "0" * (-sum(len(tokenizer(line + "\n")["input_ids"]) for line in lines) % S)
    halves = ["\n".join(lines), "\n".join(PROSE[3:])]
    files = []
    for name, content in (("a", halves[0]), ("b", halves[1]), ("both", "\n".join(halves))):
        (tmp_path / f"{name}.txt").write_text(content)
        words = [f"sequence_length={S}", "samples=50"]
        run_tool("calibrate", model, tmp_path / f"{name}.txt", tmp_path / f"{name}.safetensors", *words)
        files.append(tmp_path / f"{name}.safetensors")
    done = run_tool("merge_statistics", tmp_path / "merged.safetensors", *files[:2])
    a, b, both, merged = (load_file(file) for file in (*files, tmp_path / "merged.safetensors"))
    assert merged.keys() == both.keys()
    assert len(a["sequences"]) >= 2 and len(b["sequences"]) >= 2
    assert torch.equal(merged.pop("sequences"), both["sequences"])
    tokens = both["sequences"].numel()
    assert json.loads(metadata(tmp_path / "merged.safetensors")["provenance"])["tokens"] == tokens
    assert f"{tokens} tokens from 2 files" in done.stdout
    # One rounding of each sum to float32.
    summed = {name: a[name].double() + b[name].double() for name in merged if name != "scores"}
    assert_close(merged, summed, 1e-7)
    # A run numbers its sequences, and with them its labels, from 0: the second half's are others than in the whole.
    unlabelled = [name for name in merged if name.split(".")[-1] in (*UNLABELLED, "scores")]
    assert_close(merged, {name: both[name].double() for name in unlabelled}, 1e-5)  # float32 sums in another order


def test_merged_statistics_convert(tmp_path: Path, model: Path, statistics: Path) -> None:
    run_tool("merge_statistics", tmp_path / "merged.safetensors", statistics, statistics)
    converted = []
    for name, file in (("a", statistics), ("b", tmp_path / "merged.safetensors")):
        words = [f"statistics={file}", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=16"]
        run_tool("convert_mha_to_mla", model, tmp_path / name, *words)
        converted.append(load_file(tmp_path / name / "model.safetensors"))
    one, twice = converted
    # Twice the sums over twice the tokens, both exact in binary.
    assert all(torch.equal(one[name], twice[name]) for name in one)


def _change(statistics: Path, target: Path, change: Any) -> Path:
    """A copy of a statistics file with its tensors changed."""
    tensors = load_file(statistics)
    change(tensors)
    save_file(tensors, target, metadata=metadata(statistics))
    return target


def _weights(model: Path, target: Path, name: str, number: float) -> Path:
    """A copy of a model with one number in its weights replaced."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[7] = number
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


BAD_CALIBRATION = {
    "too long": (["sequence_length=129"], ["sequence_length", "129", "max_position_embeddings", "128"]),
    "no sequences": (["samples=0"], ["samples", "0"]),
    "none stored": (["stored_samples=0"], ["stored_samples", "0"]),
    "short sequences": (["sequence_length=4"], ["sequence_length", "4"]),
    "no batch": (["batch_size=0"], ["batch_size", "0"]),
    "dtype": (["dtype=int8"], ["dtype", "int8", "bfloat16"]),
    "memory": (["memory=much"], ["memory", "much", "5GB"]),
    "unknown key": (["sample=4"], ["sample", "samples"]),
}


@pytest.mark.parametrize("case", BAD_CALIBRATION)
def test_bad_settings_are_refused(tmp_path: Path, model: Path, text: Path, case: str) -> None:
    words, named = BAD_CALIBRATION[case]
    line = refused("calibrate", model, text, tmp_path / "s.safetensors", *words)
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == []


def test_bad_texts_are_refused(tmp_path: Path, model: Path) -> None:
    target, short = tmp_path / "s.safetensors", tmp_path / "short.txt"
    short.write_text("A good map")
    line = refused("calibrate", model, short, target, "sequence_length=32")
    assert "short.txt" in line and "fewer than one sequence of 32" in line
    assert "/nowhere.txt" in refused("calibrate", model, "/nowhere.txt", target, "sequence_length=32")
    short.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused("calibrate", model, short, target, "sequence_length=32")
    assert not target.exists()


def test_bad_models_are_refused(tmp_path: Path, model: Path, text: Path) -> None:
    target, words = tmp_path / "s.safetensors", [f"sequence_length={S}", "samples=2"]
    run_tool("convert_mha_to_mla", model, tmp_path / "mla", "partial_rope.strategy=full")
    line = refused("calibrate", tmp_path / "mla", text, target, *words)
    assert "mla" in line and "converted already" in line
    bare = make_llama(tmp_path / "bare")
    assert "tokenizer" in refused("calibrate", bare, text, target, *words)
    assert "no such folder" in refused("calibrate", tmp_path / "nowhere", text, target, *words)
    assert not target.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, model: Path, text: Path, number: float) -> None:
    damaged = _weights(model, tmp_path / "model", "model.layers.1.mlp.up_proj.weight", number)
    target = tmp_path / "s.safetensors"
    line = refused("calibrate", damaged, text, target, f"sequence_length={S}", "samples=2")
    assert "not finite" in line
    assert not target.exists() and not list(tmp_path.glob(".*"))


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path, text: Path) -> None:
    model = make_tokenizer(make_llama(tmp_path / "model", vocab_size=64))
    line = refused("calibrate", model, text, tmp_path / "s.safetensors", f"sequence_length={S}", "samples=2")
    assert "vocabulary" in line and "64" in line


def test_an_existing_file_is_kept(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    target, words = tmp_path / "s.safetensors", [f"sequence_length={S}", "samples=2"]
    target.write_text("keep")
    for line in (
        refused("calibrate", model, text, target, *words),
        refused("merge_statistics", target, statistics),
    ):
        assert str(target) in line and "overwrite=true" in line
    assert target.read_text() == "keep"
    run_tool("calibrate", model, text, target, *words, "overwrite=true")
    assert "scores" in load_file(target)
    # Merging into one of its own parts reads it before it is replaced.
    before = load_file(target)["layers.0.key_norms"]
    run_tool("merge_statistics", target, target, statistics, "overwrite=true")
    added = before.double() + load_file(statistics)["layers.0.key_norms"]
    assert_close({"key_norms": load_file(target)["layers.0.key_norms"]}, {"key_norms": added}, 1e-7)


def test_few_tokens_are_warned_of_and_convert(tmp_path: Path, model: Path, text: Path, statistics: Path) -> None:
    """32 tokens for moments of 64 inputs: singular, so that only damping makes a conversion possible."""
    words = [f"sequence_length={S}", "samples=1"]
    done = run_tool("calibrate", model, text, tmp_path / "s.safetensors", *words)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "32 tokens" in line and "64" in line
    words = [f"statistics={tmp_path}/s.safetensors", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=20"]
    for method, damping in (("joint", "1e-5"), ("joint", "1e-12"), ("split", "1e-12")):  # 1e-12: below float32's noise
        more = [f"low_rank.method={method}", f"low_rank.damping={damping}", "overwrite=true"]
        run_tool("convert_mha_to_mla", model, tmp_path / "mla", *words, *more)
        converted: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "mla", trust_remote_code=True)
        with torch.no_grad():
            assert converted(load_file(statistics)["sequences"][:2].long()).logits.isfinite().all()
    enough = run_tool("calibrate", model, text, tmp_path / "e.safetensors", f"sequence_length={S}", "samples=2")
    assert "warning" not in enough.stdout + enough.stderr


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, other weights."""
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "other", seed=9))


@pytest.fixture(scope="module")
def other_statistics(tmp_path_factory: pytest.TempPathFactory, other_model: Path, text: Path) -> Path:
    return calibrate(other_model, text, tmp_path_factory.mktemp("statistics") / "other.safetensors", "samples=2")


def _truncated(statistics: Path, target: Path) -> Path:
    target.write_bytes(statistics.read_bytes()[:-100])
    return target


def _no_statistics(statistics: Path, target: Path) -> Path:
    save_file({"scores": torch.ones(L, 2, P)}, target)
    return target


def _no_provenance(statistics: Path, target: Path) -> Path:
    save_file(load_file(statistics), target, metadata={"format": metadata(statistics)["format"]})
    return target


BAD_FILES = {
    "no provenance": (_no_provenance, ["provenance"]),
    "truncated": (_truncated, ["truncated"]),
    "no statistics": (_no_statistics, ["not a statistics file"]),
    "missing": (lambda statistics, target: target, ["no such file"]),
    "folder": (lambda statistics, target: target.mkdir() or target, ["a folder, not a file"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_statistics_are_refused_by_both_tools(tmp_path: Path, model: Path, statistics: Path, case: str) -> None:
    damage, named = BAD_FILES[case]
    file = damage(statistics, tmp_path / "bad.safetensors")
    for line in (
        refused("merge_statistics", tmp_path / "out.safetensors", statistics, file),
        refused("convert_mha_to_mla", model, tmp_path / "mla", f"statistics={file}", "low_rank.kv_lora_rank=8"),
    ):
        assert all(part in line for part in ["bad.safetensors", *named]), line
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "mla").exists()


def test_statistics_of_another_model_are_refused(
    tmp_path: Path, model: Path, statistics: Path, other_model: Path, other_statistics: Path
) -> None:
    line = refused("merge_statistics", tmp_path / "out.safetensors", statistics, other_statistics)
    assert "other.safetensors" in line and "another model" in line
    words = [f"statistics={other_statistics}", "low_rank.kv_lora_rank=8"]
    line = refused("convert_mha_to_mla", model, tmp_path / "mla", *words)
    assert all(part in line for part in ("other.safetensors", "another model", str(other_model))), line
    words = [f"partial_rope.scores={statistics}", f"low_rank.statistics={other_statistics}", "low_rank.kv_lora_rank=8"]
    line = refused("convert_mha_to_mla", model, tmp_path / "mla", "partial_rope.strategy=activation", *words)
    assert "two statistics files" in line
    assert list(tmp_path.iterdir()) == []


BAD_TENSORS = {
    "nan": (lambda t: t["layers.1.gradient_moment"].view(-1)[3].fill_(torch.nan), ["1.gradient_moment", "finite"]),
    "negative": (lambda t: t["layers.0.weighted_input_moment"].neg_(), ["weighted_input_moment", "negative"]),
    "missing": (lambda t: t.pop("layers.2.loss_moments"), ["layers.2.loss_moments", "missing"]),
    "shape": (lambda t: t.update({"layers.0.key_norms": torch.ones(2, 5)}), ["layers.0.key_norms", "(2, 5)", "(2, 8)"]),
    "no sequences": (lambda t: t.pop("sequences"), ["sequences", "missing"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_sums_are_refused(tmp_path: Path, model: Path, statistics: Path, case: str) -> None:
    change, named = BAD_TENSORS[case]
    file = _change(statistics, tmp_path / "bad.safetensors", change)
    for words in (["partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=8"], ["cache_budget=0.4"]):
        line = refused("convert_mha_to_mla", model, tmp_path / "mla", f"statistics={file}", *words)
        assert all(part in line for part in ["bad.safetensors", *named]), line
    assert not (tmp_path / "mla").exists()
