"""The quantised latent cache of fixed size: what `torch.compile` and CUDA graphs take, and the packed kernel reads.

The same settings, groups and window as `LatentQuantizedCache`, and so the same numbers; but all memory is allocated at
the first update, and nothing can be removed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .latent_cache_mha2mla import check_settings
from .packed_tokens_mha2mla import PackedTokens


class StaticLatentLayer(CacheLayerMixin):
    """One layer: its unrotated part and its rotated keys, each in `PackedTokens`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, max_cache_len: int, nbits: int, rope_nbits: int, group_size: int, residual_length: int) -> None:
        super().__init__()
        self.max_cache_len, self.bits = max_cache_len, (nbits, rope_nbits)
        self.group_size, self.residual_length = group_size, residual_length
        self.parts: tuple[PackedTokens, ...] = ()
        """Unrotated part, rotated keys."""
        self.empty = True
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        """Tokens in the cache, on its device."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.parts = tuple(
            PackedTokens(states[:, 0], self.max_cache_len, nbits, self.group_size, self.residual_length)
            for states, nbits in zip((key_states, value_states), self.bits, strict=True)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in [self.cumulative_length, *self.tensors]:
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens [b, 1, s, .]. Returns all tokens dequantised [b, 1, max_cache_len, .], the new ones exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states[:, 0], value_states[:, 0]
        if self.empty:  # a prefill need not read what is not there
            seen = [
                rows.new_zeros(rows.shape[0], self.max_cache_len, rows.shape[2]).index_copy_(
                    1, torch.arange(rows.shape[1], device=rows.device), rows
                )
                for rows in new
            ]
        else:
            seen = [part.dequantize(rows, self.cumulative_length) for part, rows in zip(self.parts, new, strict=True)]
        self.append(*new)
        return seen[0][:, None], seen[1][:, None]

    def append(self, unrotated: torch.Tensor, k_rope: torch.Tensor) -> None:
        """Add tokens [b, s, .] without reading any."""
        for part, rows in zip(self.parts, (unrotated, k_rope), strict=True):
            part.append(rows, self.cumulative_length)
        self.cumulative_length.add_(unrotated.shape[1])
        self.empty = False

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and the windows."""
        return sum(part.nbytes for part in self.parts)

    def reset(self) -> None:
        self.cumulative_length.zero_()
        self.empty = True

    def crop(self, tokens_to_remove: int) -> None:
        """Assisted decoding calls it after each guess. Raises ValueError."""
        raise ValueError("crop: a latent cache of fixed size cannot remove tokens; leave out static")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for tensor in self.tensors:  # in place: graphs know the addresses
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


class StaticLatentCache(Cache):
    """A quantised cache of fixed size for a converted model, for `past_key_values`.

    max_cache_len: tokens that there is room for; the other settings are those of `LatentQuantizedCache`.
    Raises ValueError for other settings and for a model that was not converted.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        nbits: int = 4,
        rope_nbits: int | None = None,
        group_size: int = 32,
        residual_length: int = 64,
    ) -> None:
        settings = check_settings(config, nbits, rope_nbits, group_size, residual_length)
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"max_cache_len: {max_cache_len!r} is not a positive number")
        super().__init__(layers=[StaticLatentLayer(max_cache_len, *settings) for _ in range(config.num_hidden_layers)])

    def require_room(self, tokens: int) -> None:
        """Raise ValueError where so many tokens in all do not fit: a GPU would only say so after the damage."""
        room = self.layers[0].max_cache_len  # type: ignore[attr-defined]
        if tokens > room:
            raise ValueError(f"max_cache_len: {room} tokens fit, but prompt and answer may take {tokens}")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache: codes, scales, zeros and the windows."""
        return sum(layer.nbytes for layer in self.layers)  # type: ignore[attr-defined]


__all__ = ["StaticLatentCache"]
