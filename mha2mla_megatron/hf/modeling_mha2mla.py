"""A Llama-like model with multi-head latent attention and partial RoPE, for plain transformers.

Shape letters: b batch, s new tokens, t tokens including the cached ones, H query heads, G key/value heads, d head dim,
r rotated dims per head, R heads of rotated keys (G, or 1 that all share), w width of the unrotated part of the cache (c
for the joint method).

A layer's cache is transformers' own, of any kind: its "keys" are the unrotated part [b, 1, t, w], its "values" the
rotated keys of all R heads [b, 1, t, R r]. One head each, because a static cache allocates both with as many heads as
the keys have; and no groups apart, because the absorbed form reads a token's rotated keys as one row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3DecoderLayer,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    eager_attention_forward,
    rotate_half,
)

from .backend_cache_mha2mla import cache_settings, quantized_cache
from .configuration_mha2mla import MHA2MLALlamaConfig
from .decode_mha2mla import (
    absorbed_attention,
    absorbed_is_cheaper,
    own_group,
    packed_attention,
    reads_packed,
    spread_over_groups,
    visible_rows,
)
from .latent_cache_mha2mla import LatentQuantizedCache
from .layout_mha2mla import LatentLayout, biased_projections
from .offloaded_cache_mha2mla import OffloadedLatentCache
from .static_cache_mha2mla import StaticLatentCache, StaticLatentLayer


class MHA2MLARMSNorm(nn.Module):
    """RMSNorm over the dims of each head, with weights [G, d]: those of its key/value head for each query head, too."""

    def __init__(self, groups: int, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, head_dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, H or G, s, d] -> the same."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.repeat_interleave(x.shape[1] // len(self.weight), dim=0)
        return weight[:, None] * normed.to(x.dtype)


class MHA2MLAAttention(nn.Module):
    """Attention that caches rotated `k_rope` and latents only.

    A query or key head's rows are [r rotated | n others]; the rotated part is half-split. `rope_pairs` [R, r/2] says
    which of the model's frequencies each head of rotated keys, and the query heads that read it, turn with.
    """

    rope_pairs: torch.Tensor

    def __init__(self, config: MHA2MLALlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layout: LatentLayout = config.layout(layer_idx)
        self.head_dim = self.layout.head_dim
        self.num_key_value_groups = self.layout.num_attention_heads // self.layout.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        windowed = config.layer_types is not None and config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if windowed else None
        biased: set[str] = set(biased_projections(config.qk_norm) if config.attention_bias else ())
        if config.attention_output_bias:
            biased.add("o_proj")
        shapes = self.layout.projections()

        def projection(name: str) -> Any:
            """The projection if this layer has it (r = 0 has no k_rope, a full-rank part has no up-projection)."""
            return nn.Linear(*reversed(shapes[name]), bias=name in biased) if name in shapes else None

        self.q_proj = projection("q_proj")
        self.k_rope_proj = projection("k_rope_proj")
        self.kv_down_proj = projection("kv_down_proj")
        self.k_up_proj = projection("k_up_proj")
        self.k_nope_proj = projection("k_nope_proj")
        self.v_up_proj = projection("v_up_proj")
        self.v_proj = projection("v_proj")
        self.o_proj = projection("o_proj")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            norm = self.layout.num_key_value_heads, self.head_dim, config.rms_norm_eps
            self.q_norm, self.k_norm = MHA2MLARMSNorm(*norm), MHA2MLARMSNorm(*norm)
        if self.layout.qk_rope_head_dim > 0:
            pairs = torch.arange(self.layout.qk_rope_head_dim // 2).repeat(self.layout.rope_heads, 1)
            self.register_buffer("rope_pairs", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [b, s, h]; position_embeddings: cos and sin, each [1 or b, s, d].

        Returns ([b, s, h], attention weights or None).
        """
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, -1, self.layout.qk_head_dim).transpose(1, 2)
        if self.q_norm is not None:
            query = self.q_norm(query)
        q_rope, q_nope = query.split((self.layout.qk_rope_head_dim, self.layout.qk_nope_head_dim), dim=-1)
        k_rope, k_nope = self._key_parts(hidden_states)
        if self.k_rope_proj is not None:
            cos, sin = self._rope_tables(*position_embeddings)
            k_rope = self._split_heads(k_rope, self.layout.rope_heads)
            k_rope = (k_rope * cos + rotate_half(k_rope) * sin).transpose(1, 2).flatten(2)
            if not self.layout.shared_rope:
                cos, sin = (table.repeat_interleave(self.num_key_value_groups, dim=1) for table in (cos, sin))
            q_rope = q_rope * cos + rotate_half(q_rope) * sin
        latents, value = (p(hidden_states) if p is not None else None for p in (self.kv_down_proj, self.v_proj))
        unrotated = torch.cat([part for part in (latents, k_nope, value) if part is not None], dim=-1)
        if past_key_values is not None:
            static = isinstance(past_key_values, StaticLatentCache)
            packed: Any = past_key_values.layers[self.layer_idx] if static else None
            if packed is not None and self._reads_packed(packed, hidden_states, attention_mask):
                packed.append(unrotated, k_rope)
                output, _ = self._attend_absorbed(
                    q_rope,
                    q_nope,
                    lambda rope, key: (
                        packed_attention(rope, key, packed, self.layout, attention_mask, self.scaling),
                        None,
                    ),
                )
                return self.o_proj(output.reshape(batch, length, -1)), None
            # The unrotated part takes the place of keys: a cache reads its length there, and r = 0 leaves k_rope empty.
            cached = past_key_values.update(unrotated.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
            unrotated, k_rope = (part.squeeze(1) for part in cached)
            # A cache of full layers, such as a quantised one, holds rows that a window hides.
            hidden = self.sliding_window is not None and unrotated.shape[1] > self.sliding_window
            mask, usable = visible_rows(attention_mask, length, past_key_values.is_compileable, hidden)
            if usable and self._absorbs(hidden_states, length):
                output, weights = self._attend_absorbed(
                    q_rope,
                    q_nope,
                    lambda rope, key: absorbed_attention(
                        rope, key, k_rope, unrotated, self.layout, mask, self.scaling, kernel=self._kernel_may_run
                    ),
                )
                return self.o_proj(output.reshape(batch, length, -1)), weights

        implementation = str(self.config._attn_implementation)
        if implementation == "sdpa" and attention_mask is None and length > 1:
            # Causal from the first row on (the prefill of a static cache): the rows after the new tokens are empty.
            unrotated, k_rope = unrotated[:, :length], k_rope[:, :length]
        key, value = self._expand(unrotated, k_rope)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            torch.cat((q_rope, q_nope), dim=-1),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _key_parts(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys before rotation, normalised where the model does that: the part to rotate [b, s, R r], which is empty
        for r = 0, and full-rank K_nope [b, s, G n], None where there is none."""
        k_rope = hidden_states[..., :0] if self.k_rope_proj is None else self.k_rope_proj(hidden_states)
        k_nope = None if self.k_nope_proj is None else self.k_nope_proj(hidden_states)
        if self.k_norm is None:
            return k_rope, k_nope
        groups = self.layout.num_key_value_heads
        parts = [self._split_heads(part, groups) for part in (k_rope, k_nope) if part is not None]
        sizes = [part.shape[-1] for part in parts]
        normed = [
            part.transpose(1, 2).flatten(2) for part in self.k_norm(torch.cat(parts, dim=-1)).split(sizes, dim=-1)
        ]
        return normed[0], normed[1] if k_nope is not None else None

    def _absorbs(self, hidden_states: torch.Tensor, length: int) -> bool:
        """Whether new tokens attend in the absorbed form: as config.mla_decode says, and where it is possible.

        It reads the up-projections' weights itself, so they have to be plain ones (no adapter, quantised or offloaded
        weights), and it has no dropout. Training, or whatever needs gradients, is expanded.
        """
        choice = self.config.mla_decode
        if choice == "expanded" or self.training or hidden_states.requires_grad:
            return False
        for projection in (self.k_up_proj, self.v_up_proj):
            if projection is not None and (
                type(projection) is not nn.Linear or projection.weight.device != hidden_states.device
            ):
                return False
        return choice == "absorbed" or absorbed_is_cheaper(self.layout, length)

    @property
    def _is_eager(self) -> bool:
        """Eager attention returns probabilities, which no kernel has."""
        return self.config._attn_implementation == "eager"

    @property
    def _kernel_may_run(self) -> bool:
        return self.config.mla_kernel == "auto" and not self._is_eager

    def _reads_packed(self, layer: StaticLatentLayer, hidden_states: torch.Tensor, mask: Any) -> bool:
        """Whether the new token attends over codes, with no row of the cache dequantised in memory."""
        return (
            self._kernel_may_run
            and reads_packed(layer, hidden_states, mask)
            and self._absorbs(hidden_states, hidden_states.shape[1])
        )

    def _attend_absorbed(
        self, q_rope: torch.Tensor, q_nope: torch.Tensor, attend: Callable
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over the cached rows themselves.

        q_rope [b, H, s, r], q_nope [b, H, s, n]; attend: their absorbed forms [b, H, s, R r] and [b, H, s, k] to
        the averaged value columns [b, H, s, v], and probabilities or None. Returns the heads' outputs [b, s, H, d], and
        the probabilities for eager attention.
        """
        groups = self.layout.num_key_value_heads
        if self.k_up_proj is None:
            q_key = spread_over_groups(q_nope, groups)
        else:
            up = self.k_up_proj.weight.view(groups, self.layout.qk_nope_head_dim, -1)
            q_key = torch.einsum("bgisn,gnc->bgisc", self._by_group(q_nope), up).flatten(1, 2)
        context, probabilities = attend(spread_over_groups(q_rope, self.layout.rope_heads), q_key)
        if self.v_up_proj is None:
            value = own_group(context, groups)
        else:
            up = self.v_up_proj.weight.view(groups, self.head_dim, -1)
            value = torch.einsum("bgisc,gdc->bgisd", self._by_group(context), up)
            if self.v_up_proj.bias is not None:  # probabilities sum to 1, so a value's bias is the output's
                value = value + self.v_up_proj.bias.view(groups, 1, 1, self.head_dim)
            value = value.flatten(1, 2)
        return value.transpose(1, 2), probabilities if self._is_eager else None

    def _rope_tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's tables [., s, d] at each head's own pairs: [., R, s, r]."""

        def select(table: torch.Tensor) -> torch.Tensor:
            half = table[..., : self.head_dim // 2][..., self.rope_pairs].transpose(1, 2)  # [., R, s, r/2]
            return torch.cat((half, half), dim=-1)

        return select(cos), select(sin)

    def _expand(self, unrotated: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's keys [b, G, t, r + n] and values [b, G, t, d], from what is cached: [b, t, w] and [b, t, R r]."""
        layout = self.layout
        latents, k_nope, value = unrotated.split(layout.cache_parts, dim=-1)
        if self.k_up_proj is not None:
            k_nope = self.k_up_proj(latents[..., : layout.key_rank])
        if self.v_up_proj is not None:
            value = self.v_up_proj(latents[..., layout.kv_down_dim - layout.value_rank :])
        groups = layout.num_key_value_heads
        rotated = self._split_heads(k_rope, layout.rope_heads).expand(-1, groups, -1, -1)
        key = torch.cat((rotated, self._split_heads(k_nope, groups)), dim=-1)
        return key, self._split_heads(value, groups)

    @staticmethod
    def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
        """[b, t, heads n] -> [b, heads, t, n]."""
        return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)

    def _by_group(self, x: torch.Tensor) -> torch.Tensor:
        """[b, H, s, n] -> [b, G, H / G, s, n]."""
        return x.reshape(x.shape[0], self.layout.num_key_value_heads, self.num_key_value_groups, *x.shape[2:])


