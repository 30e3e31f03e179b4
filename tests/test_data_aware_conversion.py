"""Conversion with statistics: objectives, the map of lost rotations, cache budgets and healing."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mha2mla_megatron.allocation import Choice, allocate
from mha2mla_megatron.calibration.metric import Metric, make_columns, make_rows
from mha2mla_megatron.calibration.pairs import apply_query_map, fit_query_map, identity_map, pair_losses
from mha2mla_megatron.calibration.statistics import LayerStatistics
from mha2mla_megatron.low_rank import factorise, factorise_nested, truncation_losses
from mha2mla_megatron.partial_rope import head_row_order
from tests.conftest import make_llama, make_tokenizer, refused, run_tool

H, G, D, L, S = 4, 2, 16, 3, 32
P, N, BEFORE = D // 2, H // G, 2 * G * D
OBJECTIVES = ("weights", "inputs", "balanced", "outputs", "tempered")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_llama(tmp_path_factory.mktemp("models") / "llama", bias=True, seed=3))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    return calibrate(model, text, tmp_path_factory.mktemp("statistics") / "s.safetensors")


def calibrate(model: Path, text: Path, file: Path) -> Path:
    run_tool("calibrate", model, text, file, f"sequence_length={S}", "samples=8", "batch_size=8")
    return file


def convert(source: Path, target: Path, *words: str) -> Path:
    run_tool("convert_mha_to_mla", source, target, *words)
    return target


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion_report.json").read_text())


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return load(folder)(tokens).logits


def tokens_of(statistics: Path, count: int = 8) -> torch.Tensor:
    return load_file(statistics)["sequences"][:count].long()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Objectives


def identity_statistics(statistics: Path, target: Path, groups: int) -> Path:
    """Statistics of the same model in which every direction counts the same and no rotation is missed.

    A key's gradient is the sum of what its N query heads see of it: 1/N from each makes 1.
    """
    tensors = load_file(statistics)
    with safe_open(statistics, framework="pt") as file:
        metadata = file.metadata()
    tokens = json.loads(metadata["provenance"])["tokens"]
    per_group = H // groups
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])  # f1 is t
    for layer in range(L):
        changes = {
            "input_moment": torch.eye(64) * tokens,
            "gradient_energy": torch.tensor(7.0),
            "weighted_input_moment": torch.eye(64) * 7,
            "gradient_moment": torch.diag(torch.tensor([tokens / per_group] * H * D + [tokens] * groups * D)),
            "score_moments": same.repeat(H, P, 1, 1) * tokens,
            "loss_moments": same.repeat(H, P, 1, 1) * tokens,
        }
        tensors.update({f"layers.{layer}.{name}": tensor for name, tensor in changes.items()})
    save_file(tensors, target, metadata=metadata)
    return target


@pytest.mark.parametrize("method", ["joint", "split"])
@pytest.mark.parametrize("groups", [2, 4], ids=["gqa", "mha"])
def test_identity_statistics_are_plain_svd(tmp_path: Path, text: Path, groups: int, method: str) -> None:
    """Every objective gives the factors of `weights`, and the map of the identity changes no query."""
    source = make_tokenizer(make_llama(tmp_path / "model", groups=groups, bias=True))
    calibrated = calibrate(source, text, tmp_path / "s.safetensors")
    file = identity_statistics(calibrated, tmp_path / "identity.safetensors", groups)
    words = [f"low_rank.method={method}", "low_rank.kv_lora_rank=14", "partial_rope.qk_rope_head_dim=4"]
    plain = weights_of(convert(source, tmp_path / "plain", *words, "partial_rope.strategy=high"))
    for objective in OBJECTIVES:
        given = [f"statistics={file}", f"low_rank.objective={objective}"]
        given += ["low_rank.damping=1e-12"] if objective != "weights" else []
        folder = convert(source, tmp_path / objective, *words, *given)
        found = weights_of(folder)
        used = report_of(folder)["mha2mla"]
        assert used["partial_rope"]["query_map"] is True and used["low_rank"]["objective"] == objective
        for layer in range(L):
            prefix = f"model.layers.{layer}.self_attn."
            for name in ("q_proj.weight", "q_proj.bias", "k_rope_proj.weight"):
                assert torch.equal(found[prefix + name], plain[prefix + name])
            for up, latent in (("k_up_proj", slice(0, 14)), ("v_up_proj", slice(-14, None))):
                a, b = (
                    t[f"{prefix}{up}.weight"].double() @ t[f"{prefix}kv_down_proj.weight"][latent].double()
                    for t in (found, plain)
                )
                # Products of written float32 factors; in float64 the test below takes this to 1e-9.
                assert (a - b).abs().max() < 1e-6 < b.abs().max(), (objective, layer, up)


class Samples:
    """Tokens of one layer, drawn at random: inputs, gradients, and the statistics that they sum up to.

    g, per_group, d: groups, query heads of each, head dim; r: rotary dims kept; h: inputs. float64.
    """

    def __init__(self, seed: int, h: int, r: int = 2, g: int = 2, per_group: int = 2, d: int = 8) -> None:
        generator, t = random(seed), 200
        mix = torch.randn(h, h, generator=generator, dtype=torch.float64)
        self.x = torch.randn(t, h, generator=generator, dtype=torch.float64) @ mix
        width, heads = (g * per_group + g) * d, g * per_group * d
        mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        y = torch.randn(t, width, generator=generator, dtype=torch.float64) @ mix
        y[:, heads // 2 : heads] *= 3  # heads of different weight
        y *= torch.rand(t, 1, generator=generator, dtype=torch.float64) ** 2
        self.query_map = torch.randn(g * per_group, d // 2, 2, generator=generator, dtype=torch.float64)
        pairs = torch.rand(g, d // 2, generator=generator).argsort(1)[:, : r // 2].sort(1).values
        self.order, self.r, self.tokens = head_row_order(pairs, d), r, t
        self.weight = torch.randn(g * (2 * d - r), h, generator=generator, dtype=torch.float64)
        self.nope = g * (d - r)

        energy = y.square().sum(1)
        # What the converted layer's keys and values get: each head's part turned by its a + ib, summed.
        seen = y[:, :heads].unflatten(1, (g, per_group, d))
        turned = torch.complex(*seen.chunk(2, -1)) * torch.view_as_complex(self.query_map).view(g, per_group, d // 2)
        keys = torch.cat((turned.real, turned.imag), -1).sum(2)  # [t, g, d]
        keys = [keys[:, i, self.order[i, r:]] for i in range(g)]
        self.gradients = torch.cat((*keys, y[:, heads:]), -1)  # [t, n]
        self.energy = energy
        nothing = torch.zeros(())
        self.statistics = LayerStatistics(
            query_norms=nothing,
            key_norms=nothing,
            input_moment=self.x.T @ self.x,
            gradient_energy=energy.sum(),
            weighted_input_moment=self.x.T @ (self.x * energy[:, None]),
            gradient_moment=y.T @ y,
            score_moments=nothing,
            loss_moments=nothing,
            substitution_moments=nothing,
        )

    def metric(self, objective: str, damping: float = 1e-12) -> Metric:
        unrotated = torch.eye(self.order.shape[1], dtype=torch.float64)[self.order[:, self.r :]]
        rows = make_rows(objective, self.statistics, self.tokens, self.query_map, unrotated, damping)
        return Metric(rows, make_columns(objective, self.statistics, self.tokens, damping))

    def moments(self, objective: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Y [n, n] and C [h, h] of an objective, dense, from the tokens themselves."""
        n, h = self.weight.shape
        y, c = torch.eye(n, dtype=torch.float64), torch.eye(h, dtype=torch.float64)
        if objective == "inputs":
            c = torch.stack([torch.outer(x, x) for x in self.x]).mean(0)
        if objective in ("balanced", "outputs", "tempered"):
            share = self.energy / self.energy.sum()
            if objective == "tempered":
                share = (share + 1 / self.tokens) / 2
            c = torch.stack([s * torch.outer(x, x) for s, x in zip(share, self.x, strict=True)]).sum(0)
        if objective == "balanced":
            square = self.gradients.square()
            y[: self.nope] *= square[:, : self.nope].mean()
            y[self.nope :] *= square[:, self.nope :].mean()
        if objective in ("outputs", "tempered"):
            y = torch.einsum("ti,tj->ij", self.gradients, self.gradients) / self.tokens
        if objective == "tempered":
            y *= 0.5 + 0.5 * torch.eye(n, dtype=torch.float64)
        return y, c


