"""What a model keeps per token, measured on the cache object that it returns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mha2mla_megatron.checkpoint.causal_lm import loading


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


def planned_cache_bytes_per_token(name: str, config: Any, dtype: torch.dtype | str) -> float:
    """As `cache_bytes_per_token`, of a model of this config that is not there: on the meta device, without weights.

    dtype: of its weights; "auto": as its config says. Raises UserError, naming the model, for a config of which
    transformers makes none.
    """
    from transformers import AutoModelForCausalLM

    with loading(name):
        with torch.device("meta"):
            chosen = {} if dtype == "auto" else {"dtype": dtype}
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **chosen)
        return cache_bytes_per_token(model.eval())


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors that an object holds, however deep: of a cache its codes, scales, zeros and window."""
    return sum(map(_tensor_bytes, _tensors(value)))


def fork(cache: Any) -> Any:
    """A copy that goes on by itself. The tensors are shared: transformers' dynamic and quantised caches, and ours, put
    new ones in their places and never write into them. (Quanto's tensors could not be copied by deepcopy.)"""
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in _tensors(cache)})


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    for part in parts:
        yield from _tensors(part)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # a tensor made of others, such as quanto's
        return sum(_tensor_bytes(getattr(tensor, name)) for name in flatten()[0])
    return tensor.numel() * tensor.element_size()
