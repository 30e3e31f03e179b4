"""Every quantised cache that `generate(cache_implementation="quantized")` can ask for by `cache_config["backend"]`.

`latent` is ours. `hqq` and `quanto` are transformers' own layers, made fit for any shape: they quantise a whole tensor
[b, 1, t, w] at once, which fails where t w is no multiple of the group or of the values in a byte, where it is empty
(r = 0), and for beams, whose order is lost in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, HQQQuantizedLayer, QuantizedCache, QuantizedLayer, QuantoQuantizedLayer

from .latent_cache_mha2mla import LatentQuantizedCache
from .static_cache_mha2mla import StaticLatentCache

ROWS_PER_BYTE = 8
"""Packing joins at most so many rows (of 1 bit) in a byte, and wants whole bytes."""


class _Groups(QuantizedLayer):
    """Quantises all sequences in one call, as a matrix with a group in each row: none holds parts of two sequences.

    Groups are as long as `q_group_size` or a little shorter, so that whole groups fill a row (or a column) with next to
    no padding. The order of the sequences is kept beside the matrix, whose packing joins rows: it changes without a
    copy, and lasts until all of it is quantised again.
    """

    is_croppable = False

    within_row: int
    """The backend's number of the axis whose groups lie in a row of the tensor."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> dict[str, Any]:
        """tensor [b, heads, t, w]."""
        if tensor.numel() == 0:
            return {"empty": tensor}
        sequences = tensor.flatten(1, 2)
        length, width = sequences.shape[1:]
        limit = self.q_group_size
        rows, size = (0, width) if axis == self.within_row else (1, length)
        count = math.ceil(size / limit)
        self.q_group_size = math.ceil(size / count)
        if rows == 0:
            length, width = _round_up(length), count * self.q_group_size
        else:
            length, width = count * self.q_group_size, _round_up(width)
        padded = _repeat_last(_repeat_last(sequences, 1, length), 2, width)
        groups = padded.unflatten(2, (count, -1)) if rows == 0 else padded.unflatten(1, (count, -1)).movedim(2, -1)
        try:
            packed = super()._quantize(groups.flatten(0, -2), self.within_row)  # type: ignore[safe-super]
        finally:
            self.q_group_size = limit
        return {"packed": packed, "groups": groups.shape, "rows": rows, "shape": tensor.shape, "order": None}

    def _dequantize(self, q_tensor: dict[str, Any]) -> torch.Tensor:
        if "empty" in q_tensor:
            return q_tensor["empty"]
        matrix: Any = super()._dequantize(q_tensor["packed"])  # type: ignore[safe-super]
        groups = matrix.view(q_tensor["groups"])
        padded = groups.flatten(2) if q_tensor["rows"] == 0 else groups.movedim(-1, 2).flatten(1, 2)
        _, heads, length, width = q_tensor["shape"]
        sequences = padded[:, : heads * length, :width].unflatten(1, (heads, length))
        return sequences if q_tensor["order"] is None else sequences[q_tensor["order"]]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda sequences: sequences.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda sequences: sequences[indices.to(sequences.device)])

    def _select(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        both: tuple[Any, Any] = self._quantized_keys, self._quantized_values
        for stored in both:
            if "empty" in stored:
                stored["empty"] = chosen(stored["empty"])
                continue
            order = stored["order"]
            stored["order"] = chosen(torch.arange(stored["shape"][0], device=self.device) if order is None else order)
        if self.keys is not None and self.values is not None and self.keys.dim() > 1:  # emptied, they have one dim
            self.keys, self.values = chosen(self.keys), chosen(self.values)

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' would shorten the window alone and lose count of its tokens."""
        if tokens_to_remove:
            raise ValueError("crop: the hqq and quanto caches cannot remove tokens; use backend latent")


class HQQLatentLayer(_Groups, HQQQuantizedLayer):
    within_row = 1


class QuantoLatentLayer(_Groups, QuantoQuantizedLayer):
    within_row = 0


LAYERS: dict[str, Callable[..., QuantizedLayer]] = {"hqq": HQQLatentLayer, "quanto": QuantoLatentLayer}
BACKENDS = ("latent", *LAYERS)
EXAMPLE = {"backend": "latent", "nbits": 4}


def cache_settings(cache_config: Any) -> dict[str, Any]:
    """A copy of what `generate` was given as `cache_config`. Raises ValueError for what is no dict of settings."""
    if cache_config is None:
        return {}
    if not isinstance(cache_config, Mapping) or not all(isinstance(key, str) for key in cache_config):
        raise ValueError(f"cache_config: {cache_config!r} is not a dict of settings, such as {EXAMPLE}")
    return dict(cache_config)


def quantized_cache(config: Any, backend: str = "quanto", static: bool = False, **settings: Any) -> Cache:
    """The cache that `cache_config` describes; quanto if it names no backend, as in transformers.

    backend: in any case, as LongBench's users write HQQ.
    static: whether it has a fixed size, which only backend latent can.
    settings: those of `LatentQuantizedCache` (or `StaticLatentCache`), or of transformers' `QuantizedCache` (nbits,
    axis_key, axis_value, q_group_size, residual_length). Raises ValueError for bad ones, ImportError where the backend
    is not installed.
    """
    given, backend = backend, str(backend).lower()
    if backend not in BACKENDS:
        raise ValueError(f"cache_config: backend {given!r} is not one of {', '.join(BACKENDS)}")
    if static and backend != "latent":
        raise ValueError(f"cache_config: static, but backend {backend} has no cache of fixed size; latent has")
    settings.pop("config", None)
    try:
        if backend == "latent":
            return (StaticLatentCache if static else LatentQuantizedCache)(config, **settings)
        cache = QuantizedCache(backend, config, **settings)
        cache.layers[:] = [LAYERS[backend](**settings) for _ in cache.layers]
    except TypeError as error:
        raise ValueError(f"cache_config: {error}") from None
    if settings.get("q_group_size", 1) < 1:
        raise ValueError(f"cache_config: q_group_size {settings['q_group_size']} is not a positive number")
    return cache


def _repeat_last(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """As long as `size`: repeated values, unlike zeros, widen no group's range."""
    places = torch.arange(size, device=tensor.device).clamp(max=tensor.shape[dim] - 1)
    return tensor.index_select(dim, places)


def _round_up(rows: int) -> int:
    return -(-rows // ROWS_PER_BYTE) * ROWS_PER_BYTE


__all__ = ["cache_settings", "quantized_cache"]
