"""The converted attention layer with our kernels: the rotation alone, or the whole way to queries, keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_config import TransformerConfig

from mha2mla_megatron.model.attention import MHA2MLASelfAttention
from mha2mla_megatron.model.latent_qkv import FROM_INPUT, QKVPlan, latent_qkv, rebuild_key, rebuild_value
from mha2mla_megatron.model.rebuilding import rebuilt
from mha2mla_megatron.model.rotary_kernel import HeadShape, rotate_and_join, rotate_and_split


class RotatingMHA2MLASelfAttention(MHA2MLASelfAttention):
    """`MHA2MLASelfAttention`, with keys put together and all heads rotated by one kernel.

    Not for models with norms on queries and keys, which stand between projection and rotation. With a key/value cache
    or packed sequences it does as its parent does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.q_layernorm is None, "norms belong between projection and rotation"
        layout, processes = self.layout, self.tp_group.size()
        self.shape = HeadShape(
            query_heads=layout.num_attention_heads // processes,
            key_heads=layout.num_key_value_heads // processes,
            rope_heads=1 if layout.shared_rope else layout.num_key_value_heads // processes,
            rope_dim=layout.qk_rope_head_dim,
            nope_dim=layout.qk_nope_head_dim,
        )
        self._angles: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As `MHA2MLASelfAttention.forward`."""
        rest = dict(kwargs, inference_context=inference_context, packed_seq_params=packed_seq_params)
        if rotary_pos_emb is None or inference_context is not None or packed_seq_params is not None:
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **rest)
        # Attention.forward asks for queries and keys without saying by what to rotate them, and then leaves them alone.
        self._angles = rotary_pos_emb[:, 0, 0]
        try:
            return Attention.forward(self, hidden_states, *args, **rest)
        finally:
            self._angles = None

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the parent's, but rotated where `forward` has been given angles."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        query, k_rope, k_nope, value = self.projected(hidden_states)
        query, key = _Rotation.apply(query, k_rope, k_nope, self._angles, self.pairs, self.shape)
        return query, key, value

    @property
    def pairs(self) -> torch.Tensor:
        """`own_pairs`, and an empty [G/tp or 1, 0] where nothing rotates."""
        if self.shape.rope_dim == 0:
            return torch.empty(self.shape.rope_heads, 0, dtype=torch.int64, device=self.linear_q.weight.device)
        return self.own_pairs


class _Rotation(torch.autograd.Function):
    """Query [S, B, H, r + n] and key [S, B, G, r + n] from their heads' parts, and the gradients of these. Of a key's
    rotated part there are G heads, or 1."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Any, k_rope: Any, k_nope: Any, angles: Any, pairs: Any, shape: HeadShape
    ) -> Any:
        ctx.save_for_backward(angles, pairs)
        ctx.shape, ctx.shapes = shape, [None if part is None else part.shape for part in (query, k_rope, k_nope)]
        rotated, key = rotate_and_join(_rows(query), _rows(k_rope), _rows(k_nope), angles, pairs, shape)
        return rotated.view(query.shape), key.view(*query.shape[:2], *key.shape[1:])

    @staticmethod
    def backward(ctx: Any, d_query: torch.Tensor, d_key: torch.Tensor) -> Any:  # type: ignore[override]
        angles, pairs = ctx.saved_tensors
        queries, k_rope, k_nope = (None if shape is None else d_query.new_empty(shape) for shape in ctx.shapes)
        places = _rows(queries), _rows(k_rope), _rows(k_nope)
        rotate_and_split(d_query.contiguous(), d_key.contiguous(), *places, angles, pairs, ctx.shape)
        return queries, k_rope, k_nope, None, None, None


def _rows(part: torch.Tensor | None) -> Any:
    """[S, B, heads, width] as [S B, heads * width], the same memory."""
    return None if part is None else part.flatten(2).flatten(0, 1)


class FusedMHA2MLASelfAttention(RotatingMHA2MLASelfAttention):
    """`MHA2MLASelfAttention`, with the same parameters under the same names, trained by fewer and larger kernels.

    Its projections are `ColumnWeights`, in 16 or 32 bits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._projections = {
            name: module
            for name in (*FROM_INPUT, "kv_down", "k_up", "v_up")
            if (module := getattr(self, f"linear_{name}")) is not None
        }
        names = []
        for name, module in self._projections.items():
            names += [f"{name}.weight"] + [f"{name}.bias"] * (getattr(module, "bias", None) is not None)
        layout, sequence_parallel = self.layout, self.config.sequence_parallel
        joint, key_rank, shared_rope = layout.method == "joint", layout.key_rank, layout.shared_rope
        self._plan = QKVPlan(
            self.shape, layout.head_dim, shared_rope, tuple(names), joint, key_rank, self.tp_group, sequence_parallel
        )

    def rebuild_keys_and_values(self) -> None:
        """From now on keep neither for the backward pass, but compute them there again from the latents."""
        self.core_attention = RebuildingAttention(self.core_attention)

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the parent's, but rotated where `forward` has been given angles."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        parameters = []
        for module in self._projections.values():
            # A call, since Megatron hangs on it that the weights are there.
            parameters += [part for part in module() if part is not None]
        plan, angles, pairs = self._plan, self._angles, self.pairs
        query, key, value, latents = latent_qkv(plan, hidden_states, angles, pairs, parameters)
        if isinstance(self.core_attention, RebuildingAttention) and latents is not None:
            heads, r = self.shape.rope_heads, self.shape.rope_dim
            if "k_up.weight" in plan.names:
                rotated = key.detach()[:, :, :heads, :r].contiguous()
                self.core_attention.rebuild["key"] = lambda: rebuild_key(plan, latents, rotated, parameters)
            if "v_up.weight" in plan.names:
                self.core_attention.rebuild["value"] = lambda: rebuild_value(plan, latents, parameters)
        return query, key, value


class RebuildingAttention(torch.nn.Module):
    """Core attention of which autograd keeps key or value as a way to get it again.

    rebuild: for the next forward pass; from `key` and `value` to functions that give it, in any shape.
    """

    def __init__(self, core: torch.nn.Module) -> None:
        super().__init__()
        self.core = core
        self.rebuild: dict[str, Callable[[], torch.Tensor]] = {}

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As the core's. Other tensors that it keeps, such as copies of keys for each query head, it keeps."""
        ways, self.rebuild = self.rebuild, {}
        with rebuilt([{"key": key, "value": value}[name] for name in ways], list(ways.values())):
            return self.core(query, key, value, *args, **kwargs)


class ColumnWeights(ColumnParallelLinear):
    """A column-parallel layer that, called without an input, gives its (weight, bias)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False  # upstream's own product of weight and input would need apex for it
        super().__init__(*args, config=own, **kwargs)

    def forward(self, x: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return (self.weight, self.bias) if x is None else super().forward(x, *args, **kwargs)
