"""What a conversion is: which rotations are kept and how keys and values are factored (paper arXiv 2502.14837)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.hf.layout_mha2mla import LOW_RANK_METHODS, LatentLayout, layer_value

ROPE_STRATEGIES = ("full", "high", "low", "uniform", "ends", "2-norm", "activation")
SCORED_STRATEGIES = ("2-norm", "activation")
MIXED_STRATEGIES = ("activation", "high", "low", "uniform", "ends")
"""With which all heads can share one rotated key: the frequencies are chosen, or given, once for all of them."""
OBJECTIVES = ("weights", "inputs", "balanced", "outputs", "tempered")
BEST_OBJECTIVE = "tempered"
"""What `auto` stands for where there are statistics: the best measured one (docs/conversion.md)."""
SINGULAR_VALUES = ("up", "sqrt")


@dataclass(frozen=True)
class PartialRopeConfig:
    """Which of the d/2 rotary pairs of each head keep their rotation (paper section 3.1)."""

    strategy: str = "auto"
    """full (all), high (fastest), low (slowest), uniform (every d/r-th), ends (both ends), 2-norm (largest scores),
    activation (largest effect on the attention weights). auto: activation where there are statistics, else uniform."""

    qk_rope_head_dim: Any = None
    """r, rotated dims kept per head: one even number or a list with one per layer. None: d for full, else d/8; where
    they are shared G d/8, at most d/2."""

    uniform_start: int = 0
    """uniform: the first pair kept; below the step d/r."""

    ends_high_pairs: int | None = None
    """ends: how many of the r/2 pairs are taken from the fast end. None: half of them, rounded up."""

    scores: str | None = None
    """activation: the file of tools/calibrate.py. 2-norm: that file, or a safetensors file of float scores
    [L, G, d/2], or the original project's qk_tensor_*.pth of ranks."""

    shared: bool | None = None
    """One rotated key for all heads, of the mixtures of heads and neighbouring frequencies whose rotation matters most
    (strategy activation; of high, low, uniform and ends one of each frequency), instead of one for each key/value head.
    None: true where a cache budget of at most half of the original cache chooses r, and several query heads share each
    of several key/value heads (GQA) without norms; else false."""

    mixed: bool | None = None
    """Each rotated key is made of mixtures of its head's pairs of neighbouring frequencies (strategies as of shared,
    whose keys are always mixed), instead of pairs as they are. None: false but where they are shared."""

    qk_nope_head_dim: int | None = None
    """Where rotated keys are mixtures: how many dims of each head are not rotated, at most d; of what mixtures leave of
    a head's keys those that matter most. All d lose nothing, at the price of query and key heads of r + d dims; the
    cache is the same. None: d - r, and never fewer."""

    query_map: bool | None = None
    """Fold the least-squares stand-in for each lost rotation into the queries (needs statistics). None: true for
    activation and where rotated keys are mixed, false for the others."""

    def __post_init__(self) -> None:
        require_one_of("partial_rope.strategy", self.strategy, ("auto", *ROPE_STRATEGIES))
        _numbers("partial_rope.qk_rope_head_dim", self.qk_rope_head_dim, minimum=0, even=True)
        if self.qk_nope_head_dim is not None:
            require_at_least("partial_rope.qk_nope_head_dim", self.qk_nope_head_dim, 1)
        if self.uniform_start < 0:
            raise UserError(f"partial_rope.uniform_start: {self.uniform_start} is negative")
        if self.ends_high_pairs is not None and self.ends_high_pairs < 0:
            raise UserError(f"partial_rope.ends_high_pairs: {self.ends_high_pairs} is negative")

    @property
    def chosen_strategy(self) -> str:
        """`strategy`, but what auto stands for."""
        best = "uniform" if self.scores is None else "activation"
        return best if self.strategy == "auto" else self.strategy

    def usual_rope_dim(self, num_key_value_heads: int, head_dim: int) -> int:
        """The paper's r = d/8; of shared keys what all heads have together then, at most d/2."""
        r = head_dim // 16 * 2
        return min(num_key_value_heads * r, head_dim // 4 * 2) if self.shared else r

    def layout(
        self, heads: tuple[int, int, int, int], r: int, method: str, c: int | None, k: int | None
    ) -> LatentLayout:
        """A layer's shapes at this r and these ranks. heads: h, H, G, d."""
        return LatentLayout(*heads, r, method, c, k, bool(self.shared), self.qk_nope_head_dim or 0)

    def resolve(self, num_key_value_heads: int, head_dim: int) -> PartialRopeConfig:
        """The same with nothing left open for heads of this number and size."""
        strategy, r = self.chosen_strategy, self.qk_rope_head_dim
        if strategy in SCORED_STRATEGIES and self.scores is None:
            raise UserError(f"partial_rope.strategy={strategy} needs partial_rope.scores=FILE")
        if self.shared and self.mixed is False:
            raise UserError(
                "partial_rope.mixed=false: shared keys are mixtures of the heads'; leave one of the two unset"
            )
        mixed = bool(self.shared or self.mixed)
        if mixed and (self.scores is None or strategy not in MIXED_STRATEGIES):
            key = "shared" if self.shared else "mixed"
            raise UserError(
                f"partial_rope.{key}=true needs statistics (of tools/calibrate.py) and one of the strategies "
                f"{', '.join(MIXED_STRATEGIES)}; strategy is {strategy}, scores {self.scores}"
            )
        if self.qk_nope_head_dim is not None and not mixed:
            raise UserError(
                "partial_rope.qk_nope_head_dim: of rotated keys that are mixtures; give partial_rope.shared=true or "
                "mixed=true, or leave it unset: of a head's own pairs d - r dims are left"
            )
        if self.qk_nope_head_dim is not None and self.qk_nope_head_dim > head_dim:
            raise UserError(
                f"partial_rope.qk_nope_head_dim: {self.qk_nope_head_dim} is more than the head dim {head_dim}"
            )
        if r is None:
            r = head_dim if strategy == "full" else self.usual_rope_dim(num_key_value_heads, head_dim)
        query_map = (strategy == "activation" or mixed) if self.query_map is None else self.query_map
        if query_map and self.scores is None:
            raise UserError("partial_rope.query_map=true needs partial_rope.scores=FILE (of tools/calibrate.py)")
        return dataclasses.replace(
            self, strategy=strategy, qk_rope_head_dim=r, query_map=query_map, shared=bool(self.shared), mixed=mixed
        )


@dataclass(frozen=True)
class LowRankConfig:
    """How the unrotated keys and the values are factored (paper section 3.2)."""

    method: str = "auto"
    """joint (one latent for both), split (one each), key or value (only that one), none (partial RoPE alone); auto is
    joint where a rank is given, else none."""

    kv_lora_rank: Any = None
    """c, total latent width: one number or a list with one per layer. split has a latent of this width twice, or, with
    k_lora_rank, for the values alone."""

    k_lora_rank: Any = None
    """How many columns keys are made of, which need less than values: of joint the first ones of the latent, of split
    the width of their own; one number or a list with one per layer. null: as many as values."""

    d_kv: Any = None
    """The paper's name for c / G, latent width per kv head; given instead of kv_lora_rank, never with it."""

    singular_values: str = "up"
    """up (all in the up-projection, as the authors' code) or sqrt (half in each, as the paper writes)."""

    objective: str = "auto"
    """What the factors are the best in: weights (plain SVD, the paper), inputs (whitened by what flows in), balanced
    (also by what comes of it, one number for keys and one for values), outputs (a matrix for all of them), tempered
    (half way from that to inputs). auto: tempered where there are statistics, else weights."""

    statistics: str | None = None
    """The file of tools/calibrate.py, for every objective but weights."""

    damping: float = 1e-5
    """Added to the diagonal of each second moment, as a fraction of its mean: a floor for directions never seen."""

    def __post_init__(self) -> None:
        require_one_of("low_rank.method", self.method, ("auto", *LOW_RANK_METHODS))
        require_one_of("low_rank.singular_values", self.singular_values, SINGULAR_VALUES)
        require_one_of("low_rank.objective", self.objective, ("auto", *OBJECTIVES))
        if not 0 < self.damping <= 1:
            raise UserError(f"low_rank.damping: {self.damping} is not above 0 and at most 1")
        _numbers("low_rank.kv_lora_rank", self.kv_lora_rank, minimum=1)
        _numbers("low_rank.k_lora_rank", self.k_lora_rank, minimum=0)
        _numbers("low_rank.d_kv", self.d_kv, minimum=1)
        if self.kv_lora_rank is not None and self.d_kv is not None:
            raise UserError("low_rank.kv_lora_rank and low_rank.d_kv are both set; give one (kv_lora_rank = d_kv * G)")

    @property
    def has_rank(self) -> bool:
        return self.kv_lora_rank is not None or self.d_kv is not None

    @property
    def chosen_method(self) -> str:
        """`method`, but what auto stands for."""
        best = "joint" if self.has_rank else "none"
        return best if self.method == "auto" else self.method

    @property
    def chosen_objective(self) -> str:
        """`objective`, but what auto stands for."""
        best = "weights" if self.statistics is None else BEST_OBJECTIVE
        return best if self.objective == "auto" else self.objective

    def resolve(self, num_key_value_heads: int) -> LowRankConfig:
        """The same with nothing left open: the rank as `kv_lora_rank`, no `auto`."""
        method, c, objective = self.chosen_method, self.kv_lora_rank, self.chosen_objective
        if method == "none" and self.has_rank:
            raise UserError("low_rank.method=none factors nothing: leave low_rank.kv_lora_rank and low_rank.d_kv unset")
        if self.k_lora_rank is not None and method not in ("joint", "split"):
            raise UserError(f"low_rank.k_lora_rank: of low_rank.method joint and split, which is {method}")
        if method != "none" and not self.has_rank:
            raise UserError(
                f"low_rank.method={method} needs low_rank.kv_lora_rank (total) or low_rank.d_kv, or a cache_budget"
            )
        if objective != "weights" and self.statistics is None:
            raise UserError(f"low_rank.objective={objective} needs low_rank.statistics=FILE (of tools/calibrate.py)")
        if self.d_kv is not None:
            d_kv = self.d_kv
            c = d_kv * num_key_value_heads if isinstance(d_kv, int) else [n * num_key_value_heads for n in d_kv]
        return dataclasses.replace(self, method=method, kv_lora_rank=c, d_kv=None, objective=objective)


@dataclass(frozen=True)
class MHA2MLAConfig:
    """The whole conversion. Written into the exported config.json (resolved for its model) and every checkpoint."""

    partial_rope: PartialRopeConfig = field(default_factory=PartialRopeConfig)
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    def resolve(
        self,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        no_rope_layers: tuple[int, ...] = (),
    ) -> MHA2MLAConfig:
        """The same conversion with nothing left open for a model of these shapes: r filled in, d_kv as kv_lora_rank.

        no_rope_layers: layers, from 0, that rotate nothing in the original; their r is 0, whatever the strategy.
        Raises UserError for lists of another length than L and for an r or c that the model cannot have.
        """
        rope = self.partial_rope.resolve(num_key_value_heads, head_dim)
        low_rank = self.low_rank.resolve(num_key_value_heads)
        if no_rope_layers and isinstance(rope.qk_rope_head_dim, int):
            dims = [0 if layer in no_rope_layers else rope.qk_rope_head_dim for layer in range(num_layers)]
            rope = dataclasses.replace(rope, qk_rope_head_dim=dims)
        resolved = MHA2MLAConfig(rope, low_rank)
        for key, value in (
            ("partial_rope.qk_rope_head_dim", rope.qk_rope_head_dim),
            ("low_rank.kv_lora_rank", low_rank.kv_lora_rank),
            ("low_rank.k_lora_rank", low_rank.k_lora_rank),
        ):
            if isinstance(value, list) and len(value) != num_layers:
                raise UserError(f"{key}: a list of {len(value)}, but the model has {num_layers} layers; give one each")
        for layer in range(num_layers):
            _check_layer(
                resolved,
                resolved.layout(layer, hidden_size, num_attention_heads, num_key_value_heads, head_dim),
                layer,
                layer not in no_rope_layers,
            )
        return resolved

    def layout(
        self, layer: int, hidden_size: int, num_attention_heads: int, num_key_value_heads: int, head_dim: int
    ) -> LatentLayout:
        """One layer's shapes, from a resolved config."""
        r = layer_value(self.partial_rope.qk_rope_head_dim, layer)
        assert r is not None, "the config is not resolved"
        c, k = (layer_value(rank, layer) for rank in (self.low_rank.kv_lora_rank, self.low_rank.k_lora_rank))
        heads = hidden_size, num_attention_heads, num_key_value_heads, head_dim
        return self.partial_rope.layout(heads, r, self.low_rank.method, c, k)


def config_from_dict(values: dict[str, Any], source: str) -> MHA2MLAConfig:
    """The config that `dataclasses.asdict` wrote; `source` is named in the UserError where it is none."""
    try:
        return MHA2MLAConfig(PartialRopeConfig(**values["partial_rope"]), LowRankConfig(**values["low_rank"]))
    except (TypeError, KeyError) as error:
        raise UserError(f"{source}: not an MHA2MLA config ({error})") from None


def describe_conversion(values: dict[str, Any]) -> str:
    """The settings that decide shapes, of `dataclasses.asdict` of a resolved MHA2MLAConfig."""
    low_rank = values["low_rank"]
    rope = values["partial_rope"]
    numbers = {
        **{key: rope.get(key) for key in ("qk_rope_head_dim", "qk_nope_head_dim")},
        **{key: low_rank.get(key) for key in ("kv_lora_rank", "k_lora_rank")},
    }
    words = [f"{key} {_same(value)}" for key, value in numbers.items() if value is not None]
    return ", ".join((low_rank["method"], *words))


def _same(values: Any) -> Any:
    """One number for layers that all have it."""
    return values[0] if isinstance(values, list | tuple) and len(set(values)) == 1 else values


def _check_layer(config: MHA2MLAConfig, layout: LatentLayout, layer: int, rotates: bool) -> None:
    rope, r, d = config.partial_rope, layout.qk_rope_head_dim, layout.head_dim
    where = f" (layer {layer})" if isinstance(rope.qk_rope_head_dim, list) else ""
    if r > d:
        raise UserError(f"partial_rope.qk_rope_head_dim: {r} is more than the head dim {d}{where}")
    if not rotates and r > 0:
        raise UserError(f"partial_rope.qk_rope_head_dim: {r}, but the model rotates nothing in layer {layer}; give 0")
    if rope.strategy == "full" and rotates and r != d:
        raise UserError(f"partial_rope.strategy=full keeps all {d} dims, but qk_rope_head_dim is {r}{where}")
    if rope.strategy == "uniform" and r > 0 and rope.uniform_start + (r // 2 - 1) * d // r >= d // 2:
        raise UserError(
            f"partial_rope.uniform_start: {rope.uniform_start} is too large; "
            f"with r = {r} of {d} it can be 0 to {d // 2 - 1 - (r // 2 - 1) * d // r}{where}"
        )
    if rope.strategy == "ends" and rope.ends_high_pairs is not None and rope.ends_high_pairs > r // 2:
        raise UserError(f"partial_rope.ends_high_pairs: {rope.ends_high_pairs} of only {r // 2} kept pairs{where}")
    limit, c = layout.kv_lora_rank_limit, layout.kv_lora_rank
    if limit is not None and c is not None and c > limit:
        raise UserError(
            f"low_rank.kv_lora_rank: {c} is more than the rank {limit} of what {layout.method} factors in layer {layer}"
        )
    limit, k = layout.k_lora_rank_limit, layout.k_lora_rank
    if k is not None and layout.factors_key and not 1 <= k <= limit:
        raise UserError(f"low_rank.k_lora_rank: {k} in layer {layer}; valid there: 1 to {limit}")


def _numbers(key: str, value: Any, minimum: int, even: bool = False) -> None:
    """Refuse anything but None, an int or a list of ints, each at least `minimum` (and even)."""
    if value is None:
        return
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int) or isinstance(number, bool):
            raise UserError(f"{key}: {number!r} is not a whole number; give one number or a list with one per layer")
        require_at_least(key, number, minimum)
        if even and number % 2:
            raise UserError(f"{key}: {number} is odd; rotary dims come in pairs, so it must be even")
