"""The latent cache in 8, 4 or 2 bits: packed blocks of old tokens, the newest tokens in full precision.

As everywhere here, a layer's "keys" are the unrotated part [b, 1, t, w] and its "values" the rotated keys
[b, 1, t, G r]. They are dequantised when read, for both forms of attention. A forward sees its own tokens, and those
still in the window, in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .quantise_mha2mla import QuantizedRows

NBITS = (2, 4, 8)
ROPE_NBITS = (2, 4, 8, 16)


class LatentQuantizedLayer(DynamicLayer):
    """One layer. The window, in `self.keys` and `self.values`, holds from residual_length to residual_length +
    group_size - 1 of the newest tokens (all, where there are fewer); whole groups leave it."""

    is_croppable = True

    def __init__(self, nbits: int, rope_nbits: int, group_size: int, residual_length: int) -> None:
        super().__init__()
        self.group_size, self.residual_length = group_size, residual_length
        self.packed = QuantizedRows(nbits, group_size), QuantizedRows(rope_nbits, group_size)
        self.record_past = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        old = [rows.dequantize(new) for rows, new in zip(self.packed, (key_states, value_states), strict=True)]
        super().update(key_states, value_states)
        keys, values = (torch.cat(parts, dim=-2) for parts in zip(old, self._window(), strict=True))
        if not self.record_past:
            self._pack_overflow()
        return keys, values

    def get_seq_length(self) -> int:
        return self.packed[0].tokens + super().get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and the window."""
        window = self._window() if self.is_initialized else ()
        return sum(rows.nbytes for rows in self.packed) + sum(part.numel() * part.element_size() for part in window)

    def activate_past_recording(self) -> None:
        """Let nothing leave the window before `crop`, which assisted decoding calls after each guess: what is rolled
        back leaves no trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (a number below 0; 0 removes none). Exact, because it removes from
        the window only. Raises ValueError for more than that holds."""
        window = super().get_seq_length()
        if not -window <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop: {tokens_to_remove} is not from {-window} to 0; older tokens than the window's {window} are "
                "quantised in groups and stay"
            )
        if self.is_initialized:
            stop = window + tokens_to_remove
            self.keys, self.values = (part[..., :stop, :].clone() for part in self._window())
            self._pack_overflow()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.packed = tuple(QuantizedRows(rows.nbits, rows.group_size) for rows in self.packed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._apply(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        self._apply(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._apply(lambda part: part.to(self.device, non_blocking=True))

    def _window(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _pack_overflow(self) -> None:
        groups = (super().get_seq_length() - self.residual_length) // self.group_size
        if groups < 1:
            return
        cut = groups * self.group_size
        for rows, part in zip(self.packed, self._window(), strict=True):
            rows.append(part[..., :cut, :])
        # Copies: a view would keep the whole prefill in memory.
        self.keys, self.values = (part[..., cut:, :].clone() for part in self._window())

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = (function(part) for part in self._window())
        for rows in self.packed:
            rows.apply(function)


def check_settings(
    config: Any, nbits: int, rope_nbits: int | None, group_size: int, residual_length: int
) -> tuple[int, int, int, int]:
    """(nbits, rope_nbits, group_size, residual_length), the second set. Raises ValueError for bad ones."""
    if not getattr(config, "mha2mla", None):
        raise ValueError("LatentQuantizedCache: config is not that of a model converted by mha2mla_megatron")
    if nbits not in NBITS:
        raise ValueError(f"nbits: {nbits!r} is not one of {', '.join(map(str, NBITS))}")
    rope_nbits = max(nbits, 4) if rope_nbits is None else rope_nbits
    if rope_nbits not in ROPE_NBITS:
        raise ValueError(f"rope_nbits: {rope_nbits!r} is not one of {', '.join(map(str, ROPE_NBITS))}")
    if not isinstance(group_size, int) or group_size < 4 or group_size % 4:
        raise ValueError(f"group_size: {group_size!r} is not a positive multiple of 4")
    if not isinstance(residual_length, int) or residual_length < 0:
        raise ValueError(f"residual_length: {residual_length!r} is not a number from 0 on")
    return nbits, rope_nbits, group_size, residual_length


class LatentQuantizedCache(Cache):
    """A quantised cache for a converted model. Give it to the model or to generate as `past_key_values`.

    nbits: 2, 4 or 8 for latents, and for full-rank K_nope and V where they are not factored.
    rope_nbits: 2, 4, 8 or 16 (float16) for the rotated keys; None: nbits, but 4 at least.
    group_size: consecutive tokens of a channel that share a scale and a zero; a multiple of 4.
    residual_length: the newest tokens that stay in full precision, at least.

    Raises ValueError for other settings and for a model that was not converted.
    """

    def __init__(
        self,
        config: Any,
        nbits: int = 4,
        rope_nbits: int | None = None,
        group_size: int = 32,
        residual_length: int = 64,
    ) -> None:
        settings = check_settings(config, nbits, rope_nbits, group_size, residual_length)
        super().__init__(layers=[LatentQuantizedLayer(*settings) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache: codes, scales, zeros and the windows."""
        return sum(layer.nbytes for layer in self.layers)  # type: ignore[attr-defined]


__all__ = ["LatentQuantizedCache"]
