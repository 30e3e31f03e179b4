"""The converted attention layer in Megatron-core.

Shape letters: S sequence, s the part of it that this process holds (S / tp under sequence parallelism, else S),
B batch, h hidden size, H query heads, G key/value heads, R heads of rotated keys (G, or 1 that all share), d head dim,
r rotary dims kept per head, n other dims of a query or key head, c latent width, tp tensor-parallel size. Activations
are [sequence, batch, ...], as everywhere in Megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all_hp2sp,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from mha2mla_megatron.hf.layout_mha2mla import LatentLayout, biased_projections


@dataclass
class MHA2MLASelfAttentionSubmodules:
    """What an MHA2MLASelfAttention is built from."""

    column_parallel_linear: Callable[..., Any]
    """All projections but the last: their output is split over the heads, what all heads read by columns."""

    core_attention: Callable[..., Any]
    linear_proj: Callable[..., Any]


class MHA2MLASelfAttention(Attention):
    """Self-attention with partial RoPE and keys and values that come from latents.

        query = linear_q x                                   H heads of [r | n]
        key   = [rope(linear_k_rope x) | linear_k_up c_k]    G heads of [r | n]
        value = linear_v_up c_v                              G heads of d
        c_k, c_v = linear_kv_down x

    with c_k = c_v (joint) or [c_k | c_v] = linear_kv_down x (split). The first part of a key is each head's own, or the
    same one for all (`LatentLayout.shared_rope`). Where the model has q_layernorm and k_layernorm, query and key go
    through them before rotation. What is not factored is a full-rank projection of x: linear_k_nope, linear_v. Of all
    these a layer has those that its `LatentLayout` names; the others are None.

    Over tensor-parallel processes all are split by head, but linear_kv_down by the columns of the latents, which every
    head reads, and so a linear_k_rope that they share: each process computes some columns for all tokens, and they are
    exchanged. So each weight, and its gradient, is whole in one place.

    The buffer `rope_pairs`, int64 [R, r/2], says which of the model's d/2 rotary frequencies each head of rotated keys,
    and the query heads that read it, use. It holds all heads on every process, and integers, so that casting the module
    to bf16 leaves it alone.
    """

    rope_pairs: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MHA2MLASelfAttentionSubmodules,
        layer_number: int,
        layout: LatentLayout,
        qkv_bias: bool,
        qk_norm: bool,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **kwargs: Any,
    ) -> None:
        """layout: the shapes of this layer. qkv_bias: whether q, k_rope and v have a bias (and, with norms,
        k_nope). qk_norm: whether queries and keys are normalised before rotation.

        kwargs: what TransformerLayer passes to any attention (process groups, layer offset, name).
        """
        super().__init__(
            config=config,
            submodules=submodules,  # type: ignore[arg-type]  # only core_attention and linear_proj are read
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            **kwargs,
        )
        self.layout = layout
        self.key_hidden_size = layout.qk_head_dim
        assert not (qk_norm and layout.shared_rope), "normalised keys are each head's own"
        # Attention.forward reads both, whether there are norms or not.
        self.q_layernorm = self.k_layernorm = None
        if qk_norm:
            self.q_layernorm, self.k_layernorm = (HeadRMSNorm(config, layout, self.tp_group) for _ in range(2))

        shapes = layout.projections()
        shared: dict[str, Any] = dict(
            config=config, init_method=config.init_method, skip_bias_add=False, is_expert=False
        )

        def column(hf_name: str) -> Any:
            if hf_name not in shapes:
                return None
            rows, columns = shapes[hf_name]
            bias = qkv_bias and hf_name in biased_projections(qk_norm)
            return submodules.column_parallel_linear(
                columns, rows, bias=bias, gather_output=False, tp_group=self.tp_group, **shared
            )

        # Megatron's buffers hold parameters in the reverse of this order, so that there those that read the input
        # follow one another as `latent_qkv` wants them: q, k_rope, k_nope, v.
        self.linear_k_up = column("k_up_proj")
        self.linear_v_up = column("v_up_proj")
        self.linear_kv_down = column("kv_down_proj")
        self.linear_v = column("v_proj")
        self.linear_k_nope = column("k_nope_proj")
        self.linear_k_rope = column("k_rope_proj")
        self.linear_q = column("q_proj")
        if layout.qk_rope_head_dim > 0:
            pairs = torch.arange(layout.qk_rope_head_dim // 2, device=self.linear_q.weight.device)
            self.register_buffer("rope_pairs", pairs.repeat(layout.rope_heads, 1))

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Attention.forward with the tables of this layer's heads in place of the model's.

        rotary_pos_emb: float32 [S, 1, 1, d], the angles of the d/2 frequencies, twice.
        """
        return super().forward(*args, rotary_pos_emb=self.rotary_tables(rotary_pos_emb), **kwargs)

    @property
    def own_pairs(self) -> torch.Tensor:
        """The rows of `rope_pairs` for this process's key heads, int64 [G/tp or 1, r/2]; for r > 0."""
        if self.layout.shared_rope:
            return self.rope_pairs
        return self.rope_pairs.chunk(self.tp_group.size())[self.tp_group.rank()]

    def rotary_tables(self, rotary_pos_emb: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Angles of this process's query heads [S, 1, H/tp, r] and key heads [S, 1, G/tp, r]; None where r = 0. Both
        [S, 1, 1, r] where all heads share one rotated key.

        Attention rotates the first r dims of each head, half-split, and leaves the others as they are.
        """
        if rotary_pos_emb is None or self.layout.qk_rope_head_dim == 0:
            return None
        angles = rotary_pos_emb[:, :, 0, : self.layout.head_dim // 2][..., self.own_pairs]
        keys = torch.cat((angles, angles), dim=-1)
        if self.layout.shared_rope:
            return keys, keys
        group_size = self.layout.num_attention_heads // self.layout.num_key_value_heads
        return keys.repeat_interleave(group_size, dim=2), keys

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [S, B, H/tp, r + n], key [S, B, G/tp, r + n] and value [S, B, G/tp, d] before rotation, from hidden
        states [s, B, h]."""
        assert key_value_states is None and not output_gate and split_qkv, "not offered by this layer"
        query, k_rope, k_nope, value = self.projected(hidden_states)
        if k_rope is not None:
            k_rope = k_rope.expand(*value.shape[:3], -1)  # where all heads share it
        key = torch.cat([part for part in (k_rope, k_nope) if part is not None], dim=-1)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def projected(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Query [S, B, H/tp, r + n], the two parts of the key [S, B, G/tp, r and n], None where one is empty, value
        [S, B, G/tp, d]. Of a shared first part there is one head."""
        layout = self.layout
        r, n = layout.qk_rope_head_dim, layout.qk_nope_head_dim
        latent_k = latent_v = hidden_states
        if self.linear_kv_down is not None:
            latent_k, latent_v = self._split_latents(self._latents(hidden_states))
        k_rope = k_nope = None
        if self.linear_k_rope is not None:
            k_rope = _heads(self._rope_rows(hidden_states), r)
        if self.linear_k_up is not None:
            k_nope = _heads(self.linear_k_up(latent_k), n)
        elif self.linear_k_nope is not None:
            k_nope = _heads(self.linear_k_nope(hidden_states), n)
        value = self.linear_v(hidden_states) if self.linear_v_up is None else self.linear_v_up(latent_v)
        return _heads(self.linear_q(hidden_states), r + n), k_rope, k_nope, _heads(value, layout.head_dim)

    def _rope_rows(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is rotated of all tokens' keys, as a linear layer's result: [S, B, G r / tp], or what all heads share
        [S, B, r]."""
        own, bias = self.linear_k_rope(hidden_states)
        if self.layout.shared_rope:
            # Going back, each process has its heads' part of the gradient: they are summed, and split.
            own = all_gather_last_dim_from_tensor_parallel_region(own, self.tp_group)
        return own, bias

    def _latents(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All columns [s, B, C] of the latents of this process's tokens."""
        own, _ = self.linear_kv_down(hidden_states)  # [S, B, C/tp]
        if not self.config.sequence_parallel:
            return gather_from_tensor_model_parallel_region(own, self.tp_group)
        return all_to_all_hp2sp(own, self.tp_group).unflatten(0, hidden_states.shape[:2])

    def _split_latents(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents [s, B, C] that keys and that values are made of; the same one where they share it."""
        layout = self.layout
        c_k, c_v = latents[..., : layout.key_rank], latents[..., layout.kv_down_dim - layout.value_rank :]
        # Sequence parallelism gathers them with a collective that takes contiguous tensors only.
        return c_k.contiguous(), c_v.contiguous()


class HeadRMSNorm(torch.nn.Module):
    """RMSNorm over the dims of each query or key head, with weights for each key/value head.

    weight: [G/tp, d], split like the heads, so that its gradient is complete on the process that holds it.
    """

    def __init__(self, config: TransformerConfig, layout: LatentLayout, tp_group: Any) -> None:
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = layout.num_key_value_heads // tp_group.size(), layout.head_dim
        self.weight = torch.nn.Parameter(torch.ones(shape, device=device, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, B, H/tp or G/tp, d] to the same."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.repeat_interleave(x.shape[2] // len(self.weight), dim=0)
        return weight * normed.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For `dist_checkpointing`: split over tensor-parallel processes by the first dimension."""
        groups = dict(tp_group=self.tp_group, dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"])
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def _heads(projected: tuple[torch.Tensor, torch.Tensor | None], width: int) -> torch.Tensor:
    """A linear layer's (output, None) as heads: [S, B, heads * width] to [S, B, heads, width]."""
    output, _ = projected
    return output.unflatten(-1, (-1, width))
