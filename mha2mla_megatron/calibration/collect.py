"""One pass of the original model over a text that sums up what `statistics` describes.

Each layer's sums are made while the gradient of its attention output comes by in the backward pass, from the layer's
input and that gradient alone; nothing of one layer is kept for another. No weight gets a gradient.

Shape letters as in `statistics`; b sequences in a batch, S their length, m queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.statistics import LayerStatistics

QUERY_BLOCK = 256
"""Queries whose attention rows are in memory at a time."""


def collect_batch(
    model: Any, architecture: Architecture, tokens: torch.Tensor, seeds: list[int], layers: list[LayerStatistics]
) -> None:
    """Add one batch to the sums.

    model: a transformers causal LM of this architecture, in evaluation mode, whose weights need no gradient.
    tokens: int64 [b, S] on its device.
    seeds: one for the labels of each sequence, so that they do not depend on how sequences are batched or spread.
    """
    with torch.enable_grad(), _watch_attention(model, architecture, layers):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.backward(_loss_gradient(model, hidden.detach(), seeds))


def _loss_gradient(model: Any, hidden: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Gradient of the summed negative log-likelihood of sampled labels with respect to `hidden` [b, S, h].

    With z = logits, it is (softmax(z) - onehot(label)) W. One sequence at a time, as logits are large.
    """
    head = model.get_output_embeddings()
    gradient = torch.empty_like(hidden)
    for row, seed in enumerate(seeds):
        with torch.no_grad():
            probabilities = head(hidden[row]).float().softmax(-1)  # [S, V]
            # On the CPU, where a seed gives the same numbers on every machine.
            chance = torch.rand(len(probabilities), 1, generator=torch.Generator().manual_seed(seed))
            cumulated = probabilities.cumsum(-1)
            labels = torch.searchsorted(cumulated, chance.to(cumulated) * cumulated[:, -1:])
            labels.clamp_(max=cumulated.shape[1] - 1)  # NaN is beyond all; the sums say so where they are saved
            probabilities.scatter_add_(1, labels, probabilities.new_full((1, 1), -1.0).expand_as(labels))
            gradient[row] = probabilities.to(head.weight.dtype) @ head.weight
    return gradient


