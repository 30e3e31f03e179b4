"""From a cache budget to r and c of every layer: losses of all choices, scaled by what was measured, then allocated.

For one layer the loss of (r, c) is modelled as rope_loss(r) + beta rank_loss(r, c), of split with the sum of the keys'
and the values' rank losses, which are in one unit; so their widths are chosen apart. Losses are Kullback-Leibler
divergences of the model's next-token distribution from the original's, measured with that layer alone converted:
rope_loss with nothing factored, at several r (between them its logarithm is linear); beta at a reference point, where
rank_loss is computed from the statistics. So they hold what second-order statistics leave out: the softmax's curvature,
what later layers make of the error, and the dims that heads lose beside mixed keys.

Shape letters: L layers, S tokens of a sequence, b sequences, d head dim, G key/value heads.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mha2mla_megatron.allocation import Choice, allocate
from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.attention_converter import AttentionConverter
from mha2mla_megatron.calibration.original import OriginalModel
from mha2mla_megatron.config import MHA2MLAConfig, PartialRopeConfig
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

    rope_per_layer: bool | None = None
    """false: the best r that all layers share, and c of each layer. None: false of shared rotated keys, whose layers
    fine-tuning brings further if they are alike; true of each head's own. Nothing to choose with per_layer=false."""

    rope_multiple: int | None = None
    """r is a multiple of this (even). None: 2, of shared rotated keys 8, which tensor-parallel processes can share."""

    rank_multiple: int = 8
    """c, and each of split's two, is a multiple of this (8 or 16 suit kernels and FP8)."""

    min_rope: int = 0
    """Smallest r of a layer."""

    max_rope: int | None = None
    """Largest r of a layer. None: d, of shared rotated keys d/4 if they are healed, otherwise d/2 without
    qk_nope_head_dim."""

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
    """Steps of healing, with the other settings of `heal`, before each measurement: what healing mends costs nothing
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

    def rope_dims(self, head_dim: int, rope: PartialRopeConfig, healed: bool) -> range:
        """The r that a layer can have; raises UserError if the bounds leave none."""
        multiple = self.rope_multiple or (8 if rope.shared else 2)
        largest = head_dim
        if self.max_rope is not None:
            largest = min(self.max_rope, head_dim)
        elif rope.shared and healed:
            # Measured: together with the other layers' a lost rank is mended less than what is seen of a layer alone,
            # and a lost rotation more.
            largest = max(head_dim // 4, multiple, self.min_rope)
        elif rope.shared and rope.qk_nope_head_dim is None:
            # A head keeps d - r dims beside shared keys: beyond half of them it loses more than it gains.
            largest = head_dim // 2
        dims = range(-(-self.min_rope // multiple) * multiple, largest + 1, multiple)
        if not dims:
            raise UserError(
                f"allocation: no multiple of rope_multiple={multiple} from min_rope={self.min_rope} to {largest}"
            )
        return dims


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

    rope: dict[int, float]
    """r -> with nothing factored."""
    both: float
    """With the reference's r and c."""


