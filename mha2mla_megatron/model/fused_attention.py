"""The converted attention layer with the fused path of `latent_qkv` in place of one module after another."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_config import TransformerConfig

from mha2mla_megatron.model.attention import MHA2MLASelfAttention
from mha2mla_megatron.model.latent_qkv import FROM_INPUT, QKVPlan, latent_qkv
from mha2mla_megatron.model.plain_layers import ReplicatedLinear
from mha2mla_megatron.model.rotary_kernel import HeadShape


class FusedMHA2MLASelfAttention(MHA2MLASelfAttention):
    """`MHA2MLASelfAttention`, with the same parameters under the same names, trained by fewer and larger kernels.

    Its projections are `ColumnWeights` and `ReplicatedWeights`. Not for models with norms on queries and keys, which
    stand between projection and rotation, nor for 8-bit types. With a key/value cache or packed sequences it does as
    its parent does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.q_layernorm is None, "the fused path has no norms"
        layout, processes = self.layout, self.tp_group.size()
        self._projections = {
            name: module
            for name in (*FROM_INPUT, "kv_down", "k_up", "v_up")
            if (module := getattr(self, f"linear_{name}")) is not None
        }
        names = []
        for name, module in self._projections.items():
            names += [f"{name}.weight"] + [f"{name}.bias"] * (getattr(module, "bias", None) is not None)
        self._plan = QKVPlan(
            shape=HeadShape(
                query_heads=layout.num_attention_heads // processes,
                key_heads=layout.num_key_value_heads // processes,
                head_dim=layout.head_dim,
                rope_dim=layout.qk_rope_head_dim,
            ),
            names=tuple(names),
            joint=layout.method == "joint",
            tp_group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
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
        self._angles = rotary_pos_emb
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
        parameters = []
        for module in self._projections.values():
            # A call, since Megatron hangs on it that the weights are there.
            parameters += [part for part in module() if part is not None]
        processes, rank = self.tp_group.size(), self.tp_group.rank()
        pairs = self.rope_pairs.chunk(processes)[rank] if self.layout.qk_rope_head_dim > 0 else self._no_pairs()
        return latent_qkv(self._plan, hidden_states, self._angles[:, 0, 0], pairs, parameters)

    def _no_pairs(self) -> torch.Tensor:
        return torch.empty(self._plan.shape.key_heads, 0, dtype=torch.int64, device=self.linear_q.weight.device)


class ColumnWeights(ColumnParallelLinear):
    """A column-parallel layer that, called without an input, gives its (weight, bias)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False  # upstream's own product of weight and input would need apex for it
        super().__init__(*args, config=own, **kwargs)

    def forward(self, x: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return (self.weight, self.bias) if x is None else super().forward(x, *args, **kwargs)


class ReplicatedWeights(ReplicatedLinear):
    """A replicated layer that, called without an input, gives its (weight, None)."""

    def forward(self, x: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        return (self.weight, None) if x is None else super().forward(x)
