"""One attention layer converted: which rows keep their rotation, what the others' queries become, how K and V factor.

Shape letters: h hidden size, H query heads, G key/value heads, d head dim, P = d/2 pairs, r rotary dims kept, R heads
of rotated keys (G, or 1 that all share), c rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.key_mixtures import KeyMixtures, Mixtures
from mha2mla_megatron.calibration.metric import IDENTITY, Metric, make_columns, make_rows
from mha2mla_megatron.calibration.mixed_keys import best_dims, rotated_queries, split_keys
from mha2mla_megatron.calibration.pairs import (
    apply_query_map,
    fit_query_map,
    identity_map,
    pair_losses,
    per_group,
    scaling_map,
)
from mha2mla_megatron.calibration.statistics import LayerStatistics, Statistics, model_fingerprint
from mha2mla_megatron.calibration.substitution import rotations
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.config import MHA2MLAConfig
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.frequencies import attention_factor
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.low_rank import factorise, factorise_nested, truncation_losses
from mha2mla_megatron.partial_rope import head_row_order, kept_pairs, load_scores, ordered_heads


@dataclass(frozen=True)
class ConvertedAttention:
    """Tensors by their names under `self_attn.` (float64 where computed), pairs int64 [R, r/2], report figures."""

    tensors: dict[str, torch.Tensor]
    pairs: torch.Tensor
    errors: dict[str, float]


@dataclass(frozen=True)
class _Layer:
    """What a layer's conversion starts from, on the device."""

    weights: dict[str, torch.Tensor]
    statistics: LayerStatistics | None
    scores: torch.Tensor | None
    """[G, P], what the strategy ranks pairs by."""
    query_map: torch.Tensor | None
    """[H, P, 2]; None: the queries as they are."""
    unrotated_scale: float
    """What stands in for the factor on cos and sin in the scores of dims that are no longer rotated."""
    columns: torch.Tensor | None
    mixtures: list[KeyMixtures] | None
    """What each of the R rotated keys can be made of; None: pairs of one head, as they are."""


@dataclass(frozen=True)
class _Split:
    """A layer's queries and keys, each head's rows in the order [r rotated | n others]."""

    pairs: torch.Tensor
    """int64 [R, r/2], on the CPU."""
    k_rope: torch.Tensor
    """[R r, h]."""
    k_nope: torch.Tensor
    """[G n, h]."""
    biases: tuple[torch.Tensor, torch.Tensor] | None
    """Of k_rope and k_nope."""
    queries: Callable[[torch.Tensor], torch.Tensor]
    """What becomes of the queries' rows, [H d, ...], weights or bias."""
    unrotated: torch.Tensor
    """float64 [G, n, d]: what a head's unrotated queries are made of, after the query map."""
    norms: dict[str, torch.Tensor]
    """q_norm.weight and k_norm.weight, float64 [G, d], of a model that has them."""