@dataclass(frozen=True)
class _Losses:
    """A layer's losses in nats, for every r that it can have."""

    rope: dict[int, float]
    """r -> what its rotation loses."""

    ranks: dict[int, list[torch.Tensor]]
    """r -> loss of each rank from 0 on, for each latent."""


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
        rope = converter.mla.partial_rope
        self.rope_per_layer = not rope.shared if settings.rope_per_layer is None else settings.rope_per_layer
        self.rope_dims = settings.rope_dims(self.original.head_dim, rope, heal.steps > 0)
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
        ranks = self._of_layers(reference, self._rank_losses, dict.fromkeys(range(layers), 1))
        return self.ranks.first(lambda: self._spend(budget, reference, measured, ranks))

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

    def _spend(
        self,
        budget: int,
        reference: tuple[int, int],
        measured: list[_Measured],
        ranks: list[dict[int, list[torch.Tensor]]],
    ) -> Plan:
        scaled = [
            self._scaled(layer, reference, *found) for layer, found in enumerate(zip(measured, ranks, strict=True))
        ]
        losses: dict[int, float] = {}
        if not self.settings.per_layer:
            picked = self._alike(scaled, budget)
        elif self.rope_per_layer:
            picked = allocate([self._choices([one], [layer]) for layer, one in enumerate(scaled)], budget)
        else:
            plans = self._for_each_rope(scaled, budget)
            losses = {r: sum(choice.loss for choice in plan) for r, plan in plans.items()}
            picked = plans[min(losses, key=lambda r: (losses[r], r))]
        return Plan(
            [choice.qk_rope_head_dim for choice in picked],
            [choice.kv_lora_rank for choice in picked],
            [self._key_rank(choice) for choice in picked] if self._is_split or self.settings.key_share < 1 else None,
            {
                "budget": budget,
                "cost": sum(choice.cost for choice in picked),
                "reference": {"qk_rope_head_dim": reference[0], "kv_lora_rank": reference[1]},
                # Of one r for all layers: what each that could have been chosen would lose.
                "predicted_loss_by_rope": losses,
                "layers": [
                    {
                        "kl_rope": found.rope,
                        "kl_rope_and_rank": found.both,
                        "predicted_loss": choice.loss,
                    }
                    for found, choice in zip(measured, picked, strict=True)
                ],
            },
        )

    def _dims(self, layer: int) -> range:
        """The r that a layer can have: 0 where the original rotates nothing."""
        return range(1) if layer in self.original.no_rope_layers else self.rope_dims

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
        return {
            layer: _Measured({own.qk_rope_head_dim: found[layer, own] for own in rope}, found[layer, both])
            for layer, (*rope, both) in wanted.items()
        }

    def _measured_layouts(self, layer: int, reference: tuple[int, int]) -> tuple[LatentLayout, ...]:
        """With nothing factored, of growing r; and last the reference, which may be one of them."""
        r, c = self._own_reference(layer, reference)
        dims = self._knots(layer, reference)
        # Each costs a run of the model: of a head's own pairs, those beyond half of the dims lose next to nothing.
        rope = [knot for knot in dims if knot <= max(r, self.original.head_dim // 2) or knot == dims[-1]]
        return *(self._layout(knot, None) for knot in rope), self._layout(r, c)

    def _rank_losses(self, reference: tuple[int, int], layers: list[int]) -> dict[int, dict[int, list[torch.Tensor]]]:
        """Of each of `layers`, at the knots: r -> loss of each rank from 0 on, for each latent, in the objective's
        units."""
        found = {}
        progress = Progress("allocate", len(layers), "layers")
        for layer in layers:
            knots = self._knots(layer, reference)
            found[layer] = {r: self.converter.rank_losses(layer, self._layout(r, 1)) for r in knots}
            progress.advance()
        progress.close()
        return found

    def _scaled(
        self, layer: int, reference: tuple[int, int], measured: _Measured, ranks: dict[int, list[torch.Tensor]]
    ) -> _Losses:
        dims, (r0, c0) = self._dims(layer), self._own_reference(layer, reference)
        rank_loss = sum(_at(curve, c0) for curve in ranks[r0])
        # Where the model sees nothing of a loss (or sees noise), a small part of it is believed all the same.
        beta = max(measured.both - measured.rope[r0], 0.1 * measured.both, 1e-6) / max(rank_loss, 1e-30)
        return _Losses(
            {r: _at_rope(measured.rope, r) for r in dims},
            {r: [beta * curve for curve in _between(ranks, r)] for r in dims},
        )

    def _choices(self, scaled: list[_Losses], layers: list[int]) -> list[Choice]:
        """Every (r, c) that these layers can share, with their summed costs and losses; where a layer rotates nothing
        its r is 0. Of split, for each cost the best division between keys and values."""
        dims = [self._dims(layer) for layer in layers]
        choices = []
        for r in max(dims, key=len):
            own = [r if r in its else 0 for its in dims]
            rope = sum(one.rope[its] for one, its in zip(scaled, own, strict=True))
            curves = [
                _sum(parts) for parts in zip(*(one.ranks[i] for one, i in zip(scaled, own, strict=True)), strict=True)
            ]
            for c, k, loss in self._widths(set(own), curves):
                cost = sum(self._layout(its, c, k).cache_elements for its in own)
                choices.append(Choice(r, c, k, cost, rope + loss))
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

    def _knots(self, layer: int, reference: tuple[int, int]) -> list[int]:
        """The r at which a layer's losses are found: they change slowly, and are interpolated between."""
        dims = self._dims(layer)
        step = max(self.rope_dims.step, self.original.head_dim // 8)
        knots = {r for r in dims if r % step == 0}
        return sorted(knots | {dims[0], dims[-1], self._own_reference(layer, reference)[0]})

    def _for_each_rope(self, scaled: list[_Losses], budget: int) -> dict[int, list[Choice]]:
        """r that all layers share and the budget pays for -> the best with c of each layer."""
        layers = [self._choices([one], [layer]) for layer, one in enumerate(scaled)]
        plans = {}
        for r in self.rope_dims:
            own = [
                [choice for choice in choices if choice.qk_rope_head_dim == (r if r in one.rope else 0)]
                for choices, one in zip(layers, scaled, strict=True)
            ]
            if sum(min(choice.cost for choice in choices) for choices in own) <= budget:
                plans[r] = allocate(own, budget)
        return plans

    def _alike(self, scaled: list[_Losses], budget: int) -> list[Choice]:
        """The (r, c) with the smallest summed loss that all layers can share, those that rotate nothing with r = 0."""
        choices = self._choices(scaled, list(range(len(scaled))))
        affordable = [choice for choice in choices if choice.cost <= budget]
        best = min(affordable, key=lambda choice: (choice.loss, *choice[:2]))
        r, c, k = best[:3]
        picked = []
        for one in scaled:
            own = r if r in one.rope else 0
            widths = (c,) if k is None else (k, c)
            loss = one.rope[own] + sum(_at(curve, rank) for curve, rank in zip(one.ranks[own], widths, strict=True))
            picked.append(Choice(own, c, k, self._layout(own, c, k).cache_elements, loss))
        return picked


def _at_rope(measured: dict[int, float], r: int) -> float:
    """The loss at r, its logarithm linear between the measured r on either side; 1e-6 at least."""
    low, high, part = _bracket(measured, r)
    return max(measured[low], 1e-6) ** (1 - part) * max(measured[high], 1e-6) ** part


def _bracket(knots: Iterable[int], r: int) -> tuple[int, int, float]:
    """The knots on either side of r, and how much of the way it is to the second; r itself twice where it is one."""
    ordered = sorted(knots)
    high = ordered[bisect_left(ordered, r)]
    low = high if high == r else ordered[bisect_left(ordered, r) - 1]
    return low, high, (r - low) / max(high - low, 1)


def _at(curve: torch.Tensor, rank: int) -> float:
    """The loss of a rank: 0 beyond those that there are."""
    return curve[rank].item() if rank < len(curve) else 0.0


def _sum(curves: Sequence[torch.Tensor]) -> torch.Tensor:
    longest = max(len(curve) for curve in curves)
    return torch.stack([torch.nn.functional.pad(curve, (0, longest - len(curve))) for curve in curves]).sum(0)


def _between(curves: dict[int, list[torch.Tensor]], r: int) -> list[torch.Tensor]:
    """Each latent's rank losses at r, linear between those at the knots on either side."""
    low, high, part = _bracket(curves, r)
    if low == high:
        return curves[r]
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
