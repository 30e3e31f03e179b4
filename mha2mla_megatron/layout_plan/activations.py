"""What one forward pass keeps for its backward pass, in bytes, part by part.

The accounting is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198), section 4, for SwiGLU, grouped queries, latents, rotary tables and no dropout. docs/planning.md has
the formulas, and says which tensors of which kernel they count.

Shape letters: S sequence, s the part of it that a context-parallel process holds, B micro batch, h hidden size, H query
heads, G key/value heads, d head dim, r rotary dims kept per head, c latent width, m MLP width, E experts, a of them for
each token, V vocabulary, t tensor-parallel size, e bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.experts import Experts
from mha2mla_megatron.model.parallel import ParallelConfig

FLOAT32, INT64 = 4, 8


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

    fp8: bool
    """The layers' projections keep their inputs in 8 bits, each its own copy."""

    loss_models: int
    """How many models' logits our own loss is made of: 2 with a teacher, 1 with z_loss alone; 0: the loss is
    Megatron's."""

    matched: bool
    """Attention outputs follow a teacher's: its own wait in each layer, and what draws the student's to them."""

    @property
    def positions(self) -> int:
        """s."""
        return self.sequence_length // self.parallel.context_parallel_size

    @property
    def tokens(self) -> int:
        """s B."""
        return self.positions * self.micro_batch_size

    @cached_property
    def split_tokens(self) -> int:
        """Of which this rank holds what is between the layers: s B, divided by t with sequence parallelism."""
        share = self.parallel.tensor_model_parallel_size if self.parallel.uses_sequence_parallel else 1
        return self.tokens // share

    @cached_property
    def hidden(self) -> int:
        """Hidden states between two layers."""
        return self.split_tokens * self.architecture.hidden_size * self.element_size

    def keys_and_values(self, layer: int) -> int:
        """Of this rank's tokens: [s, B, G/t, dims] both."""
        _, groups = self._heads
        return (
            self.tokens
            * groups
            * (self.architecture.qk_head_dim(layer) + self.architecture.head_dim)
            * self.element_size
        )

    @property
    def gathers_keys(self) -> bool:
        """With context parallelism: keys and values of all tokens at once, and not part by part in a ring."""
        return not self.transformer_engine or self.parallel.cp_comm_type == "all_gather"

    def saved(self, layers: Iterable[int]) -> dict[str, int]:
        """Kept by these layers: `attention`, `mlp`, and, where they are recomputed whole, only `layer_inputs`: hidden
        states and the angles [s, d], in float32, that all layers read; and what a teacher's attention gave."""
        layers = list(layers)
        matched = self.matched * len(layers) * self.hidden
        if self.recompute == "full":
            angles = self.positions * self.architecture.head_dim * FLOAT32 if layers else 0
            return {"attention": matched, "mlp": 0, "layer_inputs": len(layers) * self.hidden + angles}
        attention = matched + sum(self._attention(layer, self.recompute == "selective") for layer in layers)
        return {"attention": attention, "mlp": sum(map(self._mlp, layers)), "layer_inputs": 0}

    @cached_property
    def output_saved(self) -> int:
        """Kept by the final norm, the output layer and the loss: its probabilities, or with Transformer Engine logits
        and three numbers a token.

        With a loss of ours the logits that it is made of.
        """
        per_logit, per_token = (self.element_size, 3 * FLOAT32) if self.transformer_engine else (FLOAT32, 9)
        if self.loss_models:
            per_logit = self.loss_models * self.element_size
        return self._norm + self.hidden + self.tokens * per_token + self._logits * per_logit

    def working(self, layers: Iterable[int], last: bool, largest_weight: int) -> int:
        """Needed beyond what is kept when most is in use: as the loss or its gradient is formed (in the chunk that
        does), or in the backward pass of the largest layer, by when logits are gone.

        largest_weight: numbers in it; its gradient stands by itself before it is added to the float32 sum.

        With a teacher the loss takes logits of the student in another order, or the gradient; without a kernel for it
        three times the logits in float32, and the gradient if that is another type. Without a teacher, by when the
        logits are gone, the gradient is there in both orders, and that of the output layer's weight; without a kernel
        the logits are there in float32 before, twice if that is another type.
        """
        backward = max((self._backward(layer) for layer in layers), default=0)
        if last:
            in_place = self.element_size == FLOAT32 and not self.transformer_engine
            gradient = 0 if in_place else self._logits * self.element_size
            backward = max(gradient, backward - self.output_saved)
        backward += largest_weight * self.element_size
        if last and self.loss_models == 1:
            copies = 0 if self.fused else FLOAT32 * (2 if self.element_size < FLOAT32 else 1)
            return max(backward, self._logits * copies, (self._logits + largest_weight) * self.element_size)
        if last and self.loss_models == 2:
            copies = 0 if self.fused else 3 * FLOAT32
            gradient = self.element_size if self.fused or self.element_size < FLOAT32 else 0
            return max(backward, self._logits * (copies + gradient))
        return backward

    @cached_property
    def _logits(self) -> int:
        return self.tokens * self.architecture.vocab_size // self.parallel.tensor_model_parallel_size

    @cached_property
    def _norm(self) -> int:
        """Input of an RMSNorm, one number a token; unfused input and normalised input, all in float32. Its output is
        kept by those that read it."""
        per_element = self.element_size if self.fused else 2 * FLOAT32
        return self.split_tokens * (self.architecture.hidden_size * per_element + FLOAT32)

    def _read(self, numbers: int, readers: int = 1) -> int:
        """A tensor that `readers` projections read and keep: one for all of them, or a copy each in 8 bits."""
        return numbers * (readers if self.fp8 else self.element_size)

    def _mlp(self, layer: int) -> int:
        """Norm and what gate and up read, gate and up [2m], their product [m]; unfused also silu(gate) and a copy of
        up."""
        if (experts := self.architecture.experts_of(layer)) is not None:
            return self._norm + self._experts(experts)
        width = self.tokens * self.architecture.intermediate_size // self.parallel.tensor_model_parallel_size
        steps = (2 if self.fused else 4) * width * self.element_size
        return self._norm + self._read(self.split_tokens * self.architecture.hidden_size) + steps + self._read(width)

    def _experts(self, experts: Experts) -> int:
        """What the router reads, its choice, and the same numbers as of an MLP for each token and expert of it, beside
        the token's weight; unfused also the product without that weight.

        No token is dropped, so that their sum does not depend on the choice.
        """
        e, chosen, number = self.element_size, experts.num_experts_per_tok, experts.num_experts
        softmax = chosen if experts.norm_topk_prob else number  # of the chosen logits, or of all
        router = self.split_tokens * (self.architecture.hidden_size * e + chosen * INT64 + softmax * FLOAT32)
        order = self.tokens * (number * (e + 1) + chosen * INT64)  # weights and choice as matrices, tokens by expert
        width = experts.intermediate_size // self.parallel.tensor_model_parallel_size
        numbers = self.architecture.hidden_size + 1 + (3 if self.fused else 6) * width
        return router + order + self.tokens * chosen * numbers * e

    @cached_property
    def _heads(self) -> tuple[int, int]:
        """H / t, G / t."""
        tp = self.parallel.tensor_model_parallel_size
        return self.architecture.num_attention_heads // tp, self.architecture.num_key_value_heads // tp

    def _attention(self, layer: int, recompute_core: bool) -> int:
        """Norm, latents, rotary tables, norms of heads, what the core keeps, and its result [H d]."""
        heads, _ = self._heads
        result = self.tokens * heads * self.architecture.head_dim
        if recompute_core or not self.fp8:
            core = (self._core_inputs(layer) if recompute_core else self._core(layer)) + self._read(result)
        else:  # flash attention keeps its result in 16 bits, the projection after it in 8
            core = self._core(layer) + result * self.element_size + self._read(result)
        return self._norm + self._latents(layer) + self._rotary_tables(layer) + self._head_norms(recompute_core) + core

    def _latents(self, layer: int) -> int:
        """What the projections to queries, keys and values read: the normalised input and the latents."""
        h = self.architecture.hidden_size
        if self.architecture.mla is None:
            return self._read(self.split_tokens * h)
        layout = self.architecture.layout(layer)
        if not self.fp8:
            # Keys of a part of a joint latent read a copy of it.
            shared = layout.key_rank in (0, layout.kv_down_dim)
            latents = self.split_tokens * (layout.kv_down_dim if shared else layout.key_rank + layout.value_rank)
            if self.fused_projections:  # of all tokens the columns that this process computes
                latents = self.tokens * layout.kv_down_dim // self.parallel.tensor_model_parallel_size
            return (self.split_tokens * h + latents) * self.element_size
        read = sum(columns for name, (_, columns) in layout.projections().items() if name != "o_proj")
        return self._read(self.split_tokens * read)

    def _rotary_tables(self, layer: int) -> int:
        """Cosines and sines for queries and keys, the same for all samples: one for all heads, or one a head."""
        heads, groups = self._heads
        if self.architecture.mla is not None:
            if self.fused_rotation:
                return 0
            layout = self.architecture.layout(layer)
            width = (2 if layout.shared_rope else heads + groups) * layout.qk_rope_head_dim
        else:
            width = 0 if self.transformer_engine else 2 * self.architecture.head_dim
        return 2 * self.positions * width * self.element_size

    def _head_norms(self, recompute_core: bool) -> int:
        """Of queries and keys, before rotation: input, normalised input where the norm is plain torch, as the converted
        layer's own is on a GPU too, and one float32 number a head and token."""
        if not self.architecture.qk_norm:
            return 0
        heads, groups = self._heads
        d, e, normed = self.architecture.head_dim, self.element_size, heads + groups
        if self.architecture.mla is not None:
            widths = normed * (2 * FLOAT32 + e if e < FLOAT32 else 2 * FLOAT32)  # made float32 twice, and rounded
        elif self.transformer_engine:
            widths = normed * e
        elif e < FLOAT32 and not self.fused:
            widths = normed * 2 * FLOAT32
        else:
            # Inputs are views of the whole projection, but for a query that has to be copied out of it; the core may
            # keep that too, for its value.
            query = heads if heads > groups > 1 else 0
            kept_anyway = recompute_core or (heads == groups and self.parallel.context_parallel_size == 1)
            widths = (query + (0 if kept_anyway else heads + 2 * groups)) * e + (0 if self.fused else normed * FLOAT32)
        return self.tokens * (widths * d + normed * FLOAT32)

    def _core_inputs(self, layer: int) -> int:
        """Query, key, value. The value of an original model is a view of the whole projection [H + 2G heads]."""
        heads, groups = self._heads
        value = groups if self.architecture.mla is not None else heads + 2 * groups
        numbers = (heads + groups) * self.architecture.qk_head_dim(layer) + value * self.architecture.head_dim
        return self.tokens * numbers * self.element_size

    def _core(self, layer: int) -> int:
        """Flash: query, key, value, one number a query. Else keys and values of all tokens, repeated for each query
        head, and the softmax [B, H, s, S] in float32, its copy in bf16, and the causal mask."""
        heads, groups = self._heads
        d, e = self.architecture.head_dim, self.element_size
        of_keys = self.architecture.qk_head_dim(layer)
        query = self.tokens * heads * of_keys * e
        if self.transformer_engine:
            return query + self._keys_and_values_kept(layer) + self.tokens * heads * FLOAT32
        everything = self.tokens * self.parallel.context_parallel_size
        if heads > groups or self.parallel.context_parallel_size > 1:
            inputs = query + everything * heads * (of_keys + d) * e
        elif self.architecture.mla is None:
            inputs = self._core_inputs(layer)
        else:
            inputs = query + self._keys_and_values_kept(layer)
        softmax = self._scores * (FLOAT32 if e == FLOAT32 else FLOAT32 + e)
        return inputs + softmax + self.positions * self.sequence_length

    def _keys_and_values_kept(self, layer: int) -> int:
        """By the core, as they are. recompute=latent keeps the rotated part of a key that has another, and rebuilds the
        rest; a ring keeps keys and values in a buffer of its own, which is not rebuilt."""
        if self.recompute != "latent" or (self.parallel.context_parallel_size > 1 and not self.gathers_keys):
            return self.keys_and_values(layer)
        layout, (_, groups) = self.architecture.layout(layer), self._heads
        rotated = (1 if layout.shared_rope else groups) * layout.qk_rope_head_dim
        key = rotated if layout.factors_key else groups * layout.qk_head_dim
        value = 0 if layout.factors_value else groups * layout.head_dim
        return self.tokens * (key + value) * self.element_size

    @cached_property
    def _scores(self) -> int:
        """B H s S / t."""
        return self.tokens * self.sequence_length * self._heads[0]

    def _backward(self, layer: int) -> int:
        """Gradients that are there at once in the backward pass of a layer, its gathered input under sequence
        parallelism, keys, values and their gradients under way under context parallelism, and what it recomputes.

        Of experts: those of all their inputs, twice as they are put together, and of one expert that every token has
        chosen; a bound, since most have fewer tokens.
        """
        heads, groups = self._heads
        e, tp, cp = self.element_size, self.parallel.tensor_model_parallel_size, self.parallel.context_parallel_size
        stream = 2 * self.tokens * self.architecture.hidden_size * e
        experts = self.architecture.experts_of(layer)
        width = self.architecture.intermediate_size if experts is None else experts.intermediate_size
        mlp = 3 * self.tokens * width // tp * e
        if experts is not None:
            mlp += 2 * self.tokens * experts.num_experts_per_tok * self.architecture.hidden_size * e
        attention = (
            2
            * self.tokens
            * ((heads + groups) * self.architecture.qk_head_dim(layer) + groups * self.architecture.head_dim)
            * e
        )
        if not self.transformer_engine:
            attention += self._scores * (2 * FLOAT32 + e)
        if cp > 1:
            attention += self.keys_and_values(layer) * (2 * cp if self.gathers_keys else 4)
        gathered = stream // 2 if self.parallel.uses_sequence_parallel else 0
        if self.recompute == "latent":
            recomputed = self.keys_and_values(layer) - self._keys_and_values_kept(layer)
        elif self.recompute == "selective":
            recomputed = self._core(layer) - self._core_inputs(layer)
        else:
            recomputed = self._attention(layer, False) + self._mlp(layer) if self.recompute == "full" else 0
        return stream + max(mlp, attention) + gathered + max(recomputed, 0)