@contextmanager
def _watch_attention(model: Any, architecture: Architecture, layers: list[LayerStatistics]) -> Iterator[None]:
    """Hooks that call `_add_layer` with the layer's input and the gradient of its heads' outputs."""
    handles = []
    for number, (sums, layer) in enumerate(zip(layers, model.model.layers, strict=True)):
        attention = layer.self_attn
        seen: dict[str, Any] = {}

        def before(module: nn.Module, args: Any, kwargs: Any, seen: dict[str, Any] = seen) -> None:
            seen["x"] = kwargs["hidden_states"].detach()
            seen["tables"] = kwargs["position_embeddings"]

        def before_output(
            module: nn.Module,
            args: Any,
            seen: dict[str, Any] = seen,
            index: int = number,
            sums: LayerStatistics = sums,
            attention: Any = attention,
        ) -> None:
            (output,) = args

            def backward(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    _add_layer(
                        sums,
                        architecture,
                        index,
                        attention,
                        seen.pop("x"),
                        seen.pop("tables"),
                        output.detach(),
                        gradient,
                    )

            output.register_hook(backward)

        handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(attention.o_proj.register_forward_pre_hook(before_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    groups = keys.shape[1]
    per_group = queries.shape[1] // groups
    key_gradients, value_gradients = [], []
    for g in range(groups):
        mine = slice(g * per_group, (g + 1) * per_group)
        gradient_k, gradient_v, score, loss = _group_sums(
            queries[:, mine],
            rotated_queries[:, mine],
            torch.cat((rotated_keys[:, g], keys[:, g]), -1),
            values[:, g],
            gradients[:, mine],
            outputs[:, mine],
            attention.scaling,
            architecture.window(layer),
        )
        key_gradients.append(gradient_k.transpose(1, 2).flatten(2))  # [b, S, N d]
        value_gradients.append(gradient_v)
        sums.score_moments[mine] += score
        sums.loss_moments[mine] += loss
    y = torch.cat((*key_gradients, *value_gradients), -1).flatten(0, 1)  # [b S, (H + G) d]
    sums.gradient_moment += y.T @ y
    energy = y.square().sum(-1)  # [b S]
    tokens = x.flatten(0, 1).float()
    sums.input_moment += tokens.T @ tokens
    sums.weighted_input_moment += tokens.T @ (tokens * energy[:, None])
    sums.gradient_energy += energy.sum()


def _group_sums(
    queries: torch.Tensor,
    rotated_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    gradients: torch.Tensor,
    outputs: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of one key/value head and its N query heads.

    queries, rotated_queries, gradients, outputs: [b, N, S, d]; values: [b, S, d]; keys: [b, S, 2d], rotated and then
    unrotated; window: how many tokens a query sees, None: all.

    Returns the gradients with respect to the unrotated key per query head [b, N, S, d] and to the value [b, S, d], and
    the score and loss moments, each [N, P, 3, 3].
    """
    _, per_group, length, d = queries.shape
    gradient_k = torch.zeros_like(queries)
    gradient_v = torch.zeros_like(values)
    score = queries.new_zeros(per_group, d // 2, 3, 3)
    loss = torch.zeros_like(score)
    products = _products(keys)  # [b, S, 10 P]
    for start in range(0, length, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, length))
        seen = rows.stop
        hidden = torch.ones(seen - start, seen, dtype=torch.bool, device=queries.device).triu(start + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(start - window)
        logits = rotated_queries[:, :, rows] @ keys[:, None, :seen, :d].transpose(2, 3) * scaling  # [b, N, m, t]
        p = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        downstream = gradients[:, :, rows]
        # The softmax's backward, with respect to the unscaled logits: p (do . v - do . o).
        own = (downstream * outputs[:, :, rows]).sum(-1, keepdim=True)
        g = p * (downstream @ values[:, None, :seen].transpose(2, 3) - own) * scaling
        gradient_k[:, :, :seen] += g.transpose(2, 3) @ queries[:, :, rows]
        gradient_v[:, :seen] += (p.transpose(2, 3) @ downstream).sum(1)

        functionals = _functionals(queries[:, :, rows], rotated_queries[:, :, rows])  # [b, N, m, 3, 4, P]
        effects = (functionals * (g @ keys[:, None, :seen]).view(*g.shape[:3], 1, 4, -1)).sum(4)  # [b, N, m, 3, P]
        loss += torch.einsum("bnmxp,bnmyp->npxy", effects, effects)
        mean = (p @ keys[:, None, :seen]).view(*p.shape[:3], 4, -1)
        second = (p @ products[:, None, :seen]).view(*p.shape[:3], 10, -1)
        covariance = second[:, :, :, _SYMMETRIC] - mean[:, :, :, _FIRST] * mean[:, :, :, _SECOND]  # [b, N, m, 16, P]
        applied = (functionals[:, :, :, :, None] * covariance.view(*p.shape[:3], 1, 4, 4, -1)).sum(5)
        score += torch.einsum("bnmxip,bnmyip->npxy", applied, functionals) * scaling**2
    return gradient_k, gradient_v, score, loss


def _functionals(queries: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """(t, f1, f2) of each pair as linear functions of its key's (rotated, rotated', unrotated, unrotated') parts.

    queries, rotated: [b, N, m, d]. Returns [b, N, m, 3, 4, P].
    """
    first, second = queries.chunk(2, -1)
    zero = torch.zeros_like(first)
    t = torch.stack((*rotated.chunk(2, -1), zero, zero), -2)
    f1 = torch.stack((zero, zero, first, second), -2)
    f2 = torch.stack((zero, zero, -second, first), -2)
    return torch.stack((t, f1, f2), -3)


_PAIRS = [(i, j) for i in range(4) for j in range(i, 4)]
_SYMMETRIC = [_PAIRS.index((min(i, j), max(i, j))) for i in range(4) for j in range(4)]
_FIRST = [i for i in range(4) for _ in range(4)]
_SECOND = [j for _ in range(4) for j in range(4)]


def _products(keys: torch.Tensor) -> torch.Tensor:
    """The ten different products of a pair's four key parts. keys: [b, S, 4 P] -> [b, S, 10 P]."""
    parts = keys.unflatten(-1, (4, -1))
    return torch.cat([parts[..., i, :] * parts[..., j, :] for i, j in _PAIRS], -1)


def _pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Summed norms of the pairs: [b, n, S, d] -> [n, P]."""
    first, second = x.chunk(2, -1)
    return torch.hypot(first, second).sum((0, 2))
