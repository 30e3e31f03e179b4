"""A pass of the original model over a text, forwards and backwards, that sums up what `statistics` describes.

A few neighbouring layers, a segment, are in memory at a time. Forwards, each segment's input is kept on the host for
all sequences; backwards, from the last segment on, a segment is run again from its input, and the gradient goes through
it and on to the segment below. One segment makes an ordinary forward and backward pass. The sums do not depend on where
the model is cut.

Each layer's sums are made while the gradient of its attention output comes by in the backward pass, from the layer's
input and that gradient alone. No weight gets a gradient.

Shape letters as in `statistics`; b sequences in a batch, S their length, m queries of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.original import Head, Layer, OriginalModel
from mha2mla_megatron.calibration.pair_moments import (
    attention_weights,
    block_size,
    functionals,
    grouped_matmul,
    products,
    softmax_moments,
)
from mha2mla_megatron.calibration.statistics import LayerStatistics, empty_statistics, layer_shapes
from mha2mla_megatron.calibration.substitution import substitution_moments
from mha2mla_megatron.progress import Progress


@dataclass(frozen=True)
class Batch:
    """tokens: int64 [b, S]. seeds: one for the labels of each sequence, so that they do not depend on how sequences are
    batched or spread."""

    tokens: torch.Tensor
    seeds: Sequence[int]


def make_segments(architecture: Architecture, dtype: torch.dtype, batch_tokens: int, memory: int) -> list[range]:
    """The layers cut into runs of as many as fit into `memory` bytes, at least one: with their weights, their sums, and
    about what a backward pass over a batch needs of them."""
    h, heads, _, d = architecture.heads
    shapes = architecture.tensor_shapes().items()
    weights = sum(math.prod(shape) for name, shape in shapes if name.startswith("model.layers.0."))
    sums = sum(math.prod(shape) for shape in layer_shapes(architecture).values())
    # Autograd keeps, of each token: the residual streams and the attention's input, rotated queries, the keys, values
    # and outputs of each query head, and the MLP's three products.
    activations = batch_tokens * (4 * h + 4 * heads * d + 3 * architecture.intermediate_size)
    step = max(1, memory // ((weights + activations) * dtype.itemsize + sums * 4))
    layers = architecture.num_layers
    return [range(start, min(start + step, layers)) for start in range(0, layers, step)]


def collect(
    model: OriginalModel, batches: Sequence[Batch], segments: Sequence[range]
) -> Iterator[tuple[int, LayerStatistics]]:
    """(layer, sums over all batches), from the last layer to the first, each as soon as its segment is done."""
    tokens = sum(batch.tokens.numel() for batch in batches)
    layers = model.architecture.num_layers
    inputs = [[model.embed(batch.tokens).cpu() for batch in batches]]  # of each segment, for each batch
    if len(segments) > 1:
        forward = Progress("calibrate, forwards", segments[-1].start, "layers")
        for segment in segments[:-1]:
            inputs.append(_run_segment(model, segment, inputs[-1]))
            forward.advance(len(segment))
        forward.close()
    progress = Progress("calibrate", tokens * layers, "tokens", scale=layers)
    gradients: list[torch.Tensor] = []
    for segment in reversed(segments):
        head = model.head() if segment is segments[-1] else None
        sums, gradients = _segment_sums(model, segment, head, batches, inputs.pop(), gradients, progress)
        for index in reversed(segment):
            yield index, sums.pop()
    progress.close()


@torch.no_grad()
def _run_segment(model: OriginalModel, segment: range, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the segment makes of each batch's states [b, S, h]."""
    layers = [model.layer(index) for index in segment]
    return [run_layers(layers, state.to(model.device)).cpu() for state in states]


