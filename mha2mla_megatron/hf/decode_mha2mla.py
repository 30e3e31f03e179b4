"""Attention of new tokens over a latent cache in the absorbed form: no key or value of a cached token is rebuilt.

With the up-projections absorbed into the query and the output, all heads attend over the same rows, [rotated keys of
all R heads | unrotated part]: a query row has its values in the rotated columns of the head that it reads, and zeros in
the others'. The same holds for a part that is not factored: full-rank K_nope or V is a latent whose up-projection is
the identity.

Shape letters: b batch, s new tokens, t cached tokens (the new ones among them), H query heads, G key/value heads, R
heads of rotated keys (G, or 1 that all share), r rotated dims per head, w width of the unrotated part, k and v widths
of its key and value columns (both c for joint).
"""

from __future__ import annotations

from typing import Any

import torch

from .decode_packed_mha2mla import flash_decode_packed
from .decode_triton_mha2mla import flash_decode, has_triton
from .layout_mha2mla import LatentLayout
from .static_cache_mha2mla import StaticLatentLayer


def absorbed_is_cheaper(layout: LatentLayout, new_tokens: int) -> bool:
    """The cost rule of `mla_decode=auto`: fewer multiplications per cached row.

    Expanded: each row's latents are multiplied by the up-projections, once, and then its keys and values by H s query
    rows of head dims r + n and d. Absorbed: nothing is rebuilt, but the H s query rows are as wide as the cache.
    """
    rows = layout.num_attention_heads * new_tokens
    rebuild = layout.key_rank * layout.nope_dim + layout.value_rank * layout.value_dim
    keys, values = layout.key_columns, layout.value_columns
    absorbed_width = layout.rope_dim + keys.stop - keys.start + values.stop - values.start
    return rows * absorbed_width <= rebuild + rows * (layout.qk_head_dim + layout.head_dim)


def spread_over_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[b, H, s, n] -> [b, H, s, G n]: each head's values in its own group's columns, zeros in the others'."""
    batch, heads, length, n = x.shape
    x = x.view(batch, groups, heads // groups, length, n).permute(0, 2, 3, 4, 1)
    return torch.diag_embed(x, dim1=1, dim2=4).reshape(batch, heads, length, groups * n)


def own_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[b, H, s, G n] -> [b, H, s, n]: each head's own group's columns."""
    batch, heads, length, width = x.shape
    x = x.view(batch, groups, heads // groups, length, groups, width // groups)
    return x.diagonal(dim1=1, dim2=4).movedim(-1, 1).reshape(batch, heads, length, width // groups)


def visible_rows(mask: Any, new_tokens: int, static: bool, hidden: bool = False) -> tuple[torch.Tensor | None, bool]:
    """(mask, usable): the mask of transformers' attention functions in the form of `absorbed_attention`.

    4-D masks (sdpa, eager) are used as they are, the 2-D padding mask [b, t] of flash attention for one new token. No
    mask means that a single token sees every row, which is so unless the cache is static. Others (causal with no mask,
    flex attention's) are not usable, and none but the 4-D ones where a sliding window leaves rows `hidden`.
    """
    if mask is None:
        return None, new_tokens == 1 and not static and not hidden
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and new_tokens == 1 and not hidden:
        return mask[:, None, None, :].bool(), True
    return mask, isinstance(mask, torch.Tensor) and mask.dim() == 4


def absorbed_attention(
    q_rope: torch.Tensor,
    q_key: torch.Tensor,
    k_rope: torch.Tensor,
    unrotated: torch.Tensor,
    layout: LatentLayout,
    mask: torch.Tensor | None,
    scaling: float,
    kernel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over cached rows.

    q_rope [b, H, s, R r]; q_key [b, H, s, k]; k_rope [b, t, R r]; unrotated [b, t, w]; mask: None (every token sees
    every row), bool (true is visible) or additive [1 or b, 1, s, t]. kernel: whether the Triton kernel may run.
    Returns the averaged value columns [b, H, s, v] in the input's type and the probabilities [b, H, s, t] where they
    were computed (the kernel has none).
    """
    batch, heads, length, _ = q_rope.shape
    keys, values = layout.key_columns, layout.value_columns
    if (
        kernel
        and has_triton(unrotated)
        and q_rope.dtype == q_key.dtype == k_rope.dtype == unrotated.dtype
        and (mask is None or mask.dtype == torch.bool)
        and not (torch.is_grad_enabled() and (q_key.requires_grad or unrotated.requires_grad))
    ):
        return flash_decode(q_rope, q_key, k_rope, unrotated, keys, values, mask, scaling), None
    scores = _wide_bmm(q_key.flatten(1, 2), unrotated[..., keys].transpose(1, 2))
    scores = scores + _wide_bmm(q_rope.flatten(1, 2), k_rope.transpose(1, 2))
    scores = scores.view(batch, heads, length, -1) * scaling
    if mask is not None:
        # The smallest number, not -inf: a padding token sees nothing, and NaN would spread from it.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(dim=-1).to(unrotated.dtype)
    context = torch.bmm(probabilities.flatten(1, 2), unrotated[..., values])
    return context.view(batch, heads, length, -1), probabilities


def reads_packed(layer: StaticLatentLayer, hidden_states: torch.Tensor, mask: Any) -> bool:
    """Whether the packed kernel can attend over this layer's cache: one new token of a model on a GPU with Triton, a
    bool mask, tokens in the cache already, and groups of a power of two."""
    return (
        hidden_states.shape[1] == 1
        and has_triton(hidden_states)
        and layer.is_initialized
        and layer.group_size & (layer.group_size - 1) == 0
        and isinstance(mask, torch.Tensor)
        and mask.dtype == torch.bool
        and mask.shape[1:] == (1, 1, layer.max_cache_len)
        and hidden_states.dtype == layer.dtype
    )


def packed_attention(
    q_rope: torch.Tensor,
    q_key: torch.Tensor,
    layer: StaticLatentLayer,
    layout: LatentLayout,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """`absorbed_attention` of one new token over the codes themselves, where `reads_packed` says so."""
    unrotated, rope = layer.parts
    return flash_decode_packed(
        q_rope, q_key, rope, unrotated, layout.key_columns, layout.value_columns, layer.cumulative_length, mask, scaling
    )


def _wide_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 at least. Scores rounded to 16 bits would be off by up to 0.1 where they are near 30."""
    if a.dtype.itemsize >= 4:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a, b).float()
