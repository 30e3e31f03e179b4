"""What one rotated key head for all query heads costs: an original model with the head that TransMLA keeps.

    python tools/benchmarks/shared_rope.py ORIGINAL statistics.safetensors DST rope=64 rank=56
    python tools/evaluate_perplexity.py ORIGINAL DST heldout.txt

The planes of one frequency in all key/value heads are mixed by a unitary matrix, which commutes with the rotation
(TransMLA, arXiv 2502.07864): by the principal components of their keys, of which the first keeps its rotation. The
others, the other frequencies and the values share one latent, as in a conversion with statistics. DST is a DeepSeek-V2
model with an ordinary rotary table: every (d / rope)-th of the original's frequencies, each once.

Shape letters: h hidden size, H query heads, G key/value heads, d head dim, P = d/2 pairs, R rotated dims in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.calibration.metric import Metric, make_columns, make_rows
from mha2mla_megatron.calibration.pairs import apply_query_map, fit_query_map, pair_losses, per_group
from mha2mla_megatron.calibration.statistics import LayerStatistics, Statistics, model_fingerprint
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.deepseek_layout import (
    DeepseekAttention,
    DeepseekSettings,
    require_plain,
    rope_parameters,
    write_deepseek,
)
from mha2mla_megatron.errors import UserError, require_at_least, run_tool
from mha2mla_megatron.frequencies import inverse_frequencies
from mha2mla_megatron.low_rank import factorise
from mha2mla_megatron.settings import load_settings

USAGE = "shared_rope.py ORIGINAL STATISTICS DST [key=value ...]"
DAMPING = 1e-5


@dataclass(frozen=True)
class SharedRopeSettings(DeepseekSettings):
    rope: int = 64
    """R, dims of the shared head; divides d."""

    rank: int = 56
    """c, width of the latent."""

    weighted: bool = True
    """Weigh each head's keys by what the loss of their rotation changes; false: by their energy alone, as TransMLA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("rope", self.rope, 2)
        require_at_least("rank", self.rank, 1)


def main(argv: list[str]) -> None:
    (name, file, target), overrides, config = split_words(argv, USAGE, 3, 3, schema=SharedRopeSettings)
    settings = load_settings(SharedRopeSettings, overrides, config)
    source = resolve_model(name)
    model = read_architecture(source)
    require_plain(model, name)
    if model.head_dim % settings.rope or settings.rope % 2:
        raise UserError(f"rope: {settings.rope} is not an even divisor of head_dim {model.head_dim}")
    reader = HFReader(source, model)
    statistics = Statistics(Path(file), model, model_fingerprint(reader, model))
    kept = torch.arange(0, model.head_dim // 2, model.head_dim // settings.rope)

    def attention(layer: int) -> DeepseekAttention:
        weights = [reader[f"model.layers.{layer}.self_attn.{x}_proj.weight"].double() for x in "qkv"]
        q, k, v = (weight.unflatten(0, (-1, model.head_dim)) for weight in weights)
        sums = statistics.layer(layer, torch.device("cpu"))
        return share_rope(q, k, v, kept, sums, statistics.tokens, settings)

    rope = rope_parameters(model, inverse_frequencies(model)[kept])
    write_deepseek(source, Path(target), settings, model, reader, attention, rope)
    print(f"{target}: {settings.rope} + {settings.rank} cached elements per token and layer")


def share_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    sums: LayerStatistics,
    tokens: int,
    settings: SharedRopeSettings,
) -> DeepseekAttention:
    """One layer. q [H, d, h], k and v [G, d, h], float64; kept: int64 [R/2], the pairs with a rotated component."""
    groups, d, _ = k.shape
    per_group_heads = len(q) // groups
    keys = torch.complex(*k.chunk(2, 1)).transpose(0, 1)  # [P, G, h]
    covariance = keys @ (sums.input_moment / tokens).to(keys.dtype) @ keys.mH  # [P, G, G]
    weight = torch.ones(groups, d // 2, dtype=torch.float64)
    if settings.weighted:
        moments = sums.score_moments / tokens
        lost = per_group(pair_losses(moments, fit_query_map(moments)), groups)
        weight = (lost / covariance.diagonal(dim1=1, dim2=2).real.T.clamp_min(1e-30)).clamp_min(1e-12).sqrt()
    weight = weight.T[kept].to(keys.dtype)  # [R/2, G]
    first = torch.linalg.eigh(weight[..., None] * covariance[kept] * weight[:, None]).eigenvectors[..., -1]  # [R/2, G]
    shared = torch.einsum("pg,pgh->ph", first.conj() * weight, keys[kept])  # [R/2, h]
    part = first / weight  # of the shared key in each head's
    keys[kept] -= part[..., None] * shared[:, None]
    k_nope = torch.cat((keys.real, keys.imag), 0).transpose(0, 1)  # [G, d, h], half-split
    queries = torch.complex(*q.chunk(2, 1))[:, kept] * part.conj().T.repeat_interleave(per_group_heads, 0)[..., None]
    query_map = fit_query_map(sums.loss_moments)
    order, nothing = torch.arange(d).repeat(groups, 1), torch.empty(groups, 0, dtype=torch.int64)
    rows = make_rows("outputs", sums, tokens, query_map, order, 0, DAMPING)
    metric = Metric(rows, make_columns("outputs", sums, tokens, DAMPING))
    up, down = factorise(torch.cat((k_nope.flatten(0, 1), v.flatten(0, 1))), settings.rank, "up", metric)
    k_up, v_up = (
        part.unflatten(0, (groups, d)).repeat_interleave(per_group_heads, 0) for part in up.chunk(2)
    )  # [H, d, c]
    return DeepseekAttention(
        apply_query_map(q, query_map, nothing), _interleaved(queries), _interleaved(shared), down, k_up, v_up
    )


def _interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Complex [..., R/2, h] -> [..., R, h]."""
    return torch.stack((rows.real, rows.imag), -2).flatten(-3, -2)


if __name__ == "__main__":
    run_tool(main)
