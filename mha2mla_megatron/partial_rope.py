"""Partial RoPE: which rotary pairs each key/value head keeps, and the row order that puts them first.

Pair j of a head is made of dims j and j + d/2 (the Hugging Face half-split layout) and turns with the model's j-th
frequency. Paper section 3.1; docs/conversion.md lists the strategies.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mha2mla_megatron.config import SCORED_STRATEGIES, PartialRopeConfig
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import require_file


def kept_pairs(
    config: PartialRopeConfig,
    qk_rope_head_dim: int,
    num_key_value_heads: int,
    head_dim: int,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """The pairs of one layer that keep their rotation: int64 [G, r/2], ascending within a head.

    scores: float [G, d/2], needed by 2-norm and activation only; of equal scores the lower pair wins.
    """
    kept, pairs = qk_rope_head_dim // 2, head_dim // 2
    if config.strategy in SCORED_STRATEGIES:
        assert scores is not None and scores.shape == (num_key_value_heads, pairs)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :kept]
        return best.sort(dim=-1).values
    index = torch.arange(kept)
    if config.strategy == "low":
        index += pairs - kept
    elif config.strategy == "uniform" and kept:
        index = config.uniform_start + index * head_dim // qk_rope_head_dim
    elif config.strategy == "ends":
        high = (kept + 1) // 2 if config.ends_high_pairs is None else config.ends_high_pairs
        index[high:] += pairs - kept
    return index.repeat(num_key_value_heads, 1)


def head_row_order(pairs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Order of a head's rows that puts kept dims first: int64 [G, d], each row [r kept | d - r others].

    The kept part is half-split itself (first dims of all kept pairs, then their second dims); the others stay in
    their original order.

    pairs: int64 [G, r/2].
    """
    kept = torch.cat((pairs, pairs + head_dim // 2), dim=-1)
    is_kept = torch.zeros(len(pairs), head_dim, dtype=torch.bool).scatter_(1, kept, True)
    others = (~is_kept).nonzero()[:, 1].view(len(pairs), head_dim - kept.shape[1])
    return torch.cat((kept, others), dim=-1)


def ordered_heads(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The rows of every head, of queries or of keys, in its key/value head's order.

    rows: [heads * d, ...]; order: int64 [G, d]. Returns [G, heads / G, d, ...].
    """
    heads = rows.unflatten(0, (len(order), -1, order.shape[1]))
    index = order.view(len(order), 1, order.shape[1], *[1] * (heads.dim() - 3)).expand_as(heads)
    return heads.gather(2, index)


def load_scores(
    file: Path, num_layers: int, num_key_value_heads: int, head_dim: int, key: str = "partial_rope.scores"
) -> torch.Tensor:
    """Scores of every pair, higher is better: float32 [L, G, d/2].

    Reads a safetensors file (the tensor `scores`, or its only one) or the original project's qk_tensor_*.pth: uint8
    ranks [L, G, d], 0 = best, the same for both dims of a pair, or its older float scores [L, G, d/2]. key: the
    setting that errors name.

    Raises UserError for a missing or damaged file, another shape, or numbers that are not finite.
    """
    require_file(file, key)
    scores = _load_pth(file, key) if file.suffix in (".pth", ".pt") else _load_safetensors(file, key)
    ranks = (num_layers, num_key_value_heads, head_dim)
    expected = (num_layers, num_key_value_heads, head_dim // 2)
    if not scores.is_floating_point():
        if tuple(scores.shape) != ranks:
            raise UserError(f"{key}: {file}: ranks of shape {tuple(scores.shape)}, needed {ranks}")
        scores = scores.to(torch.float32)
        first, second = scores.chunk(2, dim=-1)
        if not torch.equal(first, second):
            raise UserError(f"{key}: {file}: dims j and j + d/2 have different ranks")
        return -first
    if tuple(scores.shape) != expected:
        raise UserError(f"{key}: {file}: shape {tuple(scores.shape)}, needed {expected} (L, G, d/2)")
    if not torch.isfinite(scores).all():
        raise UserError(f"{key}: {file}: holds numbers that are not finite")
    return scores.to(torch.float32)


def _load_pth(file: Path, key: str) -> torch.Tensor:
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{key}: {file}: cannot be read ({first_line(error)})") from None
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{key}: {file}: holds a {type(tensor).__name__}, not one tensor")
    return tensor


def _load_safetensors(file: Path, key: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            if "scores" not in names and len(names) != 1:
                raise UserError(f"{key}: {file}: no tensor named 'scores'")
            return tensors.get_tensor("scores" if "scores" in names else names[0])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {file}: not a safetensors file ({first_line(error)})") from None