# SmolLM3's classes are Llama's with a mask for each type of layer.
class MHA2MLALlamaModel(SmolLM3Model):
    config_class = MHA2MLALlamaConfig
    _can_record_outputs = {"hidden_states": SmolLM3DecoderLayer, "attentions": MHA2MLAAttention}

    def __init__(self, config: MHA2MLALlamaConfig):
        super().__init__(config)  # type: ignore[arg-type]  # has all that is read
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MHA2MLAAttention(config, layer_idx)
        self.post_init()


class MHA2MLALlamaForCausalLM(SmolLM3ForCausalLM):
    config_class = MHA2MLALlamaConfig
    _can_record_outputs = {"hidden_states": SmolLM3DecoderLayer, "attentions": MHA2MLAAttention}
    _tp_plan = {}

    def __init__(self, config: MHA2MLALlamaConfig):
        super().__init__(config)
        self.model = MHA2MLALlamaModel(config)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """generate allocates a static cache at the first update, with the shapes that it sees there."""

    def latent_cache(self, **settings: Any) -> LatentQuantizedCache:
        """An empty quantised cache for `past_key_values`; settings: nbits and the others of LatentQuantizedCache."""
        return LatentQuantizedCache(self.config, **settings)

    def static_latent_cache(self, max_cache_len: int, **settings: Any) -> StaticLatentCache:
        """The same of fixed size, for compiled steps: room for max_cache_len tokens."""
        return StaticLatentCache(self.config, max_cache_len, **settings)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Builds the quantised and the offloaded caches of `generate` itself: transformers' quantised layers fail on
        many shapes, and know no latents."""
        own = generation_config.cache_implementation in ("quantized", "offloaded")
        own = own and generation_config.use_cache is not False
        held = model_kwargs.get("past_key_values")
        if isinstance(held, StaticLatentCache):
            held.require_room(max_cache_length)
        if own and held is not None and generation_config.is_assistant:
            return  # an assistant's own, of its guesses before; for another caller a cache beside the words is an error
        if not own or held is not None:
            prepare: Callable = super()._prepare_cache_for_generation  # type: ignore[misc]
            prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            return
        if generation_config.cache_implementation == "offloaded":
            cache: Cache = OffloadedLatentCache(self.config)
        else:
            cache = self._quantized_cache(generation_config, max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _quantized_cache(self, generation_config: Any, max_cache_length: int) -> Cache:
        settings = cache_settings(generation_config.cache_config)
        if settings.get("static"):
            # As for transformers' static cache: never shorter than before, or the compiled step would be made anew.
            lengths = max_cache_length, generation_config.max_cache_len or 0, getattr(self, "_packed_length", 0)
            settings.setdefault("max_cache_len", max(lengths))
            self._packed_length = settings["max_cache_len"]
        cache = quantized_cache(self.config, **settings)
        if isinstance(cache, StaticLatentCache):
            cache.require_room(max_cache_length)
        return cache


__all__ = ["MHA2MLALlamaForCausalLM", "MHA2MLALlamaModel"]
