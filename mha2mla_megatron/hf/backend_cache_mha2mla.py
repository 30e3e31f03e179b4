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


class _PerSequence(QuantizedLayer):
    """Quantises each sequence by itself, as a matrix padded to what the backend takes.

    Groups are as long as `q_group_size` or a little shorter, so that whole groups fill a row (or a column) with next to
    no padding.
    """

    is_croppable = False

    def _quantize(self, tensor: torch.Tensor, axis: int) -> list[Any]:
        return [self._quantize_sequence(rows, axis) for rows in tensor]

    def _dequantize(self, q_tensor: list[Any]) -> torch.Tensor:
        return torch.stack([self._dequantize_sequence(*sequence) for sequence in q_tensor])

    def _quantize_sequence(self, rows: torch.Tensor, axis: int) -> tuple[torch.Size, Any]:
        """rows [heads, t, w]. Returns its shape and what the backend made of it, an empty tensor unchanged."""
        if rows.numel() == 0:
            return rows.shape, rows
        matrix = rows.flatten(0, 1)
        length, width = matrix.shape
        limit = self.q_group_size
        # Backends number their axes differently: quanto's 0 and HQQ's 1 are groups within a row.
        within_row = axis == (0 if isinstance(self, QuantoQuantizedLayer) else 1)
        groups = math.ceil((width if within_row else length) / limit)
        if within_row:
            self.q_group_size = math.ceil(width / groups)
            length, width = _round_up(length), groups * self.q_group_size
        else:
            self.q_group_size = _round_up(math.ceil(length / groups))
            length = groups * self.q_group_size
        # Repeated values, unlike zeros, widen no group's range.
        down, across = (
            torch.arange(size, device=rows.device).clamp(max=old - 1)
            for size, old in zip((length, width), matrix.shape, strict=True)
        )
        try:
            return rows.shape, super()._quantize(matrix[down][:, across], axis)  # type: ignore[safe-super]
        finally:
            self.q_group_size = limit

    def _dequantize_sequence(self, shape: torch.Size, quantized: Any) -> torch.Tensor:
        if 0 in shape:
            return quantized
        matrix: Any = super()._dequantize(quantized)  # type: ignore[safe-super]
        return matrix[: shape[0] * shape[1], : shape[2]].reshape(shape)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select([i for i in range(len(self._quantized_keys)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(len(self._quantized_keys), device=indices.device)[indices].tolist())

    def _select(self, indices: list[int]) -> None:
        self._quantized_keys = [self._quantized_keys[i] for i in indices]
        self._quantized_values = [self._quantized_values[i] for i in indices]
        if self.keys is not None and self.values is not None and self.keys.dim() > 1:  # emptied, they have one dim
            self.keys, self.values = self.keys[indices], self.values[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' would shorten the window alone and lose count of its tokens."""
        if tokens_to_remove:
            raise ValueError("crop: the hqq and quanto caches cannot remove tokens; use backend latent")


class HQQLatentLayer(_PerSequence, HQQQuantizedLayer):
    pass


class QuantoLatentLayer(_PerSequence, QuantoQuantizedLayer):
    pass


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


def _round_up(rows: int) -> int:
    return -(-rows // ROWS_PER_BYTE) * ROWS_PER_BYTE


__all__ = ["cache_settings", "quantized_cache"]
