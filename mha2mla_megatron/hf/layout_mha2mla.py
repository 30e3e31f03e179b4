"""What one converted attention layer is made of: its projections, their shapes and what it caches.

Shape letters: h hidden size, H query heads, G key/value heads, d head dim, r rotary dims kept per head, n other dims of
a query or key head, c latent width, R heads of rotated keys: G, or 1 that all share.
The Hugging Face model, the Megatron model and the converters all read a layer's parts from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

LOW_RANK_METHODS = ("joint", "split", "key", "value", "none")

MAX_DIMENSION = 1 << 24
"""No real model has a dimension near this; a config that says so is damaged."""

MAX_LAYERS = 1 << 14
"""Far more than any model has, and few enough to list their tensors."""


@dataclass(frozen=True)
class LatentLayout:
    """One layer's shapes.

    `method` says what is factored: `joint` (keys and values share one latent of width c), `split` (a latent each),
    `key` or `value` (only that one), `none` (partial RoPE alone). k_lora_rank: how many columns keys are made of, of
    joint the first ones of the latent, of split the width of their own; None: c. shared_rope: whether all heads
    have one rotated key. least_nope_head_dim: dims of a key head that are not rotated, if these are more than d - r.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qk_rope_head_dim: int
    method: str
    kv_lora_rank: int | None
    k_lora_rank: int | None = None
    shared_rope: bool = False
    least_nope_head_dim: int = 0

    @property
    def qk_nope_head_dim(self) -> int:
        """n: the dims of a query or key head that are not rotated; d - r unless more were asked for."""
        return max(self.head_dim - self.qk_rope_head_dim, self.least_nope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        """r + n: dims of a query or key head; those of a value head are d."""
        return self.qk_rope_head_dim + self.qk_nope_head_dim

    @property
    def nope_dim(self) -> int:
        """G n: rows of K_nope."""
        return self.num_key_value_heads * self.qk_nope_head_dim

    @property
    def value_dim(self) -> int:
        """G d: rows of V."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rope_heads(self) -> int:
        """R: heads of rotated keys."""
        return 1 if self.shared_rope else self.num_key_value_heads

    @property
    def rope_dim(self) -> int:
        """R r: rows of the rotated keys."""
        return self.rope_heads * self.qk_rope_head_dim

    @property
    def factors_key(self) -> bool:
        """Whether K_nope comes from a latent. A layer that rotates every dim (n = 0) has no K_nope."""
        return self.nope_dim > 0 and self.method in ("joint", "split", "key")

    @property
    def factors_value(self) -> bool:
        return self.method in ("joint", "split", "value")

    @property
    def key_rank(self) -> int:
        """Columns of the latents that keys are made of, the first ones; 0 where they are not factored."""
        if not self.factors_key:
            return 0
        return (self.kv_lora_rank if self.k_lora_rank is None else self.k_lora_rank) or 0

    @property
    def value_rank(self) -> int:
        """Columns of the latents that values are made of, the last ones; 0 where they are not factored."""
        return (self.kv_lora_rank or 0) if self.factors_value else 0

    @property
    def kv_down_dim(self) -> int:
        """Width of all latents together; the keys' comes first."""
        return self.value_rank if self.method == "joint" else self.key_rank + self.value_rank

    @property
    def kv_lora_rank_limit(self) -> int | None:
        """The largest useful c: the rank of the smallest matrix that has it; None where nothing is factored."""
        if self.method == "joint":
            return min(self.hidden_size, self.nope_dim + self.value_dim)
        keys = self.factors_key and self.k_lora_rank is None
        rows = [n for n, used in ((self.nope_dim, keys), (self.value_dim, self.factors_value)) if used]
        return min(self.hidden_size, *rows) if rows else None

    @property
    def k_lora_rank_limit(self) -> int:
        """The largest k_lora_rank; 0 where there are no keys to factor."""
        limit = min(self.hidden_size, self.nope_dim)
        return min(limit, self.value_rank) if self.method == "joint" else limit

    @property
    def cache_parts(self) -> tuple[int, int, int]:
        """Widths of the unrotated part of the cache, in this order: latents, full-rank K_nope, full-rank V."""
        nope = 0 if self.factors_key else self.nope_dim
        value = 0 if self.factors_value else self.value_dim
        return self.kv_down_dim, nope, value

    @property
    def key_columns(self) -> slice:
        """Columns of the unrotated part that the absorbed form scores: the keys' latent, or full-rank K_nope."""
        start = 0 if self.factors_key else self.kv_down_dim
        return slice(start, start + (self.key_rank if self.factors_key else self.nope_dim))

    @property
    def value_columns(self) -> slice:
        """Columns of the unrotated part that the absorbed form averages: the values' latent, or full-rank V."""
        stop = self.kv_down_dim if self.factors_value else sum(self.cache_parts)
        return slice(stop - (self.value_rank if self.factors_value else self.value_dim), stop)

    @property
    def cache_elements(self) -> int:
        """Cached numbers per token: R r + c (joint), R r and both latents (split), R r + G n + G d (none)."""
        return self.rope_dim + sum(self.cache_parts)

    def check(self) -> None:
        """Raise ValueError, in one line, for shapes that no model has. Settings get friendlier checks when converting;
        this one is for a config.json that anybody may have written."""
        sizes = {"hidden_size": self.hidden_size, "num_attention_heads": self.num_attention_heads,
                 "num_key_value_heads": self.num_key_value_heads, "head_dim": self.head_dim}  # fmt: skip
        for name, size in sizes.items():
            if not is_whole(size) or not 0 < size <= MAX_DIMENSION:
                raise ValueError(f"{name}: {size!r} is not a number from 1 to {MAX_DIMENSION}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        r, c = self.qk_rope_head_dim, self.kv_lora_rank
        if not is_whole(r) or r % 2 or not 0 <= r <= self.head_dim:
            raise ValueError(f"qk_rope_head_dim: {r!r} is not an even number from 0 to head_dim {self.head_dim}")
        n = self.least_nope_head_dim
        if not is_whole(n) or not 0 <= n <= self.head_dim:
            raise ValueError(f"partial_rope.qk_nope_head_dim: {n!r} is not a number from 0 to head_dim {self.head_dim}")
        if not isinstance(self.shared_rope, bool):
            raise ValueError(f"partial_rope.shared: {self.shared_rope!r} is not true or false")
        if self.method not in LOW_RANK_METHODS:
            raise ValueError(f"low_rank.method: {self.method!r} is not one of {', '.join(LOW_RANK_METHODS)}")
        k = self.k_lora_rank
        if k is not None and self.method not in ("joint", "split"):
            raise ValueError(f"k_lora_rank: {k!r}, but low_rank.method is {self.method}, not joint or split")
        if self.method == "none":
            if c is not None:
                raise ValueError(f"kv_lora_rank: {c!r}, but low_rank.method is none")
            return
        limit = self.kv_lora_rank_limit
        if not is_whole(c) or c < 1 or (limit is not None and c > limit):
            raise ValueError(f"kv_lora_rank: {c!r} is not a number from 1 to the rank {limit} of what is factored")
        if k is not None and self.factors_key and not (is_whole(k) and 1 <= k <= self.k_lora_rank_limit):
            raise ValueError(f"k_lora_rank: {k!r} is not a number from 1 to the keys' rank {self.k_lora_rank_limit}")

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> weight shape [out, in] of every projection that this layer has, in Hugging Face names."""
        shapes = {
            "q_proj": (self.num_attention_heads * self.qk_head_dim, self.hidden_size),
            "k_rope_proj": (self.rope_dim, self.hidden_size),
            "kv_down_proj": (self.kv_down_dim, self.hidden_size),
            "k_up_proj": (self.nope_dim, self.key_rank) if self.factors_key else (0, 0),
            "k_nope_proj": (0 if self.factors_key else self.nope_dim, self.hidden_size),
            "v_up_proj": (self.value_dim, self.value_rank) if self.factors_value else (0, 0),
            "v_proj": (0 if self.factors_value else self.value_dim, self.hidden_size),
            "o_proj": (self.hidden_size, self.num_attention_heads * self.head_dim),
        }
        return {name: shape for name, shape in shapes.items() if shape[0] > 0}


def biased_projections(qk_norm: bool) -> frozenset[str]:
    """Projections that carry the model's q/k/v biases; latents never have one.

    One on k_nope would add a single number to all scores of a query, which softmax ignores, so there is none, unless a
    norm on keys comes between.
    """
    return frozenset(("q_proj", "k_rope_proj", "v_proj", "v_up_proj", *(("k_nope_proj",) if qk_norm else ())))


def layer_value(value: int | list[int] | tuple[int, ...] | None, layer: int) -> int | None:
    """A setting that is one number for all layers or a list with one per layer."""
    return value[layer] if isinstance(value, list | tuple) else value


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