def run_layers(layers: Sequence[Layer], hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [b, S, h], into the first layer; the same out of the last one."""
    for layer in layers:
        hidden = layer.run(hidden)
    return hidden


def _segment_sums(
    model: OriginalModel,
    segment: range,
    head: Head | None,
    batches: Sequence[Batch],
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    progress: Progress,
) -> tuple[list[LayerStatistics], list[torch.Tensor]]:
    """The sums of a segment's layers, and each batch's gradient [b, S, h] with respect to the segment's input.

    inputs: [b, S, h] of each batch. gradients: with respect to the segment's output; not of the last segment, whose
    output goes to the head.
    """
    layers = [model.layer(index) for index in segment]
    sums = [empty_statistics(model.architecture, model.device) for _ in segment]
    for layer, its_sums in zip(layers, sums, strict=True):
        _watch_attention(layer, its_sums)
    below = []
    for index, batch in enumerate(batches):
        state = inputs[index].to(model.device).detach().requires_grad_(True)
        with torch.enable_grad():
            output = run_layers(layers, state)
            if head is None:
                output.backward(gradients[index].to(model.device))
            else:
                hidden = head.norm(output)
                hidden.backward(loss_gradient(head, hidden.detach(), batch.seeds))
        assert state.grad is not None
        below.append(state.grad.cpu())
        progress.advance(batch.tokens.numel() * len(segment))
    return sums, below


def loss_gradient(head: Head, hidden: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Gradient of the summed negative log-likelihood of sampled labels with respect to `hidden` [b, S, h], normed.

    With z = logits, it is (softmax(z) - onehot(label)) W. One sequence at a time, as logits are large.
    """
    weight = head.output.weight  # [V, h]
    gradient = torch.empty_like(hidden)
    for row, seed in enumerate(seeds):
        with torch.no_grad():
            probabilities = head.output(hidden[row]).float().softmax(-1)  # [S, V]
            # On the CPU, where a seed gives the same numbers on every machine.
            chance = torch.rand(len(probabilities), 1, generator=torch.Generator().manual_seed(seed))
            cumulated = probabilities.cumsum(-1)
            labels = torch.searchsorted(cumulated, chance.to(cumulated) * cumulated[:, -1:])
            labels.clamp_(max=cumulated.shape[1] - 1)  # NaN is beyond all; the sums say so where they are saved
            probabilities.scatter_add_(1, labels, probabilities.new_full((1, 1), -1.0).expand_as(labels))
            gradient[row] = probabilities.to(weight.dtype) @ weight
    return gradient


def _watch_attention(layer: Layer, sums: LayerStatistics) -> None:
    """Hooks that call `_add_layer` with the layer's input and the gradient of its heads' outputs, as long as the layer
    lives. They hold no module and no tensor of the graph, so that the layer is freed when it is dropped."""
    architecture, index = layer.model.architecture, layer.index
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["attention"], seen["x"] = module, kwargs["hidden_states"].detach()
        seen["tables"] = kwargs["position_embeddings"]

    def before_output(module: nn.Module, args: Any) -> None:
        (output,) = args
        seen["output"] = output.detach()

        def backward(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                _add_layer(sums, architecture, index, gradient=gradient, **seen)
            seen.clear()

        output.register_hook(backward)

    attention = layer.module.self_attn
    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(before_output)


def _add_layer(
    sums: LayerStatistics,
    architecture: Architecture,
    layer: int,
    attention: Any,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """Add one batch to a layer's sums. x: [b, S, h]; tables: cos, sin; output, gradient: of all heads, [b, S, H d]."""
    d = attention.head_dim

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(*tensor.shape[:2], -1, d).transpose(1, 2)

    queries, keys, values = (
        heads(projection(x)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if architecture.qk_norm:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    rotated_queries, rotated_keys = queries, keys
    if layer not in architecture.no_rope_layers:
        rotated_queries, rotated_keys = apply_rotary_pos_emb(queries, keys, *tables)
    queries, keys, values, rotated_queries, rotated_keys, outputs, gradients = (
        tensor.float()
        for tensor in (queries, keys, values, rotated_queries, rotated_keys, heads(output), heads(gradient))
    )
    sums.query_norms += _pair_norms(queries)
    sums.key_norms += _pair_norms(keys)
    per_group = queries.shape[1] // keys.shape[1]
    queries, rotated_queries, outputs, gradients = (
        tensor.unflatten(1, (-1, per_group)) for tensor in (queries, rotated_queries, outputs, gradients)
    )
    both, window = torch.cat((rotated_keys, keys), -1), architecture.window(layer)
    gradient_k, gradient_v, score, loss = _attention_sums(
        queries, rotated_queries, gradients, outputs, both, values, attention.scaling, window
    )
    sums.score_moments += score
    sums.loss_moments += loss
    if layer not in architecture.no_rope_layers:
        cos, sin = (table.float() for table in tables)
        sums.substitution_moments += substitution_moments(
            queries.flatten(1, 2), keys, (cos, sin), attention.scaling, window
        )
    y = torch.cat((gradient_k, gradient_v), 1).transpose(1, 2).flatten(2).flatten(0, 1)  # [b S, (H + G) d]
    sums.gradient_moment += y.T @ y
    energy = y.square().sum(-1)  # [b S]
    tokens = x.flatten(0, 1).float()
    sums.input_moment += tokens.T @ tokens
    sums.weighted_input_moment += tokens.T @ (tokens * energy[:, None])
    sums.gradient_energy += energy.sum()


def _attention_sums(
    queries: torch.Tensor,
    rotated_queries: torch.Tensor,
    gradients: torch.Tensor,
    outputs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums that attention's probabilities are in.

    queries, rotated_queries, gradients, outputs: [b, G, N, S, d]; keys: [b, G, S, 2d], rotated and then unrotated;
    values: [b, G, S, d]; window: how many tokens a query sees, None: all.

    Returns the gradients with respect to the unrotated key per query head [b, H, S, d] and to the value [b, G, S, d],
    and the score and loss moments, each [H, P, 3, 3].
    """
    _, groups, per_group, _, d = queries.shape
    gradient_k = torch.zeros_like(queries)
    gradient_v = torch.zeros_like(values)
    score = queries.new_zeros(groups, per_group, d // 2, 3, 3)
    loss = torch.zeros_like(score)
    keys_products = products(keys)  # [b, G, S, 10 P]
    length, step = queries.shape[3], block_size(queries)
    for start in range(0, length, step):
        seen = min(start + step, length)
        rows = slice(start, seen)
        index = torch.arange(start, seen, device=queries.device)
        p = attention_weights(rotated_queries[..., rows, :], keys[:, :, :seen, :d], index, scaling, window)
        downstream = gradients[..., rows, :]
        # The softmax's backward, with respect to the unscaled logits: p (do . v - do . o).
        own = (downstream * outputs[..., rows, :]).sum(-1, keepdim=True)
        g = p * (grouped_matmul(downstream, values[:, :, :seen].transpose(2, 3)) - own) * scaling
        gradient_k[..., :seen, :] += g.transpose(3, 4) @ queries[..., rows, :]
        gradient_v[:, :, :seen] += p.flatten(2, 3).transpose(2, 3) @ downstream.flatten(2, 3)

        linear = functionals(rotated_queries[..., rows, :], queries[..., rows, :])  # [b, G, N, m, 3, 4, P]
        parts = grouped_matmul(g, keys[:, :, :seen]).unflatten(-1, (1, 4, -1))
        effects = (linear * parts).sum(5)  # [b, G, N, m, 3, P]
        loss += torch.einsum("bgnmxp,bgnmyp->gnpxy", effects, effects)
        score += softmax_moments(p, keys[:, :, :seen], keys_products[:, :, :seen], linear) * scaling**2
    return gradient_k.flatten(1, 2), gradient_v, score.flatten(0, 1), loss.flatten(0, 1)


def _pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Summed norms of the pairs: [b, n, S, d] -> [n, P]."""
    first, second = x.chunk(2, -1)
    return torch.hypot(first, second).sum((0, 2))
