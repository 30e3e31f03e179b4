"""Perplexity through a cache: tokens attend to what a quantised cache gives back, as they do when a model generates.

A window is fed in chunks. A chunk sees itself in full precision and what precedes it as the cache holds it, so that
with small chunks most of the attention is over quantised rows. The tokens predicted are those of evaluation without a
cache.

Shape letters: b windows in a batch, t tokens in a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.evaluation.cache import stored_bytes
from mha2mla_megatron.hf.backend_cache_mha2mla import quantized_cache

BACKENDS = {"int": "latent", "hqq": "hqq", "quanto": "quanto"}
KINDS = ("full", "int8", "int4", "int2", "hqq8", "hqq4", "hqq2", "quanto4", "quanto2")
"""Words of the setting `cache`. full: transformers' DynamicCache; int: `LatentQuantizedCache`."""


def check_options(kinds: Sequence[str | None], options: Mapping[str, int]) -> None:
    """Raise UserError for `cache_options` that no cache of these kinds would take."""
    if "nbits" in options:
        raise UserError("cache_options: nbits is a part of the cache's name, such as int4 and hqq2")
    if options and all(kind in (None, "full") for kind in kinds):
        raise UserError(f"cache_options: '{next(iter(options))}' is given, but no quantised cache is asked for")


def make_cache(model: str, config: Any, kind: str, options: Mapping[str, int]) -> Any:
    """An empty cache for a model of this config. options: as in `cache_config`. Raises UserError naming the model."""
    from transformers import DynamicCache

    if kind == "full":
        return DynamicCache()
    word, nbits = re.split(r"(?=\d)", kind)
    settings: dict[str, Any] = {"nbits": int(nbits), **options}
    try:
        return quantized_cache(config, BACKENDS[word], **settings)
    except (ValueError, ImportError) as error:
        raise UserError(f"{model}: cache={kind}: {first_line(error)}") from None


def window_nll_through(
    cache: Any, model: Any, windows: torch.Tensor, predicted: int, chunk: int
) -> tuple[torch.Tensor, int]:
    """(summed negative log-likelihood in nats of the last `predicted` tokens of each window, bytes of the full cache).

    windows: int64 [b, t], on the model's device; cache: an empty one. The sums are float64 [b] on the CPU.
    """
    batch, length = windows.shape
    total = torch.zeros(batch, dtype=torch.float64)
    with torch.inference_mode():
        for start, logits in prefill(cache, model, windows, chunk, wanted=min(predicted + 1, length)):
            targets = windows[:, start + 1 : start + 1 + logits.shape[1]]
            logits = logits[:, : targets.shape[1]]  # the last token of a window predicts nothing
            nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            total += nll.view(batch, -1).double().sum(dim=1).cpu()
    return total, stored_bytes(cache)


def prefill(cache: Any, model: Any, ids: torch.Tensor, chunk: int, wanted: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed int64 ids [b, t] through a cache; yields the logits of the last `wanted` places, chunk by chunk.

    Each comes as (the first place it is of, logits [b, n, V]); the other places' are not computed.
    """
    first = ids.shape[1] - wanted
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        keep = min(start + piece.shape[1] - first, piece.shape[1])
        logits = model(input_ids=piece, past_key_values=cache, logits_to_keep=max(keep, 1)).logits
        if keep > 0:
            yield start + piece.shape[1] - keep, logits
