"""The original model, run layer by layer, with attention layers that can be swapped for converted ones.

Shape letters: b sequences, S tokens of each, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm


class OriginalModel:
    """A Hugging Face causal LM in float32 whose weights get no gradient."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model: Any = load_causal_lm(str(folder), folder, torch.float32, device).requires_grad_(False)
        self.layers: nn.ModuleList = self.model.model.layers
        self.device = device
        self.architecture = read_architecture(folder)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [b, S] -> [b, S, h]."""
        return self.model.get_input_embeddings()(tokens)

    def tables(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions 0 to S - 1."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.model.model.rotary_emb(hidden, positions)

    def mask(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a layer with a sliding window sees, bool [1, 1, S, S]; None: all tokens up to a query's own."""
        window, length = self.architecture.window(layer), hidden.shape[1]
        if window is None or length <= window:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device)
        return seen.tril().triu(1 - window)[None, None]

    def run_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[b, S, h] -> [b, S, h], attention causal."""
        module: Any = self.layers[layer]
        return module(hidden, attention_mask=self.mask(layer, hidden), position_embeddings=self.tables(hidden))

    def normed(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer's attention gets: [b, S, h]."""
        module: Any = self.layers[layer]
        return module.input_layernorm(hidden)

    def attention(self, layer: int, inputs: torch.Tensor) -> torch.Tensor:
        """The attention's output, [b, S, h], for `normed` inputs."""
        module: Any = self.layers[layer]
        return run_attention(module.self_attn, inputs, self.tables(inputs), self.mask(layer, inputs))

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token, from what the last layer puts out: [b, S, V], float32."""
        return self.model.get_output_embeddings()(self.model.model.norm(hidden)).float().log_softmax(-1)

    @contextmanager
    def swapped(self, layer: int, attention: nn.Module) -> Iterator[None]:
        """Within the block, one layer's attention is `attention`."""
        module: Any = self.layers[layer]
        before = module.self_attn
        module.self_attn = attention
        try:
            yield
        finally:
            module.self_attn = before


def run_attention(
    attention: nn.Module,
    inputs: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention's output for inputs [b, S, h]. mask: of `OriginalModel.mask`."""
    return attention(hidden_states=inputs, position_embeddings=tables, attention_mask=mask)[0]