class AttentionConverter:
    """Converts the layers of one model, one at a time and as often as asked.

    The model is an original, or one with partial RoPE alone, of which only keys and values are factored. mla: resolved
    but for r and c, which come with each call as a layout.

    Raises UserError for score and statistics files that do not belong to the model.
    """

    def __init__(self, reader: HFReader, original: Architecture, mla: MHA2MLAConfig, device: torch.device) -> None:
        self.reader, self.original, self.mla, self.device = reader, original, mla, device
        rope, low_rank = mla.partial_rope, mla.low_rank
        self.attention_factor = attention_factor(original)
        self.scores: torch.Tensor | None = None
        self.statistics: Statistics | None = None
        self._layer = lru_cache(maxsize=1)(self._read_layer)
        if original.mla is not None:
            return
        files = set()
        if rope.strategy == "2-norm":
            self.scores = load_scores(
                Path(str(rope.scores)), original.num_layers, original.num_key_value_heads, original.head_dim
            )
        if rope.strategy == "activation" or rope.query_map or rope.mixed:
            files.add(str(rope.scores))
        if low_rank.statistics is not None:
            files.add(str(low_rank.statistics))
        if len(files) > 1:
            raise UserError(
                f"partial_rope.scores={rope.scores} and low_rank.statistics={low_rank.statistics}: two statistics "
                "files; merge them with tools/merge_statistics.py, or name one"
            )
        for file in files:
            self.statistics = Statistics(Path(file), original, model_fingerprint(reader, original))

    def convert(self, layer: int, layout: LatentLayout) -> ConvertedAttention:
        """The layer in the given shapes: rows reordered to [r | n] per head, then K_nope and V factored."""
        if self.original.mla is None:
            converted, pairs, metric = self._partial_rope(self._layer(layer), layout)
        else:
            converted, metric = dict(self._layer(layer).weights), IDENTITY
            pairs = converted.get("rope_pairs", torch.empty(layout.num_key_value_heads, 0, dtype=torch.int64)).cpu()
        v = converted["v_proj.weight"]
        k_nope = converted.get("k_nope_proj.weight", v[:0])
        k_rope = converted.get("k_rope_proj.weight", v[:0])
        factors = self._factor(k_nope, v, layout, metric)
        converted.update(factors)
        if layout.factors_key:
            del converted["k_nope_proj.weight"]
        if layout.factors_value:
            del converted["v_proj.weight"]
            if "v_proj.bias" in converted:
                converted["v_up_proj.bias"] = converted.pop("v_proj.bias")
        return ConvertedAttention(
            converted, pairs, _relative_errors(torch.cat((k_rope, k_nope)), v, k_nope, factors, layout)
        )

    def _partial_rope(
        self, source: _Layer, layout: LatentLayout
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, Metric]:
        """The layer with nothing factored, the pairs that it rotates, and the objective over its [K_nope; V]."""
        weights = source.weights
        r, n = layout.qk_rope_head_dim, layout.qk_nope_head_dim
        split = self._split(source, layout)
        converted = {
            "o_proj.weight": weights["o_proj.weight"],
            "q_proj.weight": split.queries(weights["q_proj.weight"]),
            "v_proj.weight": weights["v_proj.weight"],
        }
        if r > 0:
            converted["k_rope_proj.weight"] = split.k_rope
            converted["rope_pairs"] = split.pairs
        if n > 0:
            converted["k_nope_proj.weight"] = split.k_nope
        if split.biases is not None:
            converted["q_proj.bias"] = split.queries(weights["q_proj.bias"])
            if r > 0:
                converted["k_rope_proj.bias"] = split.biases[0]
            if n > 0 and "k_norm.weight" in weights:
                converted["k_nope_proj.bias"] = split.biases[1]
            converted["v_proj.bias"] = weights["v_proj.bias"]
        if "o_proj.bias" in weights:
            converted["o_proj.bias"] = weights["o_proj.bias"]
        converted.update(split.norms)
        return converted, split.pairs, self._metric(source, split)

    def rank_losses(self, layer: int, layout: LatentLayout) -> list[torch.Tensor]:
        """The price of every rank from 0 on, in the objective, for each latent, keys' before values': float64 [ranks],
        not increasing and convex. Of split, a layer that rotates every key has [0] for the keys, which it need not
        factor."""
        source = self._layer(layer)
        split = self._split(source, layout)
        parts = _parts(split.k_nope, source.weights["v_proj.weight"], layout, self._metric(source, split))
        losses = [0.5 * truncation_losses(rows, its_metric).cpu() for _, rows, its_metric in parts]
        missing = (2 if layout.method == "split" else 1) - len(losses)
        return [torch.zeros(1, dtype=torch.float64)] * missing + losses

    def _split(self, source: _Layer, layout: LatentLayout) -> _Split:
        if source.mixtures is None:
            return self._own_pairs(source, layout)
        return self._mixed(source, [self._chosen(one, layout) for one in source.mixtures], layout)

    def _own_pairs(self, source: _Layer, layout: LatentLayout) -> _Split:
        """Each head rotates pairs of its own: rows are moved, and of queries mapped."""
        weights, d, r = source.weights, layout.head_dim, layout.qk_rope_head_dim
        pairs = self._pairs(source, layout)
        order = head_row_order(pairs, d).to(self.device)

        def queries(rows: torch.Tensor) -> torch.Tensor:
            if source.query_map is not None and r < d:
                rows = apply_query_map(rows.unflatten(0, (-1, d)), source.query_map, pairs).flatten(0, 1)
            return ordered_heads(rows, order).reshape_as(rows)

        def keys(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            heads = ordered_heads(rows, order)[:, 0]  # [G, d, ...]
            return heads[:, :r].flatten(0, 1), heads[:, r:].flatten(0, 1)

        k_rope, k_nope = keys(weights["k_proj.weight"])
        biases = keys(weights["k_proj.bias"]) if "k_proj.bias" in weights else None
        unrotated = torch.eye(d, dtype=torch.float64, device=self.device)[order[:, r:]]
        norms = {}
        if "q_norm.weight" in weights:
            # A head's root mean square does not depend on the order of its dims; the norms' weights follow them.
            norms = {name: weights[name].to(torch.float64)[order] for name in ("q_norm.weight", "k_norm.weight")}
            # Here, as the norm would undo a map of the queries before it.
            norms["q_norm.weight"][:, r:] *= source.unrotated_scale
        return _Split(pairs, k_rope, k_nope, biases, queries, unrotated, norms)

    def _mixed(self, source: _Layer, mixtures: list[Mixtures], layout: LatentLayout) -> _Split:
        """Each rotated key, of one head or of all, is made of mixtures of its heads' keys; and each head has its own
        best dims of the rest. mixtures: R."""
        assert source.statistics is not None and self.statistics is not None
        weights, d = source.weights, layout.head_dim
        moment = source.statistics.input_moment / self.statistics.tokens

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.to(torch.float64).unflatten(0, (-1, d))

        def keys(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """[R r, ...] rotated, and what is left, [G, d, ...]."""
            parts = [
                split_keys(part, its) for part, its in zip(heads(rows).chunk(len(mixtures)), mixtures, strict=True)
            ]
            return torch.cat([part.rotated for part in parts]), torch.cat([part.left for part in parts])

        def mapped(rows: torch.Tensor) -> torch.Tensor:
            none = torch.empty(layout.num_key_value_heads, 0, dtype=torch.int64)
            return rows if source.query_map is None else apply_query_map(rows, source.query_map, none)

        k_rope, left = keys(weights["k_proj.weight"])
        for_queries, for_keys = best_dims(
            mapped(heads(weights["q_proj.weight"])), left, moment, layout.qk_nope_head_dim
        )

        def queries(rows: torch.Tensor) -> torch.Tensor:
            whole = heads(rows)
            parts = zip(whole.chunk(len(mixtures)), mixtures, strict=True)
            rotated = torch.cat([rotated_queries(part, its) for part, its in parts])
            of_groups = mapped(whole).unflatten(0, (layout.num_key_value_heads, -1))
            own = torch.einsum("gnd,gid...->gin...", for_queries, of_groups).flatten(0, 1)
            return torch.cat((rotated, own), 1).flatten(0, 1)

        biases = None
        if "k_proj.bias" in weights:
            rotated, rest = keys(weights["k_proj.bias"])
            biases = rotated, torch.einsum("gnd,gd->gn", for_keys, rest).flatten()
        pairs = torch.stack([its.pairs for its in mixtures]).cpu()
        k_nope = (for_keys @ left).flatten(0, 1)
        # Norms stand between a head's keys and their rotation: with them no mixture can be rotated.
        return _Split(pairs, k_rope, k_nope, biases, queries, for_queries, norms={})

    def _chosen(self, mixtures: KeyMixtures, layout: LatentLayout) -> Mixtures:
        """The mixtures that are rotated, as the strategy chooses them."""
        r = layout.qk_rope_head_dim
        if self.mla.partial_rope.strategy == "activation":
            return mixtures.best(r // 2)
        (pairs,) = kept_pairs(self.mla.partial_rope, r, 1, layout.head_dim, None)
        return mixtures.of_frequencies(pairs)

    def _read_layer(self, layer: int) -> _Layer:
        prefix, rope = f"model.layers.{layer}.self_attn.", self.mla.partial_rope
        names = self.original.attention_shapes(layer)
        weights = {name: self.reader[prefix + name].to(self.device) for name in names}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise UserError(f"{self.reader.folder}: {prefix}{name} has values that are not finite")
        scores = None if self.scores is None else self.scores[layer]
        scale = 1.0 if layer in self.original.no_rope_layers else self.attention_factor**2
        unfitted = scaling_map(scale, self.original.num_attention_heads, self.original.head_dim // 2)
        query_map = None if scale == 1 or self.original.qk_norm else unfitted
        if self.statistics is None:
            return _Layer(weights, None, scores, query_map, scale, None, None)
        statistics, tokens = self.statistics.layer(layer, self.device), self.statistics.tokens
        rotates = layer not in self.original.no_rope_layers
        if rope.query_map and rotates:
            # Fitted to the effects on the loss; pairs are ranked by their effects on the attention weights (both are
            # the better choice on the real model: docs/conversion.md).
            query_map = fit_query_map(statistics.loss_moments)
        moments = statistics.score_moments / tokens
        best = fit_query_map(moments) if rope.query_map else unfitted.to(moments)
        # Where the original rotates nothing, no rotation is lost.
        losses = per_group(pair_losses(moments, best), self.original.num_key_value_heads) * rotates
        if rope.strategy == "activation":
            scores = losses
        columns = make_columns(self.mla.low_rank.objective, statistics, tokens, self.mla.low_rank.damping)
        mixtures = None

        if rope.mixed:
            keys = weights["k_proj.weight"].to(torch.float64).unflatten(0, (-1, self.original.head_dim))
            turned = rotations(losses, statistics.substitution_moments / tokens, fitted=bool(rope.query_map))
            count = 1 if rope.shared else self.original.num_key_value_heads
            mixtures = [
                KeyMixtures(part, statistics.input_moment / tokens, its)
                for part, its in zip(keys.chunk(count), turned.chunk(count), strict=True)
            ]
        return _Layer(weights, statistics, scores, query_map, scale, columns, mixtures)

    def _pairs(self, source: _Layer, layout: LatentLayout) -> torch.Tensor:
        return kept_pairs(
            self.mla.partial_rope,
            layout.qk_rope_head_dim,
            layout.num_key_value_heads,
            layout.head_dim,
            None if source.scores is None else source.scores.cpu(),
        )

    def _metric(self, source: _Layer, split: _Split) -> Metric:
        """The objective over the rows [K_nope; V]."""
        low_rank = self.mla.low_rank
        if source.statistics is None or self.statistics is None or low_rank.objective == "weights":
            return IDENTITY
        query_map = source.query_map
        if query_map is None:
            query_map = identity_map(source.statistics.loss_moments)
        rows = make_rows(
            low_rank.objective, source.statistics, self.statistics.tokens, query_map, split.unrotated, low_rank.damping
        )
        return Metric(rows, source.columns)

    def _factor(
        self, k_nope: torch.Tensor, v: torch.Tensor, layout: LatentLayout, metric: Metric
    ) -> dict[str, torch.Tensor]:
        """kv_down_proj, k_up_proj and v_up_proj of the layer's method, those that it has."""
        if layout.kv_down_dim == 0:
            return {}
        factors, downs = {}, []
        for names, rows, its_metric in _parts(k_nope, v, layout, metric):
            singular_values, rank = self.mla.low_rank.singular_values, layout.value_rank
            if names == ("k_up_proj",):
                rank = layout.key_rank
            if len(names) == 2 and layout.key_rank < rank:
                up, down = factorise_nested(rows, layout.nope_dim, rank, layout.key_rank, singular_values, its_metric)
            else:
                up, down = factorise(rows, rank, singular_values, its_metric)
            parts = up.split([layout.nope_dim if name == "k_up_proj" else layout.value_dim for name in names])
            factors.update({f"{name}.weight": part for name, part in zip(names, parts, strict=True)})
            if layout.factors_key:
                factors["k_up_proj.weight"] = factors["k_up_proj.weight"][:, : layout.key_rank].contiguous()
            downs.append(down)
        return {**factors, "kv_down_proj.weight": torch.cat(downs)} if downs else {}


def _parts(
    k_nope: torch.Tensor, v: torch.Tensor, layout: LatentLayout, metric: Metric
) -> list[tuple[tuple[str, ...], torch.Tensor, Metric]]:
    """What the layer's method factors, each with the names of its up-projections, its rows and their metric."""
    keys, values = layout.factors_key, layout.factors_value
    if layout.method == "joint":
        names = ("k_up_proj", "v_up_proj") if keys else ("v_up_proj",)
        return [(names, torch.cat((k_nope, v)), metric)]
    parts: list[tuple[tuple[str, ...], torch.Tensor, Metric]] = []
    if keys:
        parts.append((("k_up_proj",), k_nope, metric.select(slice(0, layout.nope_dim))))
    if values:
        parts.append((("v_up_proj",), v, metric.select(slice(layout.nope_dim, layout.nope_dim + layout.value_dim))))
    return parts


def _relative_errors(
    k: torch.Tensor, v: torch.Tensor, k_nope: torch.Tensor, factors: dict[str, torch.Tensor], layout: LatentLayout
) -> dict[str, float]:
    """||W - up down|| / ||W|| over all rows of K (rotated ones are exact) and of V."""
    errors = {"key_error": 0.0, "value_error": 0.0}
    if layout.factors_key:
        product = factors["k_up_proj.weight"] @ factors["kv_down_proj.weight"][: layout.key_rank]
        errors["key_error"] = _relative(k_nope - product, k)
    if layout.factors_value:
        down = factors["kv_down_proj.weight"][layout.kv_down_dim - layout.value_rank :]
        product = factors["v_up_proj.weight"] @ down
        errors["value_error"] = _relative(v - product, v)
    return errors


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """||difference|| / ||whole||; 0 of nothing, as of a layer that was pruned away."""
    norm = whole.to(torch.float64).norm().item()
    return difference.norm().item() / norm if norm else 0.0
