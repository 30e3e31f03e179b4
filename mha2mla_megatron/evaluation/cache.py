"""What a model keeps per token, measured on the cache object that it returns."""

from __future__ import annotations

from typing import Any

import torch


def cache_bytes(model: Any, tokens: int, batch_size: int = 1) -> int:
    """Bytes of keys and values, of all layers, that a forward over int64 ids [batch_size, tokens] leaves behind.

    For a converted model "keys" and "values" are whatever it caches in their place: latents and rotated keys.
    """
    ids = torch.arange(batch_size * tokens, device=model.device) % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        cache = model(input_ids=ids.view(batch_size, tokens), use_cache=True).past_key_values
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None)
    return sum(part.numel() * part.element_size() for part in parts)


def cache_bytes_per_token(model: Any, tokens: int = 16) -> float:
    """Cached bytes per token and sequence, over a short sequence."""
    return cache_bytes(model, tokens) / tokens


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors that an object holds, however deep: of a cache its codes, scales, zeros and window."""
    if isinstance(value, torch.Tensor):
        flatten: Any = getattr(value, "__tensor_flatten__", None)
        if flatten is not None:  # a tensor made of others, such as quanto's
            return sum(stored_bytes(getattr(value, name)) for name in flatten()[0])
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(map(stored_bytes, value))
    if isinstance(value, dict):
        return sum(map(stored_bytes, value.values()))
    return stored_bytes(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else 0
