"""A Llama-like model with multi-head latent attention and partial RoPE, for plain transformers.

Shape letters: b batch, s new tokens, t tokens including the cached ones, H query heads, G key/value heads, d head dim,
r rotated dims per head, w width of the unrotated part of the cache (c for the joint method).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    eager_attention_forward,
    rotate_half,
)

from .configuration_mha2mla import MHA2MLALlamaConfig
from .layout_mha2mla import BIASED_PROJECTIONS, LatentLayout


class MHA2MLAAttention(nn.Module):
    """Attention that caches rotated `k_rope` and latents only.

    A head's rows are [r rotated | d - r others]; the rotated part is half-split. `rope_pairs` [G, r/2] says which of
    the model's frequencies each key/value head, and the query heads of its group, turn with.
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
        biased: set[str] = set(BIASED_PROJECTIONS if config.attention_bias else ())
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
        if self.layout.qk_rope_head_dim > 0:
            pairs = torch.arange(self.layout.qk_rope_head_dim // 2).repeat(self.layout.num_key_value_heads, 1)
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
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k_rope = self._heads(self.k_rope_proj, hidden_states)
        if self.k_rope_proj is not None:
            cos, sin = self._rope_tables(*position_embeddings)
            k_rope = k_rope * cos + rotate_half(k_rope) * sin
            cos, sin = (table.repeat_interleave(self.num_key_value_groups, dim=1) for table in (cos, sin))
            q_rope, q_nope = query.split((self.layout.qk_rope_head_dim, self.layout.qk_nope_head_dim), dim=-1)
            query = torch.cat((q_rope * cos + rotate_half(q_rope) * sin, q_nope), dim=-1)
        unrotated = [p(hidden_states) for p in (self.kv_down_proj, self.k_nope_proj, self.v_proj) if p is not None]
        latent = torch.cat(unrotated, dim=-1).unsqueeze(1)  # [b, 1, s, w]
        if past_key_values is not None:
            # The latents take the place of keys: a cache reads its length there, and r = 0 leaves k_rope empty.
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        key, value = self._expand(latent.squeeze(1), k_rope)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _rope_tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's tables [., s, d] at each head's own pairs: [., G, s, r]."""

        def select(table: torch.Tensor) -> torch.Tensor:
            half = table[..., : self.head_dim // 2][..., self.rope_pairs].transpose(1, 2)  # [., G, s, r/2]
            return torch.cat((half, half), dim=-1)

        return select(cos), select(sin)

    def _expand(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every head, each [b, G, t, d], from what is cached (latent [b, t, w])."""
        layout = self.layout
        latents, k_nope, value = latent.split(layout.cache_parts, dim=-1)
        c = layout.kv_lora_rank or 0
        if self.k_up_proj is not None:
            k_nope = self.k_up_proj(latents[..., :c])
        if self.v_up_proj is not None:
            value = self.v_up_proj(latents[..., layout.kv_down_dim - c :])
        key = torch.cat((k_rope, self._split_heads(k_nope)), dim=-1)
        return key, self._split_heads(value)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[b, t, G n] -> [b, G, t, n]."""
        groups = self.layout.num_key_value_heads
        return x.view(*x.shape[:2], groups, x.shape[-1] // groups).transpose(1, 2)

    def _heads(self, projection: nn.Linear | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """The projection split into heads, or heads of no dims where the layer has no such projection."""
        x = hidden_states[..., :0] if projection is None else projection(hidden_states)
        return self._split_heads(x)


class MHA2MLALlamaModel(LlamaModel):
    config_class = MHA2MLALlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": MHA2MLAAttention}

    def __init__(self, config: MHA2MLALlamaConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MHA2MLAAttention(config, layer_idx)
        self.post_init()


class MHA2MLALlamaForCausalLM(LlamaForCausalLM):
    config_class = MHA2MLALlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": MHA2MLAAttention}
    _tp_plan = {}

    def __init__(self, config: MHA2MLALlamaConfig):
        super().__init__(config)
        self.model = MHA2MLALlamaModel(config)
        self.post_init()


__all__ = ["MHA2MLALlamaForCausalLM", "MHA2MLALlamaModel"]
