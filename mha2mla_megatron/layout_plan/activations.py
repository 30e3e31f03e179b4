"""What one forward pass keeps for its backward pass, in bytes, part by part.

The accounting is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198), section 4, for SwiGLU, grouped queries, latents, rotary tables and no dropout. docs/planning.md has
the formulas, and says which tensors of which kernel they count.

Shape letters: S sequence, B micro batch, h hidden size, H query heads, G key/value heads, d head dim, r rotary dims
kept per head, c latent width, m MLP width, V vocabulary, t tensor-parallel size, e bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.model.parallel import ParallelConfig

FLOAT32 = 4


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch on one rank of a tensor-parallel group. All results are bytes."""

    architecture: Architecture
    parallel: ParallelConfig
    sequence_length: int
    micro_batch_size: int
    element_size: int
    """Bytes of a weight or an activation: 2 or 4."""

    recompute: str
    """none, latent, selective, full, as in FinetuneSettings."""

    transformer_engine: bool
    """Flash attention, rotation and loss in one kernel each."""

    fused_rotation: bool
    """A converted layer's rotation in one kernel, which takes angles and keeps no tables."""

    fused_projections: bool
    """Its way from input to queries, keys and values in one function, which gathers input and latents once."""

    fused: bool
    """RMSNorm and SwiGLU in one kernel each, as on a GPU; on a CPU each of their steps keeps its own result."""

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.micro_batch_size

    @cached_property
    def hidden(self) -> int:
        """Hidden states between two layers: [S, B, h], of which sequence parallelism leaves each rank 1/t."""
        share = self.parallel.tensor_model_parallel_size if self.parallel.uses_sequence_parallel else 1
        return self.tokens * self.architecture.hidden_size * self.element_size // share

    def saved(self, layers: Iterable[int]) -> dict[str, int]:
        """Kept by these layers: `attention`, `mlp`, and, where they are recomputed whole, only `layer_inputs`: hidden
        states and the angles [S, d], in float32, that all layers read."""
        layers = list(layers)
        if self.recompute == "full":
            angles = self.sequence_length * self.architecture.head_dim * FLOAT32
            return {"attention": 0, "mlp": 0, "layer_inputs": len(layers) * self.hidden + angles}
        attention = sum(self._attention(layer, self.recompute == "selective") for layer in layers)
        return {"attention": attention, "mlp": len(layers) * self._mlp, "layer_inputs": 0}

    @cached_property
    def output_saved(self) -> int:
        """Kept by the final norm, the output layer and the loss: its probabilities, or with Transformer Engine logits
        and three numbers a token."""
        per_logit, per_token = (self.element_size, 3 * FLOAT32) if self.transformer_engine else (FLOAT32, 9)
        return self._norm + self.tokens * per_token + self._logits * per_logit

    def working(self, layers: Iterable[int], last: bool, largest_weight: int) -> int:
        """Needed beyond what is kept when most is in use: as the loss is formed (on the last stage), or in the backward
        pass of the largest layer, by when logits are gone.

        largest_weight: numbers in it; its gradient stands by itself before it is added to the float32 sum.
        """
        backward = max(self._backward(layer) for layer in layers)
        if last:
            gradient = 0 if self.element_size == FLOAT32 and not self.transformer_engine else self.element_size
            backward = max(self._logits * gradient, backward - self.output_saved)
        return backward + largest_weight * self.element_size

    @cached_property
    def _logits(self) -> int:
        return self.tokens * self.architecture.vocab_size // self.parallel.tensor_model_parallel_size

    @cached_property
    def _norm(self) -> int:
        """Input and output of an RMSNorm, one number a token; unfused also the normalised input, all in float32."""
        per_element = 2 * self.element_size if self.fused else 2 * FLOAT32 + self.element_size
        numbers = self.hidden // self.element_size
        return numbers * per_element + numbers // self.architecture.hidden_size * FLOAT32

    @cached_property
    def _mlp(self) -> int:
        """Norm, gate and up [2m], their product [m]; unfused also silu(gate) and a copy of up."""
        width = self.architecture.intermediate_size // self.parallel.tensor_model_parallel_size
        return self._norm + self.tokens * (3 if self.fused else 5) * width * self.element_size

    @cached_property
    def _heads(self) -> tuple[int, int]:
        """H / t, G / t."""
        tp = self.parallel.tensor_model_parallel_size
        return self.architecture.num_attention_heads // tp, self.architecture.num_key_value_heads // tp

    def _attention(self, layer: int, recompute_core: bool) -> int:
        """Norm, latents, rotary tables, what the core keeps, and its result [H d]."""
        heads, _ = self._heads
        core = self._core_inputs if recompute_core else self._core
        result = self.tokens * heads * self.architecture.head_dim * self.element_size
        return self._norm + self._latents(layer) + self._rotary_tables(layer) + core + result

    def _latents(self, layer: int) -> int:
        if self.architecture.mla is None:
            return 0
        return self.hidden // self.architecture.hidden_size * self.architecture.layout(layer).kv_down_dim

    def _rotary_tables(self, layer: int) -> int:
        """Cosines and sines for queries and keys, the same for all samples: one for all heads, or one a head."""
        heads, groups = self._heads
        if self.architecture.mla is not None:
            if self.fused_rotation:
                return 0
            width = (heads + groups) * self.architecture.layout(layer).qk_rope_head_dim
        else:
            width = 0 if self.transformer_engine else 2 * self.architecture.head_dim
        return 2 * self.sequence_length * width * self.element_size

    @cached_property
    def _core_inputs(self) -> int:
        """Query, key, value. The value of an original model is a view of the whole projection [H + 2G heads]."""
        heads, groups = self._heads
        value = groups if self.architecture.mla is not None else heads + 2 * groups
        return self.tokens * (heads + groups + value) * self.architecture.head_dim * self.element_size

    @cached_property
    def _core(self) -> int:
        """Flash: query, key, value, one number a query. Else keys and values repeated for each query head, and the
        softmax [B, H, S, S] in float32, its copy in bf16, and the causal mask."""
        heads, groups = self._heads
        d, e = self.architecture.head_dim, self.element_size
        if self.transformer_engine:
            kept = 0 if self.recompute == "latent" else 2 * groups
            return self.tokens * ((heads + kept) * d * e + heads * FLOAT32)
        inputs = self.tokens * 3 * heads * d * e if heads > groups else self._core_inputs
        return inputs + self._scores * (FLOAT32 if e == FLOAT32 else FLOAT32 + e) + self.sequence_length**2

    @cached_property
    def _scores(self) -> int:
        """B H S S / t."""
        return self.tokens * self.sequence_length * self._heads[0]

    def _backward(self, layer: int) -> int:
        """Gradients that are there at once in the backward pass of a layer, its gathered input under sequence
        parallelism, and what it recomputes."""
        heads, groups = self._heads
        e, tp = self.element_size, self.parallel.tensor_model_parallel_size
        stream = 2 * self.tokens * self.architecture.hidden_size * e
        mlp = 3 * self.tokens * self.architecture.intermediate_size // tp * e
        attention = 2 * self.tokens * (heads + 2 * groups) * self.architecture.head_dim * e
        if not self.transformer_engine:
            attention += self._scores * (2 * FLOAT32 + e)
        gathered = stream // 2 if self.parallel.uses_sequence_parallel else 0
        recomputed = {
            "none": 0,
            "latent": 2 * self.tokens * groups * self.architecture.head_dim * e,
            "selective": self._core - self._core_inputs,
            "full": self._attention(layer, False) + self._mlp,
        }[self.recompute]
        return stream + max(mlp, attention) + gathered + max(recomputed, 0)