def value(difference: torch.Tensor, y: torch.Tensor, c: torch.Tensor) -> float:
    """tr(Y E C E^T)."""
    return torch.trace(y @ difference @ c @ difference.T).item()


def parts_of(samples: Samples, objective: str) -> list[tuple[slice, Metric]]:
    """All rows (joint), the keys alone and the values alone (split), each with its metric."""
    metric, n = samples.metric(objective), len(samples.weight)
    rows = [slice(0, samples.nope), slice(samples.nope, n)]
    return [(slice(0, n), metric), *((part, metric.select(part)) for part in rows)]


@pytest.mark.parametrize("h", [40, 12], ids=["more inputs than rows", "fewer"])  # rows: 28 joint, 12 and 16 split
def test_no_other_factors_are_better(h: int) -> None:
    """In an objective's own value, at the same rank; and that value is the one that allocation reckons with."""
    for seed in range(20):
        samples = Samples(seed, h)
        for objective in OBJECTIVES:
            y, c = samples.moments(objective)
            for part, (rows, metric) in enumerate(parts_of(samples, objective)):
                w, y_rows, generator = samples.weight[rows], y[rows, rows], random(seed)
                losses = truncation_losses(w, metric)
                assert len(losses) == min(w.shape) + 1
                size = losses[0].item()
                assert value(w, y_rows, c) == pytest.approx(size, rel=1e-9)  # rank 0: all is lost
                for rank in (1, 5, min(w.shape) - 1):
                    up, down = factorise(w, rank, "up", metric)
                    best = value(w - up @ down, y_rows, c)
                    assert abs(best - losses[rank].item()) < 1e-9 * size, (seed, objective, part, rank)
                    others = [
                        factorise(w, rank, "sqrt", parts_of(samples, other)[part][1])
                        for other in OBJECTIVES
                        if other != objective
                    ]
                    noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (up, down)]
                    others.append((noise[0], noise[1]))
                    for step in (1e-1, 1e-3):
                        others.append((up + step * noise[0] * up.norm() / noise[0].norm(), down))
                        others.append((up, down + step * noise[1] * down.norm() / noise[1].norm()))
                    for other_up, other_down in others:
                        assert value(w - other_up @ other_down, y_rows, c) > best + 1e-11 * size, (seed, objective)
                full = factorise(w, min(w.shape), "up", metric)
                assert torch.allclose(full[0] @ full[1], w, rtol=0, atol=1e-8)


