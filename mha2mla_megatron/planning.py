"""From a cache budget to r and c of every layer: losses of all choices, scaled by what was measured, then allocated.

For one layer the loss of (r, c) is modelled as alpha pair_loss(r)^gamma + beta rank_loss(r, c), of split with the sum
of the keys' and the values' rank losses, which are in one unit; so their widths are chosen apart. Both losses are
computed from the statistics; alpha, gamma and beta are set by three measurements of each layer, converted alone at a
reference point and with its smallest r, as the Kullback-Leibler divergence of the model's next-token distribution from
the original's. So they hold what second-order statistics leave out: the softmax's curvature, and what later layers make
of the error.

Shape letters: L layers, S tokens of a sequence, b sequences, d head dim, G key/value heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_megatron.allocation import Choice, allocate
from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.attention_converter import AttentionConverter
from mha2mla_megatron.calibration.original import OriginalModel
from mha2mla_megatron.config import MHA2MLAConfig
from mha2mla_megatron.converted_attention import make_attention
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.healing import Healer, HealSettings
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.ranks import ALONE, Ranks


@dataclass(frozen=True)
class AllocationSettings:
    """How a cache budget is spent."""

    per_layer: bool = True
    """true: r and c of each layer where they buy most. false: the best r and c that all layers share."""

    rope_multiple: int | None = None
    """r is a multiple of this (even). None: 2, of shared rotated keys 8, which tensor-parallel processes can share."""

    rank_multiple: int = 8
    """c, and each of split's two, is a multiple of this (8 or 16 suit kernels and FP8)."""

    min_rope: int = 0
    """Smallest r of a layer."""

    max_rope: int | None = None
    """Largest r of a layer. None: d, of shared rotated keys without qk_nope_head_dim d/2."""

    min_rank: int = 1
    """Smallest c of a layer; rounded up to a multiple."""

    max_rank: int | None = None
    """Largest c of a layer. None: the rank of what is factored."""

    key_share: float = 1.0
    """Of joint: keys are made of this part of each latent's columns, rounded up to a multiple. Less is faster to decode
    from; the choice of r and c does not see what it costs."""

    tokens: int = 1024
    """Tokens of the measurements, taken from the statistics file; at least one of its sequences."""

    heal_steps: int = 0
    """Steps of healing, with the other settings of `heal`, before a layer is measured: what healing mends costs nothing
    then. A lost rotation is mended more easily than a lost rank."""

    def __post_init__(self) -> None:
        for key, value, minimum in (
            ("rope_multiple", 2 if self.rope_multiple is None else self.rope_multiple, 2),
            ("rank_multiple", self.rank_multiple, 1),
            ("min_rope", self.min_rope, 0),
            ("min_rank", self.min_rank, 1),
            ("tokens", self.tokens, 1),
            ("heal_steps", self.heal_steps, 0),
        ):
            require_at_least(f"allocation.{key}", value, minimum)
        if not 0 < self.key_share <= 1:
            raise UserError(f"allocation.key_share: {self.key_share} is not above 0 and at most 1")
        if self.rope_multiple is not None and self.rope_multiple % 2:
            raise UserError(f"allocation.rope_multiple: {self.rope_multiple} is odd; rotary dims come in pairs")


@dataclass(frozen=True)
class Plan:
    """r and c of each layer, and the figures behind them for the report."""

    qk_rope_head_dim: list[int]
    kv_lora_rank: list[int]
    k_lora_rank: list[int] | None
    """Of split, and of joint whose keys are made of a part of the latent."""
    report: dict[str, Any]


@dataclass(frozen=True)
class _Measured:
    """Kullback-Leibler divergences of the model with one layer converted."""

    pairs: float
    """With the reference's r, nothing factored."""
    both: float
    """With the reference's r and c."""
    fewest_pairs: float
    """With the layer's smallest r, nothing factored."""


@dataclass(frozen=True)
class _Losses:
    """A layer's losses, as the statistics have them or scaled to nats."""

    pairs: dict[int, float]
    """r -> pair loss."""

    ranks: dict[int, list[torch.Tensor]]
    """r -> loss of each rank from 0 on, for each latent; before they are scaled at the knots alone."""


