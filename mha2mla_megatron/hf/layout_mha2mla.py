"""What one converted attention layer is made of: its projections, their shapes and what it caches.

Shape letters: h hidden size, H query heads, G key/value heads, d head dim, r rotary dims kept per head, c latent width.
The Hugging Face model, the Megatron model and the converters all read a layer's parts from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOW_RANK_METHODS = ("joint", "split", "key", "value", "none")
BIASED_PROJECTIONS = frozenset(("q_proj", "k_rope_proj", "v_proj", "v_up_proj"))
"""Projections that carry the model's q/k/v biases. One on k_nope would add a single number to all scores of a query,
which softmax ignores, so there is none; latents never have one."""


@dataclass(frozen=True)
class LatentLayout:
    """One layer's shapes.

    `method` says what is factored: `joint` (keys and values share one latent of width c), `split` (a latent of width c
    each), `key` or `value` (only that one), `none` (partial RoPE alone).
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qk_rope_head_dim: int
    method: str
    kv_lora_rank: int | None

    @property
    def qk_nope_head_dim(self) -> int:
        """d - r: the dims of a key head that lost their rotation."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def nope_dim(self) -> int:
        """G (d - r): rows of K_nope."""
        return self.num_key_value_heads * self.qk_nope_head_dim

    @property
    def value_dim(self) -> int:
        """G d: rows of V."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """G r: rows of the rotated keys."""
        return self.num_key_value_heads * self.qk_rope_head_dim

    @property
    def factors_key(self) -> bool:
        """Whether K_nope comes from a latent. A layer that rotates every dim (r = d) has no K_nope."""
        return self.nope_dim > 0 and self.method in ("joint", "split", "key")

    @property
    def factors_value(self) -> bool:
        return self.method in ("joint", "split", "value")

    @property
    def kv_down_dim(self) -> int:
        """Width of all latents together: c, or 2c where keys and values have one each."""
        if self.kv_lora_rank is None:
            return 0
        latents = self.factors_key + self.factors_value
        return self.kv_lora_rank * (1 if self.method == "joint" else latents)

    @property
    def kv_lora_rank_limit(self) -> int | None:
        """The largest useful c: the rank of the smallest matrix that is factored; None where nothing is."""
        if self.method == "joint":
            return min(self.hidden_size, self.nope_dim + self.value_dim)
        rows = [n for n, used in ((self.nope_dim, self.factors_key), (self.value_dim, self.factors_value)) if used]
        return min(self.hidden_size, *rows) if rows else None

    @property
    def cache_parts(self) -> tuple[int, int, int]:
        """Widths of the unrotated part of the cache, in this order: latents, full-rank K_nope, full-rank V."""
        nope = 0 if self.factors_key else self.nope_dim
        value = 0 if self.factors_value else self.value_dim
        return self.kv_down_dim, nope, value

    @property
    def cache_elements(self) -> int:
        """Cached numbers per token: G r + c (joint), G r + 2c (split), 2 G d (none)."""
        return self.rope_dim + sum(self.cache_parts)

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> weight shape [out, in] of every projection that this layer has, in Hugging Face names."""
        c = self.kv_lora_rank or 0
        shapes = {
            "q_proj": (self.num_attention_heads * self.head_dim, self.hidden_size),
            "k_rope_proj": (self.rope_dim, self.hidden_size),
            "kv_down_proj": (self.kv_down_dim, self.hidden_size),
            "k_up_proj": (self.nope_dim, c) if self.factors_key else (0, 0),
            "k_nope_proj": (0 if self.factors_key else self.nope_dim, self.hidden_size),
            "v_up_proj": (self.value_dim, c) if self.factors_value else (0, 0),
            "v_proj": (0 if self.factors_value else self.value_dim, self.hidden_size),
            "o_proj": (self.hidden_size, self.num_attention_heads * self.head_dim),
        }
        return {name: shape for name, shape in shapes.items() if shape[0] > 0}


def layer_value(value: int | Sequence[int] | None, layer: int) -> int | None:
    """A setting that is one number for all layers or a list with one per layer."""
    return value if value is None or isinstance(value, int) else value[layer]