@pytest.mark.parametrize("h", [40, 12], ids=["more inputs than rows", "fewer"])
def test_nested_factors(h: int) -> None:
    """Keys read the first columns of a joint latent alone. The loss is below that of separate latents of the same
    width, which are such factors too, and above that of the best joint ones; for the latent that was found, no other
    up-projection loses less."""
    for seed in range(12):
        samples = Samples(seed, h)
        w, nope, generator = samples.weight, samples.nope, random(seed)
        for objective in OBJECTIVES:
            (y, c), metric = samples.moments(objective), samples.metric(objective)
            size = value(w, y, c)
            key_metric, value_metric = (metric.select(part) for part in (slice(0, nope), slice(nope, len(w))))
            for rank, key_rank in ((2, 1), (9, 3), (min(w.shape), 2), (min(w.shape), 11)):
                up, down = factorise_nested(w, nope, rank, key_rank, "up", metric)
                assert up.shape == (len(w), rank) and down.shape == (rank, h)
                assert (up[:nope, key_rank:] == 0).all()
                found = value(w - up @ down, y, c)
                joint = factorise(w, rank, "up", metric)
                assert found > value(w - joint[0] @ joint[1], y, c) - 1e-9 * size
                if rank - key_rank <= min(len(w) - nope, h):
                    k, v = (
                        factorise(w[:nope], key_rank, "up", key_metric),
                        factorise(w[nope:], rank - key_rank, "up", value_metric),
                    )
                    apart = value(w - torch.cat((k[0] @ k[1], v[0] @ v[1])), y, c)
                    assert found < apart + 1e-9 * size, (seed, objective, rank, key_rank)
                other_up, other_down = factorise_nested(w, nope, rank, key_rank, "sqrt", metric)
                assert torch.allclose(other_up @ other_down, up @ down, rtol=0, atol=1e-8)
                noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (up, down)]
                noise[0][:nope, key_rank:] = 0
                for step in (1e-1, 1e-2):
                    moved = up + step * noise[0] * up.norm() / noise[0].norm()
                    assert value(w - moved @ down, y, c) > found
                # The least squares fit of both parts, by the normal equations of the columns that each may use.
                gram = down @ c @ down.T
                keys_read = torch.zeros_like(up, dtype=torch.bool)
                keys_read[:, :key_rank], keys_read[nope:] = True, True
                system = torch.kron(y, gram)[keys_read.flatten()][:, keys_read.flatten()]
                right = (y @ w @ c @ down.T)[keys_read]
                best = torch.zeros_like(up)
                best[keys_read] = torch.linalg.lstsq(system, right).solution
                assert value(w - best @ down, y, c) > found - 1e-7 * size, (seed, objective, rank, key_rank)
        exact = factorise_nested(w, nope, min(w.shape), min(nope, *w.shape), "up", metric)
        if h > len(w):
            assert torch.allclose(exact[0] @ exact[1], w, rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("h", [40, 12])
def test_factors_are_the_whitened_svd_taken_back(objective: str, h: int) -> None:
    samples = Samples(100 + h, h)
    y, c = samples.moments(objective)
    for rows, metric in parts_of(samples, objective):
        w, left, right = samples.weight[rows], torch.linalg.cholesky(y[rows, rows]), torch.linalg.cholesky(c)
        u, s, vt = torch.linalg.svd(left.T @ w @ right, full_matrices=False)
        for rank in (1, 7, 11):
            expected = torch.linalg.inv(left.T) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(right)
            for singular_values in ("up", "sqrt"):
                up, down = factorise(w, rank, singular_values, metric)
                assert up.shape == (len(w), rank) and down.shape == (rank, h)
                assert (up @ down - expected).abs().max() < 1e-9 * expected.abs().max()


def test_factors_of_identity_moments_in_float64() -> None:
    samples = Samples(7, 40)
    identity = torch.eye(48, dtype=torch.float64) * samples.tokens
    identity[:32] /= 2  # two query heads of each group
    eye = torch.eye(40, dtype=torch.float64)
    samples.statistics.input_moment = eye * samples.tokens
    samples.statistics.weighted_input_moment = eye * samples.statistics.gradient_energy
    samples.statistics.gradient_moment = identity
    samples.query_map = identity_map(torch.ones(4, 4, 3, 3, dtype=torch.float64))
    plain = parts_of(samples, "weights")
    for objective in OBJECTIVES:
        for (rows, metric), (_, own) in zip(parts_of(samples, objective), plain, strict=True):
            w = samples.weight[rows]
            (up, down), (plain_up, plain_down) = factorise(w, 6, "up", metric), factorise(w, 6, "up", own)
            assert (up @ down - plain_up @ plain_down).abs().max() < 1e-9


@pytest.mark.parametrize("singular_values", ["up", "sqrt"])
def test_weights_of_low_rank(singular_values: str) -> None:
    """More latents than the weight has rank: no 0/0, nothing lost; nothing at all, too."""
    samples = Samples(5, 40)
    for rank in (0, 3):
        w = samples.weight[:, :rank] @ torch.randn(rank, 40, generator=random(1), dtype=torch.float64)
        up, down = factorise(w, 9, singular_values, samples.metric("outputs"))
        assert up.isfinite().all() and down.isfinite().all()
        assert (up @ down - w).abs().max() < 1e-6  # roots of 1e-16


# Pairs and the map of lost rotations


def test_the_map_is_the_least_squares_fit() -> None:
    t = torch.randn(500, 3, 4, 3, generator=random(0), dtype=torch.float64)  # samples, heads, pairs, (t, f1, f2)
    t[..., 0] += 0.7 * t[..., 1] - 2 * t[..., 2]
    moments = torch.einsum("shpx,shpy->hpxy", t, t) / len(t)
    found = fit_query_map(moments)
    losses, unmapped = pair_losses(moments, found), pair_losses(moments, identity_map(moments))
    for head, pair in itertools.product(range(3), range(4)):
        target, *features = t[:, head, pair].T.numpy()
        expected, residual, *_ = numpy.linalg.lstsq(numpy.stack(features, 1), target, rcond=None)
        # The ridge of 1e-9.
        assert numpy.abs(found[head, pair].numpy() - expected).max() < 1e-7
        assert losses[head, pair].item() == pytest.approx(0.5 * residual.item() / len(t), rel=1e-9)
        plain = 0.5 * ((target - features[0]) ** 2).mean()
        assert unmapped[head, pair].item() == pytest.approx(plain, rel=1e-9)
    other = found + 0.1 * torch.randn(found.shape, generator=random(1), dtype=torch.float64)
    assert (losses < unmapped).all() and (losses < pair_losses(moments, other)).all()


def test_the_map_of_pairs_that_say_little() -> None:
    """f1 and f2 proportional: still a finite fit with no loss. No signal: the query as it is."""
    f1 = torch.randn(100, generator=random(0), dtype=torch.float64)
    samples = torch.stack((3 * f1, f1, 2 * f1), -1)
    moments = torch.stack((samples.T @ samples, torch.zeros(3, 3, dtype=torch.float64)))[None]
    found = fit_query_map(moments)
    assert found[0, 0, 0] + 2 * found[0, 0, 1] == pytest.approx(3, rel=1e-6)
    assert found[0, 0].abs().max() < 3
    assert found[0, 1].tolist() == [1, 0] and pair_losses(moments, found)[0].tolist() == pytest.approx([0, 0], abs=1e-9)


def test_the_map_of_the_identity_changes_nothing() -> None:
    rows = torch.randn(H, D, 5, generator=random(0), dtype=torch.float64)
    pairs = torch.tensor([[1, 6], [0, 3]])
    assert torch.equal(apply_query_map(rows, identity_map(torch.ones(H, P, 3, 3)), pairs), rows)
    turned = torch.complex(*rows.chunk(2, 1)) * (2 - 3j)
    query_map = torch.tensor([2.0, -3.0]).expand(H, P, 2)
    found = torch.complex(*apply_query_map(rows, query_map, pairs).chunk(2, 1))
    kept = torch.zeros(G, P, dtype=torch.bool).scatter_(1, pairs, True).repeat_interleave(N, 0)
    original = torch.complex(*rows.chunk(2, 1))
    assert torch.equal(found[kept], original[kept]) and torch.allclose(found[~kept], turned[~kept], rtol=1e-15)


def mapped_attention(
    module: Any,
    angles: torch.Tensor,
    kept: list[list[int]],
    factor: torch.Tensor,
    hidden_states: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Llama's attention with rotation on the kept pairs alone and the other queries q_j (a + ib), nothing folded."""

    def pairs(linear: torch.nn.Module) -> torch.Tensor:
        heads = linear(hidden_states).unflatten(-1, (-1, D)).transpose(1, 2)
        return torch.complex(*heads.chunk(2, -1))

    q, k = pairs(module.q_proj), pairs(module.k_proj).repeat_interleave(N, 1)
    v = module.v_proj(hidden_states).unflatten(-1, (-1, D)).transpose(1, 2).repeat_interleave(N, 1)
    rotated = torch.zeros(H, 1, P, dtype=torch.bool)
    for head in range(H):
        rotated[head, 0, kept[head // N]] = True
    turn = torch.polar(torch.ones_like(angles), angles)
    scores = torch.einsum(
        "bhmp,bhnp->bhmn", torch.where(rotated, q * turn, q * factor[:, None]).conj(), torch.where(rotated, k * turn, k)
    ).real
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = (scores * D**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
    return module.o_proj(out.transpose(1, 2).flatten(2)), None


def lstsq(moments: torch.Tensor) -> torch.Tensor:
    """a + ib of every pair from moments [H, P, 3, 3], complex [H, P]."""
    result = torch.empty(moments.shape[:2], dtype=torch.complex128)
    for index in itertools.product(*map(range, moments.shape[:2])):
        m = moments[index].numpy()
        a, b = numpy.linalg.lstsq(m[1:, 1:], m[1:, 0], rcond=1e-12)[0]
        result[index] = torch.tensor(complex(a, b))
    return result


@pytest.mark.parametrize("strategy", ["activation", "high", "2-norm"])
@torch.no_grad()
def test_the_folded_map_is_the_explicit_one(tmp_path: Path, model: Path, statistics: Path, strategy: str) -> None:
    """Pairs as the strategy says, other queries multiplied by a fit of the test's own; biases are turned with them."""
    words = [f"statistics={statistics}", f"partial_rope.strategy={strategy}", "partial_rope.qk_rope_head_dim=6"]
    words += [] if strategy == "activation" else ["partial_rope.query_map=true"]
    folder = convert(model, tmp_path / "mla", *words)
    sums = {name: tensor.double() for name, tensor in load_file(statistics).items()}
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    angles = torch.arange(S)[:, None] * reference.model.rotary_emb.inv_freq.double()
    pairs = []
    for index, layer in enumerate(reference.model.layers):
        scores = sums["scores"][index]
        if strategy == "high":
            scores = -torch.arange(P).expand(G, P)
        if strategy == "activation":
            moments = sums[f"layers.{index}.score_moments"]
            fit = lstsq(moments)
            v = torch.stack((torch.ones_like(fit.real), -fit.real, -fit.imag), -1)
            scores = torch.einsum("hpx,hpxy,hpy->hp", v, moments, v).view(G, N, P).sum(1)
        pairs.append([sorted(row.argsort(descending=True)[:3].tolist()) for row in scores])
        factor = lstsq(sums[f"layers.{index}.loss_moments"])
        assert (factor - 1).abs().max() > 0.1
        layer.self_attn.forward = partial(mapped_attention, layer.self_attn, angles, pairs[-1], factor)
    assert [layer["rope_pairs"] for layer in report_of(folder)["layers"]] == pairs
    tokens = tokens_of(statistics)
    error = (logits(folder, tokens) - reference(tokens).logits).abs().max()
    # float32 against float64 on logits up to 5; a wrong pair or sign shows at 1e-1.
    assert error < 1e-4, error


def test_the_map_is_a_choice(tmp_path: Path, model: Path, statistics: Path) -> None:
    words = [f"statistics={statistics}", "partial_rope.qk_rope_head_dim=6"]
    plain = weights_of(model)
    for target, word in (("a", "partial_rope.query_map=false"), ("b", "partial_rope.strategy=low")):
        folder = convert(model, tmp_path / target, *words, word)
        pairs = torch.tensor([layer["rope_pairs"] for layer in report_of(folder)["layers"]])
        for layer in range(L):
            order = head_row_order(pairs[layer], D).repeat_interleave(N, 0)
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            heads = plain[name].view(H, D, -1)
            expected = torch.cat([head[rows] for head, rows in zip(heads, order, strict=True)])
            assert torch.equal(weights_of(folder)[name], expected)


# Allocation


def make_choices(generator: numpy.random.Generator, layers: int, unit: int) -> list[list[Choice]]:
    """Random costs in steps of a unit, some twice, and losses that need not fall with the cost."""
    result = []
    for _ in range(layers):
        costs = generator.integers(1, 9, size=generator.integers(1, 6)) * unit
        result.append([Choice(i, i + 1, None, int(cost), float(generator.random())) for i, cost in enumerate(costs)])
    return result


def test_allocation_is_the_best_of_all() -> None:
    for seed in range(200):
        generator = numpy.random.default_rng(seed)
        layers, budget = make_choices(generator, 4, unit := int(generator.integers(1, 4))), 16 * unit
        affordable = [picks for picks in itertools.product(*layers) if sum(choice.cost for choice in picks) <= budget]
        if not affordable:
            with pytest.raises(ValueError, match=str(budget)):
                allocate(layers, budget)
            continue
        found = allocate(layers, budget)
        assert all(choice in choices for choice, choices in zip(found, layers, strict=True))
        assert sum(choice.cost for choice in found) <= budget
        best = min(sum(choice.loss for choice in picks) for picks in affordable)
        assert sum(choice.loss for choice in found) == pytest.approx(best, rel=1e-12)


def test_allocation_leaves_nothing_of_use() -> None:
    """With losses that fall (or stay) as costs rise, what is left pays for no layer's next choice."""
    for seed, flat in itertools.product(range(50), (False, True)):
        generator = numpy.random.default_rng(seed)
        layers = []
        for _ in range(5):
            costs = numpy.unique(generator.integers(1, 30, size=8))
            losses = numpy.zeros(len(costs)) if flat else numpy.sort(generator.random(len(costs)))[::-1]
            layers.append([Choice(0, 1, None, int(c), float(loss)) for c, loss in zip(costs, losses, strict=True)])
        budget = sum(choices[0].cost for choices in layers) + int(generator.integers(0, 60))
        found = allocate(layers, budget)
        left = budget - sum(choice.cost for choice in found)
        assert left >= 0
        for choice, choices in zip(found, layers, strict=True):
            dearer = [other.cost - choice.cost for other in choices if other.cost > choice.cost]
            assert not dearer or min(dearer) > left, (seed, flat)


def test_a_budget_below_the_cheapest() -> None:
    layers = [[Choice(0, 8, None, 8, 1.0), Choice(2, 8, None, 12, 0.5)]] * 3
    assert [choice.cost for choice in allocate(layers, 24)] == [8, 8, 8]
    with pytest.raises(ValueError, match="23"):
        allocate(layers, 23)


# Conversions under a budget


def cached(folder: Path, tokens: torch.Tensor) -> list[int]:
    """Elements per token that each layer of the running model caches."""
    cache = load(folder)(tokens, use_cache=True).past_key_values
    return [(layer.keys.numel() + layer.values.numel()) // tokens.numel() for layer in cache.layers]


def check_budget(folder: Path, statistics: Path, budget: float) -> list[dict[str, Any]]:
    """The report's sums are the model's and within the budget. Returns the report's layers."""
    report, tokens = report_of(folder), tokens_of(statistics)
    sizes = cached(folder, tokens)
    assert sum(sizes) <= budget
    layers = report["layers"]
    assert [layer["cache_elements_after"] for layer in layers] == sizes
    assert report["allocation"]["cost"] == report["cache_elements_per_token"]["after"] == sum(sizes)
    assert report["allocation"]["budget"] == int(budget + 1e-6)
    config = json.loads((folder / "config.json").read_text())["mha2mla"]
    for part, name in (
        ("partial_rope", "qk_rope_head_dim"), ("low_rank", "kv_lora_rank"), ("low_rank", "k_lora_rank")
    ):  # fmt: skip
        listed = config[part][name]
        assert (listed if isinstance(listed, list) else [listed] * L) == [layer[name] for layer in layers]
    assert (folder / "allocation.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert logits(folder, tokens).isfinite().all()
    return layers


# From the fewest to about the most elements that each method can have, split with two latents.
@pytest.mark.parametrize(
    ("method", "fraction"), [("joint", 0.4), ("split", 0.5), ("value", 0.75), ("key", 0.75), ("auto", 0.13)]
)
def test_a_budget(tmp_path: Path, model: Path, statistics: Path, method: str, fraction: float) -> None:
    words = [f"statistics={statistics}", f"cache_budget={fraction}", f"low_rank.method={method}"]
    folder = convert(model, tmp_path / "mla", *words)
    budget = fraction * BEFORE * L
    layers = check_budget(folder, statistics, budget)
    # One step: the finest of a rank's multiple of 8 and 2 rotary dims of each head.
    assert sum(layer["cache_elements_after"] for layer in layers) > budget - 8
    used = report_of(folder)["mha2mla"]
    assert used["partial_rope"]["strategy"] == "activation" and used["partial_rope"]["query_map"] is True
    assert used["low_rank"]["method"] == ("joint" if method == "auto" else method)
    assert used["low_rank"]["objective"] == "tempered"
    assert all(layer["qk_rope_head_dim"] % 2 == 0 and layer["kv_lora_rank"] % 8 == 0 for layer in layers)


def test_keys_of_a_share_of_the_latent(tmp_path: Path, model: Path, statistics: Path) -> None:
    """The same r and c as without; keys have the first half of each latent, and cost nothing of their own."""
    words = [f"statistics={statistics}", "cache_budget=0.5", "allocation.rank_multiple=4"]
    whole = check_budget(convert(model, tmp_path / "whole", *words), statistics, 0.5 * BEFORE * L)
    folder = convert(model, tmp_path / "half", *words, "allocation.key_share=0.5")
    half = check_budget(folder, statistics, 0.5 * BEFORE * L)
    for a, b in zip(whole, half, strict=True):
        assert [a[key] for key in ("qk_rope_head_dim", "kv_lora_rank", "cache_elements_after")] == [
            b[key] for key in ("qk_rope_head_dim", "kv_lora_rank", "cache_elements_after")
        ]
        c, nope = b["kv_lora_rank"], G * (D - b["qk_rope_head_dim"])
        assert b["k_lora_rank"] == min(-(-c // 8) * 4, nope) < c
        prefix = f"model.layers.{b['layer']}.self_attn."
        assert weights_of(folder)[f"{prefix}k_up_proj.weight"].shape == (nope, b["k_lora_rank"])
    assert "key_share" in refused("convert_mha_to_mla", model, tmp_path / "x", *words, "allocation.key_share=0")
    line = refused(
        "convert_mha_to_mla", model, tmp_path / "x", *words, "allocation.key_share=0.5", "low_rank.method=split"
    )
    assert "key_share" in line and "split" in line


@pytest.mark.parametrize("per_layer", ["true", "false"])
def test_a_budget_is_divided_between_keys_and_values(
    tmp_path: Path, model: Path, statistics: Path, per_layer: str
) -> None:
    """No other division of the same width loses less: with objective=inputs that is the energy of what is cut off, of
    the rows whitened by the inputs' second moment."""
    given = [f"statistics={statistics}", "low_rank.objective=inputs", "low_rank.damping=1e-12"]
    words = ["cache_budget=0.4", "low_rank.method=split", "allocation.rank_multiple=4", "partial_rope.shared=false"]
    words.append("allocation.max_rope=12")  # so that there are keys to factor
    folder = convert(model, tmp_path / "mla", *given, *words, f"allocation.per_layer={per_layer}")
    layers = check_budget(folder, statistics, 0.4 * BEFORE * L)
    rope = [layer["qk_rope_head_dim"] for layer in layers]
    words = [f"partial_rope.qk_rope_head_dim={rope}", f"statistics={statistics}", "low_rank.method=none"]
    rows, sums = weights_of(convert(model, tmp_path / "none", *words)), load_file(statistics)
    losses, found = [], set()
    for index, layer in enumerate(layers):
        e, u = torch.linalg.eigh(sums[f"layers.{index}.input_moment"].double())
        root = u * e.clamp_min(0).sqrt() @ u.T
        prefix = f"model.layers.{index}.self_attn."
        tails = []
        for name in ("k_nope_proj", "v_proj"):
            energy = torch.linalg.svdvals(rows[f"{prefix}{name}.weight"].double() @ root).square()
            tails.append([energy[rank:].sum().item() for rank in range(len(energy) + 1)])
        losses.append(tails)
        found.add((layer["k_lora_rank"], layer["kv_lora_rank"]))
    if per_layer == "false":  # one division, by the layers' losses as they were measured
        assert len(found) == 1 and len(set(rope)) == 1
        return
    assert any(k != c for k, c in found)
    for (keys, values), layer in zip(losses, layers, strict=True):
        k, c = layer["k_lora_rank"], layer["kv_lora_rank"]
        others = [(n, k + c - n) for n in range(4, min(len(keys), k + c - 3), 4) if k + c - n < len(values)]
        best = min(keys[n] + values[m] for n, m in others)
        assert keys[k] + values[c] <= best * (1 + 1e-6)


def test_layers_are_measured_alone(tmp_path: Path, model: Path, statistics: Path) -> None:
    """What the report says was measured without a layer's rotations is the divergence of a model that keeps all
    rotations but in this layer, over the stored tokens."""
    words = [f"statistics={statistics}", "cache_budget=0.4", "partial_rope.shared=false", "allocation.tokens=64"]
    report = report_of(convert(model, tmp_path / "mla", *words))
    count = max(1, 64 // tokens_of(statistics).shape[1])
    tokens = load_file(statistics)["sequences"][-count:].long()
    expected = logits(model, tokens)[:, 3::4].log_softmax(-1)
    for index, found in enumerate(report["allocation"]["layers"]):
        rope = [0 if layer == index else D for layer in range(L)]
        words = [f"statistics={statistics}", f"partial_rope.qk_rope_head_dim={rope}", "low_rank.method=none"]
        other = logits(convert(model, tmp_path / f"only_{index}", *words), tokens)[:, 3::4].log_softmax(-1)
        divergence = (expected.exp() * (expected - other)).sum(-1).mean().item()
        # float32 on both sides, of a divergence near 0.1.
        assert found["kl_rope"]["0"] == pytest.approx(divergence, rel=1e-3)
        assert list(found["kl_rope"]) == ["0", "2", "4", "6", "8", "16"]
        assert found["kl_rope"]["0"] > found["kl_rope"]["2"] > found["kl_rope"]["16"]


def test_layers_are_measured_healed(tmp_path: Path, model: Path, statistics: Path) -> None:
    """As above, of the last layer: healing finds nothing to mend in those below it, which keep everything."""
    words = [f"statistics={statistics}", "cache_budget=0.4", "partial_rope.shared=false", "allocation.tokens=64"]
    plain = report_of(convert(model, tmp_path / "plain", *words))["allocation"]["layers"]
    healed = report_of(convert(model, tmp_path / "mla", *words, "allocation.heal_steps=5"))["allocation"]["layers"]
    for after, before in zip(healed, plain, strict=True):
        assert 0 < after["kl_rope_and_rank"] < before["kl_rope_and_rank"]
        assert 0 < after["kl_rope"]["2"] < before["kl_rope"]["2"]
    count = max(1, 64 // tokens_of(statistics).shape[1])
    tokens = load_file(statistics)["sequences"][-count:].long()
    expected = logits(model, tokens)[:, 3::4].log_softmax(-1)
    rope = [D] * (L - 1) + [0]
    words = [f"statistics={statistics}", f"partial_rope.qk_rope_head_dim={rope}", "low_rank.method=none"]
    other = logits(convert(model, tmp_path / "last", *words, "heal.steps=5"), tokens)[:, 3::4].log_softmax(-1)
    divergence = (expected.exp() * (expected - other)).sum(-1).mean().item()
    # Layers that lose nothing come out of healing with float32's rounding.
    assert healed[-1]["kl_rope"]["0"] == pytest.approx(divergence, rel=1e-2)


def test_the_whole_budget_loses_nothing(tmp_path: Path, model: Path, statistics: Path) -> None:
    folder = convert(model, tmp_path / "mla", f"statistics={statistics}", "cache_budget=1.0")
    check_budget(folder, statistics, BEFORE * L)
    tokens = tokens_of(statistics)
    assert (logits(folder, tokens) - logits(model, tokens)).abs().max() < 1e-4


def test_elements_instead_of_a_fraction(tmp_path: Path, model: Path, statistics: Path) -> None:
    """The same budget, on average over layers, need not be whole."""
    folders = [
        convert(model, tmp_path / name, f"statistics={statistics}", word)
        for name, word in (("elements", "cache_elements=25.6"), ("fraction", "cache_budget=0.4"))
    ]
    check_budget(folders[0], statistics, 25.6 * L)
    a, b = map(weights_of, folders)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_layers_alike(tmp_path: Path, model: Path, statistics: Path) -> None:
    words = [f"statistics={statistics}", "cache_budget=0.45", "allocation.per_layer=false", "partial_rope.shared=false"]
    folder = convert(model, tmp_path / "mla", *words)
    layers = check_budget(folder, statistics, 0.45 * BEFORE * L)
    assert len({(layer["qk_rope_head_dim"], layer["kv_lora_rank"]) for layer in layers}) == 1
    config = json.loads((folder / "config.json").read_text())["mha2mla"]
    assert isinstance(config["low_rank"]["kv_lora_rank"], int)
    # 28.8 elements for a layer: at most 4 of them, two rotary dims of each head, are left.
    assert layers[0]["cache_elements_after"] > 28.8 - 4


BOUNDS = {
    "multiples": (["rope_multiple=6", "min_rope=1", "rank_multiple=12"], 6, 12, 12, 60, 6, 12),
    "rope": (["min_rope=4", "max_rope=6"], 4, 6, 8, 64, 2, 8),
    "rope at one value": (["min_rope=4", "max_rope=4", "rank_multiple=1"], 4, 4, 1, 64, 2, 1),
    "rank": (["min_rank=9", "max_rank=20", "rank_multiple=4"], 0, 16, 12, 20, 2, 4),
    "none rotates": (["max_rope=1"], 0, 0, 8, 64, 2, 8),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_hold(tmp_path: Path, model: Path, statistics: Path, case: str) -> None:
    words, min_r, max_r, min_c, max_c, step_r, step_c = BOUNDS[case]
    given = [f"statistics={statistics}", "cache_budget=0.5", "partial_rope.shared=false"]
    given += [f"allocation.{word}" for word in words]
    layers = check_budget(convert(model, tmp_path / "mla", *given), statistics, 0.5 * BEFORE * L)
    for layer in layers:
        r, c = layer["qk_rope_head_dim"], layer["kv_lora_rank"]
        assert min_r <= r <= max_r and r % step_r == 0
        assert min_c <= c <= max_c and c % step_c == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_full_rank_loses_nothing(tmp_path: Path, model: Path, statistics: Path, objective: str) -> None:
    """Where every dim rotates, against the original; else against the same pairs and map with nothing factored."""
    tokens = tokens_of(statistics)
    words = [f"statistics={statistics}", f"low_rank.objective={objective}"]
    rope, some = (f"partial_rope.qk_rope_head_dim={r}" for r in (16, 4))
    unfactored = convert(model, tmp_path / "none", words[0], some, "low_rank.method=none")
    for name, more, expected in (
        ("joint", ["low_rank.kv_lora_rank=32", "low_rank.method=joint", rope], model),
        ("split", ["low_rank.kv_lora_rank=32", "low_rank.method=split", rope], model),
        ("mixed", ["low_rank.kv_lora_rank=56", "low_rank.method=joint", some], unfactored),
    ):
        folder = convert(model, tmp_path / name, *words, *more)
        # One more product in float32; a moment's root goes in and out with it.
        assert (logits(folder, tokens) - logits(expected, tokens)).abs().max() < 1e-4, name


@torch.no_grad()
def divergence(folder: Path, model: Path, tokens: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution from the original's."""
    expected, found = (logits(source, tokens).double().log_softmax(-1) for source in (model, folder))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_statistics_and_budget_pay(tmp_path: Path, model: Path, statistics: Path) -> None:
    """At the same cache, statistics do better than plain SVD and uniform pairs, and better still when they choose r and
    c as well; on other sequences than they are of."""
    held_out = load_file(statistics)["sequences"][8:].long()
    assert len(held_out) >= 4
    fixed = ["partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=24"]  # 32 of 64 elements
    plain = divergence(convert(model, tmp_path / "plain", *fixed), model, held_out)
    words = [f"statistics={statistics}"]
    aware = divergence(convert(model, tmp_path / "aware", *words, *fixed), model, held_out)
    budget = divergence(convert(model, tmp_path / "budget", *words, "cache_budget=0.5"), model, held_out)
    assert budget < aware < 0.8 * plain  # 0.18, 0.47 and 0.74


# Healing


@torch.no_grad()
def final_states(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return load(folder).model(tokens).last_hidden_state


def test_healing_lowers_the_error(tmp_path: Path, model: Path, statistics: Path) -> None:
    words = [f"statistics={statistics}", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=16"]
    healed = ["heal.steps=20", "heal.batch_tokens=256"]
    folders = {
        name: convert(model, tmp_path / name, *words, *more)
        for name, more in (("plain", []), ("none", ["heal.steps=0"]), ("healed", healed), ("again", healed))
    }
    weights = {name: weights_of(folder) for name, folder in folders.items()}
    for a, b in (("plain", "none"), ("healed", "again")):
        assert all(torch.equal(tensor, weights[b][name]) for name, tensor in weights[a].items())
    for name, tensor in weights["plain"].items():
        trained = "self_attn" in name and not name.endswith("rope_pairs")
        assert torch.equal(tensor, weights["healed"][name]) != trained, name
    tokens = load_file(statistics)["sequences"].long()
    expected = final_states(model, tokens)
    errors = {name: (final_states(folders[name], tokens) - expected).square().mean().item() for name in folders}
    assert errors["healed"] < 0.85 * errors["plain"]  # 0.72 in 20 steps, which are the warm-up
    assert report_of(folders["healed"])["heal"]["steps"] == 20


def inputs_of(modules: list[Any], model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each of these modules of the model gets."""
    inputs: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(tokens)
    return inputs


def attention_streams(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream after the attention of every layer."""
    return inputs_of([layer.post_attention_layernorm for layer in model.model.layers], model, tokens)


def importance(stream: torch.Tensor) -> torch.Tensor:
    """Of each token's squared error, not normalised."""
    sizes = stream.square().mean(-1)
    return 1 / (sizes + 0.01 * sizes.median())


def test_healing_steps_down_the_gradient(tmp_path: Path, model: Path, text: Path) -> None:
    """Of how far the stream after a layer's attention is from the original's, relative to its size, with the layers
    below healed already. A matrix goes along the gradient's singular vectors, by about the same along each (Muon: with
    factors of 0.7 to 1.2), a vector by the gradient's sign (Adam's first step). One sequence: nothing is drawn."""
    file = tmp_path / "s.safetensors"
    run_tool("calibrate", model, text, file, f"sequence_length={S}", "samples=2", "stored_samples=1")
    words = [f"statistics={file}", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=12"]
    plain = weights_of(convert(model, tmp_path / "plain", *words))
    healed = weights_of(convert(model, tmp_path / "healed", *words, "heal.steps=1", "heal.learning_rate=0.2"))
    tokens = tokens_of(file, 1)
    with torch.no_grad():
        expected = attention_streams(load(model), tokens)
    for layer in range(L):
        moved, prefix = load(tmp_path / "healed"), f"model.layers.{layer}.self_attn."
        moved.load_state_dict({name: t for name, t in plain.items() if name.startswith(prefix)}, strict=False)
        module = moved.model.layers[layer]
        stream, after = inputs_of([module.input_layernorm, module.post_attention_layernorm], moved, tokens)
        weights = importance(expected[layer])
        error = ((after - expected[layer]).square().mean(-1) * weights).sum()
        error.backward()
        share = error.detach() / ((expected[layer] - stream.detach()).square().mean(-1) * weights).sum()
        for name in ("q_proj.weight", "q_proj.bias", "k_rope_proj.weight", "v_up_proj.bias"):
            gradient, before = moved.get_parameter(prefix + name).grad, plain[prefix + name]
            # the first of 20 steps of warming up
            size = 0.2 / 20 * share.clamp(max=1).sqrt() * before.square().mean().sqrt()
            step = (before - healed[prefix + name]) / size
            if gradient.ndim == 1:
                # Gradients near Adam's epsilon of 1e-8 and near rounding are left out.
                clear = gradient.abs() > 1e-3 * gradient.abs().max()
                assert clear.float().mean() > 0.9, name
                assert torch.allclose(step[clear], gradient.sign()[clear], rtol=1e-2), (layer, name)
            else:
                u, values, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
                along = u.T @ step.double() @ vt.T / max(gradient.shape) ** 0.5  # the orthogonal matrix's size is 1
                clear = values > 0.05 * values.square().sum().sqrt()  # the others have not come to 1 in five iterations
                assert clear.sum() >= 4, (layer, name)
                factors = along.diagonal()[clear]
                assert factors.min() > 0.6 and factors.max() < 1.3, (layer, name, factors)
                # bfloat16's 8 bits, five times
                assert (along - along.diagonal().diag())[clear].abs().max() < 0.05, (layer, name)


@torch.no_grad()
def test_healing_solves_for_the_output_projection(tmp_path: Path, model: Path, statistics: Path) -> None:
    """With a step that moves nothing, o_proj is a solution of the same least squares problem by QR; the weight that it
    had counts as 4096 tokens, of heads' outputs of their mean square each."""
    words = [f"statistics={statistics}", "partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=12"]
    plain = weights_of(convert(model, tmp_path / "plain", *words))
    convert(model, tmp_path / "healed", *words, "heal.steps=1", "heal.learning_rate=1e-9")
    tokens = load_file(statistics)["sequences"].long()
    expected, healed = attention_streams(load(model), tokens), weights_of(tmp_path / "healed")
    for layer in range(L):
        moved, prefix = load(tmp_path / "healed"), f"model.layers.{layer}."
        module = moved.model.layers[layer]
        stream, heads = inputs_of([module.input_layernorm, module.self_attn.o_proj], moved, tokens)
        weights = importance(expected[layer])
        root = (weights / weights.mean()).sqrt().double().flatten()[:, None]
        heads = root * heads.double().flatten(0, 1)
        targets = expected[layer] - stream - healed.get(prefix + "self_attn.o_proj.bias", torch.zeros(()))
        before = plain[prefix + "self_attn.o_proj.weight"].double()
        prior = (4096 * heads.square().mean()).sqrt() * torch.eye(heads.shape[1], dtype=torch.float64)
        solution = torch.linalg.lstsq(
            torch.cat([heads, prior]), torch.cat([root * targets.double().flatten(0, 1), prior @ before.T])
        ).solution.T
        change = healed[prefix + "self_attn.o_proj.weight"] - before
        assert change.norm() > 1e-3 * before.norm()
        # float32's rounding of the heads' outputs, which the moment's condition magnifies
        assert (solution - before - change).norm() < 1e-3 * change.norm(), layer


def test_healing_under_a_budget(tmp_path: Path, model: Path, statistics: Path) -> None:
    words = [f"statistics={statistics}", "cache_budget=0.4", "low_rank.method=split", "heal.sequence_length=16"]
    plain = convert(model, tmp_path / "plain", *words)
    healed = convert(model, tmp_path / "healed", *words, "heal.steps=20")
    assert report_of(plain)["allocation"] == report_of(healed)["allocation"]
    tokens = load_file(statistics)["sequences"].long()
    expected = final_states(model, tokens)
    a, b = ((final_states(folder, tokens) - expected).square().mean() for folder in (healed, plain))
    assert a < b


# Bad settings: {s} is the statistics file

WITH = "statistics={s}"
FIXED = ["partial_rope.qk_rope_head_dim=4", "low_rank.kv_lora_rank=8"]
BAD_SETTINGS = {
    "budget and r": ([WITH, "cache_budget=0.4", "partial_rope.qk_rope_head_dim=4"], ["qk_rope_head_dim", "budget"]),
    "budget and c": ([WITH, "cache_budget=0.4", "low_rank.kv_lora_rank=8"], ["kv_lora_rank", "budget"]),
    "budget and d_kv": ([WITH, "cache_elements=20", "low_rank.d_kv=8"], ["d_kv", "budget"]),
    "two budgets": ([WITH, "cache_budget=0.4", "cache_elements=20"], ["cache_budget", "cache_elements"]),
    "budget 0": ([WITH, "cache_budget=0"], ["cache_budget", "0"]),
    "budget negative": ([WITH, "cache_budget=-0.4"], ["cache_budget", "-0.4"]),
    "budget above 1": ([WITH, "cache_budget=1.5"], ["cache_budget", "1.5", "at most 1"]),
    "budget below the least": ([WITH, "cache_budget=0.1"], ["cache budget", "6.3", "least", "8"]),
    "allocation without a budget": ([WITH, "allocation.rank_multiple=16"], ["allocation", "cache_budget"]),
    "elements below the least": ([WITH, "cache_elements=7"], ["7", "least", "8"]),
    "elements 0": ([WITH, "cache_elements=0"], ["cache_", "0"]),
    "elements above the original": ([WITH, "cache_elements=65"], ["cache_elements", "65", "64"]),
    "elements no number": ([WITH, "cache_elements=.nan"], ["cache_elements", "nan"]),
    "elements infinite": ([WITH, "cache_elements=-.inf"], ["cache_elements", "inf"]),
    "budget no number": ([WITH, "cache_budget=.nan"], ["cache_budget", "nan"]),
    "budget without statistics": (["cache_budget=0.4"], ["budget", "statistics=FILE"]),
    "heal without statistics": ([*FIXED, "heal.steps=5"], ["heal.steps", "statistics=FILE"]),
    "none with a budget": ([WITH, "cache_budget=0.4", "low_rank.method=none"], ["method=none", "budget"]),
    "full with a budget": ([WITH, "cache_budget=0.4", "partial_rope.strategy=full"], ["strategy=full"]),
    "activation without scores": (["partial_rope.strategy=activation", *FIXED], ["activation", "partial_rope.scores"]),
    "map without scores": (["partial_rope.query_map=true", *FIXED], ["query_map", "partial_rope.scores"]),
    "outputs without statistics": (["low_rank.objective=outputs", *FIXED], ["objective=outputs", "statistics=FILE"]),
    "unknown objective": ([WITH, "low_rank.objective=best", *FIXED], ["best", *OBJECTIVES]),
    "damping 0": ([WITH, "low_rank.damping=0", *FIXED], ["damping", "0"]),
    "damping above 1": ([WITH, "low_rank.damping=2", *FIXED], ["damping", "2"]),
    "odd multiple": ([WITH, "cache_budget=0.4", "allocation.rope_multiple=3"], ["rope_multiple", "3", "odd"]),
    "multiple 0": ([WITH, "cache_budget=0.4", "allocation.rank_multiple=0"], ["rank_multiple", "0"]),
    "negative bound": ([WITH, "cache_budget=0.4", "allocation.min_rope=-2"], ["min_rope", "-2"]),
    "no r to choose": (
        [WITH, "cache_budget=0.4", "allocation.min_rope=6", "allocation.max_rope=4"],
        ["min_rope=6", "4"],
    ),
    "r above the head": (
        [WITH, "cache_budget=0.4", "allocation.min_rope=18", "partial_rope.shared=false"],
        ["min_rope=18", "16"],
    ),
    "no c to choose": (
        [WITH, "cache_budget=0.4", "allocation.min_rank=17", "allocation.max_rank=20"],
        ["min_rank", "max_rank", "rank_multiple"],
    ),
    "no measurement": ([WITH, "cache_budget=0.4", "allocation.tokens=0"], ["allocation.tokens", "0"]),
    "uniform start that not every r has": (
        [WITH, "cache_budget=0.4", "partial_rope.strategy=uniform", "partial_rope.uniform_start=1"],
        ["uniform_start"],
    ),
    "high pairs that not every r has": (
        [WITH, "cache_budget=0.4", "partial_rope.strategy=ends", "partial_rope.ends_high_pairs=1"],
        ["ends_high_pairs"],
    ),
    "heal steps": ([WITH, *FIXED, "heal.steps=-1"], ["heal.steps", "-1"]),
    "heal rate": ([WITH, *FIXED, "heal.steps=1", "heal.learning_rate=0"], ["heal.learning_rate", "0"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(tmp_path: Path, model: Path, statistics: Path, case: str) -> None:
    words, named = BAD_SETTINGS[case]
    line = refused("convert_mha_to_mla", model, tmp_path / "mla", *(word.format(s=statistics) for word in words))
    assert all(part in line for part in named), line
    assert list(tmp_path.iterdir()) == []