class Planner:
    """Allocates budgets for one model; several ranks share the layers."""

    def __init__(
        self,
        converter: AttentionConverter,
        settings: AllocationSettings,
        model: OriginalModel,
        sequences: torch.Tensor,
        heal: HealSettings,
        ranks: Ranks = ALONE,
    ) -> None:
        """sequences: int [n, S], for the measurements, and for the healing before them."""
        self.ranks = ranks
        self.heal = dataclasses.replace(heal, steps=settings.heal_steps)
        self.converter, self.settings, self.model, self.sequences = converter, settings, model, sequences
        self.original: Architecture = converter.original
        d = self.original.head_dim
        # A head may keep d - r dims beside shared keys, whose loss is not in the prices: half of them are enough.
        rope = converter.mla.partial_rope
        shared = rope.shared
        usual = d // 2 if shared and rope.qk_nope_head_dim is None else d
        limit = usual if settings.max_rope is None else min(settings.max_rope, d)
        self.rope_multiple = step = settings.rope_multiple or (8 if shared else 2)
        self.rope_dims = [r for r in range(0, limit + 1, step) if r >= settings.min_rope]
        if not self.rope_dims:
            raise UserError(
                f"allocation: no multiple of rope_multiple={step} from min_rope={settings.min_rope} to {limit}"
            )

        for r in self.rope_dims:  # what the strategy cannot have is said before minutes of measuring
            rope = dataclasses.replace(converter.mla.partial_rope, qk_rope_head_dim=r)
            self.original.resolve(dataclasses.replace(converter.mla, partial_rope=rope))

    def plan(self, budget: int) -> Plan:
        """Spend at most `budget` cached elements per token, over all layers; all ranks call it and get the same plan.

        Raises UserError for a budget below what the cheapest layers cost.
        """
        layers = self.original.num_layers
        cheapest = 0
        for layer in range(layers):
            dims = self._dims(layer)
            costs = [self._layout(r, c).cache_elements for r in dims for c in self._ranks(r)[:1]]
            if not costs:
                raise UserError("allocation: min_rank, max_rank and rank_multiple leave no rank to choose")
            cheapest += min(costs)
        if budget < cheapest:
            raise UserError(
                f"the cache budget is {budget / layers:.6g} elements per token and layer; the least that these bounds "
                f"allow is {cheapest / layers:.6g}"
            )
        reference = self._reference(budget // layers)
        # A layer is measured by running those above it.
        measured = self._of_layers(reference, self._measure, {layer: layers - layer for layer in range(layers)})
        losses = self._of_layers(reference, self._losses, dict.fromkeys(range(layers), 1))
        return self.ranks.first(lambda: self._spend(budget, reference, measured, losses))

    def _of_layers[T](
        self,
        reference: tuple[int, int],
        work: Callable[[tuple[int, int], list[int]], dict[int, T]],
        sizes: Mapping[int, int],
    ) -> list[T]:
        """What `work` finds for each layer, the layers shared out by their sizes."""
        found: dict[int, T] = {}
        for part in self.ranks.every(lambda: work(reference, self.ranks.share(sizes))):
            found.update(part)
        return [found[layer] for layer in sizes]

    def _spend(self, budget: int, reference: tuple[int, int], measured: list[_Measured], losses: list[_Losses]) -> Plan:
        scaled = [
            self._scaled(layer, reference, *found) for layer, found in enumerate(zip(measured, losses, strict=True))
        ]
        if self.settings.per_layer:
            picked = allocate([self._choices([one], [layer]) for layer, one in enumerate(scaled)], budget)
        else:
            picked = self._alike(scaled, budget)
        return Plan(
            [choice.qk_rope_head_dim for choice in picked],
            [choice.kv_lora_rank for choice in picked],
            [self._key_rank(choice) for choice in picked] if self._is_split or self.settings.key_share < 1 else None,
            {
                "budget": budget,
                "cost": sum(choice.cost for choice in picked),
                "reference": {"qk_rope_head_dim": reference[0], "kv_lora_rank": reference[1]},
                "layers": [
                    {
                        "kl_pairs": found.pairs,
                        "kl_pairs_and_rank": found.both,
                        "kl_fewest_pairs": found.fewest_pairs,
                        "predicted_loss": choice.loss,
                    }
                    for found, choice in zip(measured, picked, strict=True)
                ],
            },
        )

    def _dims(self, layer: int) -> list[int]:
        """The r that a layer can have: 0 where the original rotates nothing."""
        return [0] if layer in self.original.no_rope_layers else self.rope_dims

    @property
    def _is_split(self) -> bool:
        return self.converter.mla.low_rank.method == "split"

    def _key_rank(self, choice: Choice) -> int:
        if self._is_split:
            return choice.k_lora_rank or 0
        multiple = self.settings.rank_multiple
        wanted = math.ceil(self.settings.key_share * choice.kv_lora_rank / multiple) * multiple
        return min(wanted, self._layout(*choice[:2]).k_lora_rank_limit)

    def _layout(self, r: int, c: int | None, k: int | None = None) -> LatentLayout:
        """c None: nothing factored."""
        mla = self.converter.mla
        method = "none" if c is None else mla.low_rank.method
        return mla.partial_rope.layout(self.original.heads, r, method, c, k)

    def _ranks(self, r: int) -> list[int]:
        """Multiples within the bounds that a layer with this r can have, of split for both latents."""
        return self._multiples(self._layout(r, 1).kv_lora_rank_limit or 0)

    def _multiples(self, limit: int) -> list[int]:
        """Ranks up to `limit` within the bounds."""
        multiple = self.settings.rank_multiple
        limit = limit if self.settings.max_rank is None else min(limit, self.settings.max_rank)
        first = -(-self.settings.min_rank // multiple) * multiple
        return list(range(first, limit + 1, multiple))

    def _reference(self, elements: int) -> tuple[int, int]:
        """(r, c) at which layers are measured: about what a layer will get."""
        _, _, groups, d = self.original.heads
        target = self.converter.mla.partial_rope.usual_rope_dim(groups, d)
        for r in sorted(self.rope_dims, key=lambda r: (r > target, abs(r - target))):
            fitting = [c for c in self._ranks(r) if self._layout(r, c).cache_elements <= elements]
            if fitting:
                return r, fitting[-1]
        # Layers that rotate nothing are the only ones that cost so little.
        return self.rope_dims[0], self._ranks(self.rope_dims[0])[0]

    def _own_reference(self, layer: int, reference: tuple[int, int]) -> tuple[int, int]:
        """The reference with no more rotated dims than the layer can have."""
        return min(reference[0], self._dims(layer)[-1]), reference[1]

    @torch.no_grad()
    def _measure(self, reference: tuple[int, int], layers: list[int]) -> dict[int, _Measured]:
        """KL divergences from the original with each of `layers` converted alone.

        All these models go through the layers side by side, each from its converted layer on, so that every original
        layer is read once. Their hidden states wait on the host.
        """
        model = self.model
        count = max(1, min(len(self.sequences), self.settings.tokens // self.sequences.shape[1]))
        original = model.embed(self.sequences[-count:].long())
        wanted = {layer: self._measured_layouts(layer, reference) for layer in layers}
        runs = sum(len(set(layouts)) * (self.original.num_layers - layer) for layer, layouts in wanted.items())
        progress = Progress("measure", runs, "layers")
        variants: dict[tuple[int, LatentLayout], torch.Tensor] = {}
        healer = Healer(model, self.original, self.sequences, self.heal) if self.heal.steps > 0 else None
        for index in range(self.original.num_layers):
            layer = model.layer(index)
            for key, hidden in variants.items():
                variants[key] = layer.run(hidden.to(model.device)).cpu()
            for layout in dict.fromkeys(wanted.get(index, ())):
                tensors = self.converter.convert(index, layout).tensors
                if healer is not None:
                    tensors = healer.heal(index, layout, tensors)
                attention = make_attention(self.original, layout, tensors, model.device)
                variants[index, layout] = layer.run(original, attention).cpu()
            original = layer.run(original)
            if healer is not None and index < max(layers, default=0):
                healer.pass_by(index)
            progress.advance(len(variants))
            del layer  # before the next one is read
        progress.close()
        head = model.head()
        # Every fourth position: logits cost more than a layer, and neighbours say much the same.
        expected = head.log_probabilities(original[:, 3::4])

        def divergence(hidden: torch.Tensor) -> float:
            ratio = expected - head.log_probabilities(hidden[:, 3::4].to(model.device))
            return (expected.exp() * ratio).sum(-1).mean().item()

        found = {key: divergence(hidden) for key, hidden in variants.items()}
        return {layer: _Measured(*(found[layer, layout] for layout in layouts)) for layer, layouts in wanted.items()}

    def _measured_layouts(self, layer: int, reference: tuple[int, int]) -> tuple[LatentLayout, ...]:
        """Of the figures of `_Measured`, in their order; some are the same where the layer has but one r."""
        r, c = self._own_reference(layer, reference)
        return self._layout(r, None), self._layout(r, c), self._layout(self._dims(layer)[0], None)

    def _losses(self, reference: tuple[int, int], layers: list[int]) -> dict[int, _Losses]:
        """The losses of each of `layers` at every r it can have."""
        converter, found = self.converter, {}
        progress = Progress("allocate", len(layers), "layers")
        for layer in layers:
            dims = self._dims(layer)
            knots = self._knots(dims, self._own_reference(layer, reference)[0])
            ranks = {r: converter.rank_losses(layer, self._layout(r, 1)) for r in knots}
            pairs = {r: converter.pair_loss(layer, self._layout(r, None)) for r in {*dims, *knots}}
            found[layer] = _Losses(pairs, ranks)
            progress.advance()
        progress.close()
        return found

    def _scaled(self, layer: int, reference: tuple[int, int], measured: _Measured, losses: _Losses) -> _Losses:
        """One layer's losses in nats."""
        dims, (r0, c0) = self._dims(layer), self._own_reference(layer, reference)
        rank_loss = sum(_at(curve, c0) for curve in losses.ranks[r0])
        # Where the model sees nothing of a loss (or sees noise), a small part of it is believed all the same.
        pairs = max(measured.pairs, 0.01 * measured.both, 1e-6)
        beta = max(measured.both - measured.pairs, 0.1 * measured.both, 1e-6) / max(rank_loss, 1e-30)
        of_pairs = _through((losses.pairs[r0], pairs), (losses.pairs[dims[0]], max(pairs, measured.fewest_pairs)))
        return _Losses(
            {r: of_pairs(losses.pairs[r]) for r in dims},
            {r: [beta * curve for curve in _between(losses.ranks, r)] for r in dims},
        )

    def _choices(self, scaled: list[_Losses], layers: list[int]) -> list[Choice]:
        """Every (r, c) that these layers can share, with their summed costs and losses; where a layer rotates nothing
        its r is 0. Of split, for each cost the best division between keys and values."""
        dims = [self._dims(layer) for layer in layers]
        choices = []
        for r in max(dims, key=len):
            own = [r if r in its else 0 for its in dims]
            pairs = sum(one.pairs[its] for one, its in zip(scaled, own, strict=True))
            curves = [
                _sum(parts) for parts in zip(*(one.ranks[i] for one, i in zip(scaled, own, strict=True)), strict=True)
            ]
            for c, k, loss in self._widths(set(own), curves):
                cost = sum(self._layout(its, c, k).cache_elements for its in own)
                choices.append(Choice(r, c, k, cost, pairs + loss))
        return choices

    def _widths(self, dims: set[int], curves: list[torch.Tensor]) -> Iterator[tuple[int, int | None, float]]:
        """(c, k_lora_rank, loss) for layers with these r, of growing cost. curves: of each latent, the keys' first."""
        layouts = [self._layout(r, 1, 1 if self._is_split else None) for r in dims]
        ranks = self._multiples(min(layout.kv_lora_rank_limit or 0 for layout in layouts))
        if not self._is_split:
            yield from ((c, None, _at(curves[0], c)) for c in ranks)
            return
        factored = [layout.k_lora_rank_limit for layout in layouts if layout.factors_key]
        keys = self._multiples(min(factored)) if factored else [0]
        # Every curve is convex, so the best division grows by the latent that gains more from its next step.
        i = j = 0
        while i < len(keys) and j < len(ranks):
            k, c = keys[i], ranks[j]
            yield c, k, _at(curves[0], k) + _at(curves[1], c)
            gains = [
                _at(curve, at[n]) - _at(curve, at[n + 1]) if n + 1 < len(at) else -1.0
                for curve, at, n in ((curves[0], keys, i), (curves[1], ranks, j))
            ]
            i, j = (i + 1, j) if gains[0] > gains[1] or j + 1 == len(ranks) else (i, j + 1)

    def _knots(self, dims: list[int], reference: int) -> list[int]:
        """The r at which rank losses are computed; they change slowly with r, and between knots linearly."""
        step = max(self.rope_multiple, self.original.head_dim // 8)
        knots = {r for r in dims if r % step == 0}
        return sorted(knots | {dims[0], dims[-1], reference})

    def _alike(self, scaled: list[_Losses], budget: int) -> list[Choice]:
        """The (r, c) with the smallest summed loss that all layers can share, those that rotate nothing with r = 0."""
        choices = self._choices(scaled, list(range(len(scaled))))
        affordable = [choice for choice in choices if choice.cost <= budget]
        best = min(affordable, key=lambda choice: (choice.loss, *choice[:2]))
        r, c, k = best[:3]
        picked = []
        for one in scaled:
            own = r if r in one.pairs else 0
            widths = (c,) if k is None else (k, c)
            loss = one.pairs[own] + sum(_at(curve, rank) for curve, rank in zip(one.ranks[own], widths, strict=True))
            picked.append(Choice(own, c, k, self._layout(own, c, k).cache_elements, loss))
        return picked


def _through(point: tuple[float, float], other: tuple[float, float]) -> Callable[[float], float]:
    """y = alpha x^gamma through two points (x, y); through the first and 0 where the other is no larger."""
    (x, y), (other_x, other_y) = point, other
    if x < 1e-9 * other_x:  # nothing is lost at the first: only the other says something
        x, y = other
    if not x < other_x:
        return lambda loss: y * loss / max(x, 1e-30)
    gamma = min(max(math.log(other_y / y) / math.log(other_x / x), 0.5), 3.0)  # beyond, a measurement is noise
    return lambda loss: y * (loss / x) ** gamma


def _at(curve: torch.Tensor, rank: int) -> float:
    """The loss of a rank: 0 beyond those that there are."""
    return curve[rank].item() if rank < len(curve) else 0.0


def _sum(curves: Sequence[torch.Tensor]) -> torch.Tensor:
    longest = max(len(curve) for curve in curves)
    return torch.stack([torch.nn.functional.pad(curve, (0, longest - len(curve))) for curve in curves]).sum(0)


def _between(curves: dict[int, list[torch.Tensor]], r: int) -> list[torch.Tensor]:
    """Each latent's rank losses at r, linear between those at the knots on either side."""
    if r in curves:
        return curves[r]
    low, high = max(k for k in curves if k < r), min(k for k in curves if k > r)
    part = (r - low) / (high - low)
    return [_sum([below * (1 - part), above * part]) for below, above in zip(curves[low], curves[high], strict=True)]


def with_plan(plan: Plan, mla: MHA2MLAConfig) -> MHA2MLAConfig:
    """The config with the plan's r and c, single numbers where all layers share them."""

    def short(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return dataclasses.replace(
        mla,
        partial_rope=dataclasses.replace(mla.partial_rope, qk_rope_head_dim=short(plan.qk_rope_head_dim)),
        low_rank=dataclasses.replace(
            mla.low_rank,
            kv_lora_rank=short(plan.kv_lora_rank),
            k_lora_rank=None if plan.k_lora_rank is None else short(plan.k_lora_rank),
        ),
    )
