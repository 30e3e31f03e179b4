"""The original model, a part of it in memory at a time: a decoder layer, which can run with converted attention; the
head.

Shape letters: b sequences, S tokens of each, h hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.causal_lm import loading
from mha2mla_megatron.checkpoint.hf import HFReader


class OriginalModel:
    """A Hugging Face causal LM whose weights are read from its mapped files when a part of it is asked for.

    Weights are of `dtype`, on `device`, get no gradient and are freed with the part. Hidden states are of `dtype` too.

    Raises UserError for a config.json of which transformers makes no model.
    """

    def __init__(
        self,
        reader: HFReader,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.reader, self.architecture, self.device, self.dtype = reader, architecture, device, dtype
        with loading(str(reader.folder)):
            config = AutoConfig.from_pretrained(reader.folder)
            with torch.device("meta"):
                self._skeleton: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
        self._rotary: nn.Module = type(self._skeleton.model.rotary_emb)(config).to(device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [b, S] -> [b, S, h]. Of the table only the rows of these tokens are read."""
        rows = self.reader["model.embed_tokens.weight"][tokens.cpu()]
        return rows.to(self.device).to(self.dtype)

    def layer(self, index: int) -> Layer:
        return Layer(self, index, self._load(f"model.layers.{index}"))

    def head(self) -> Head:
        return Head(self._load("model.norm"), self._load("lm_head"))

    def tables(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions 0 to S - 1."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self._rotary(hidden, positions)

    def mask(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a layer with a sliding window sees, bool [1, 1, S, S]; None: all tokens up to a query's own."""
        window, length = self.architecture.window(layer), hidden.shape[1]
        if window is None or length <= window:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device)
        return seen.tril().triu(1 - window)[None, None]

    def _load(self, part: str) -> nn.Module:
        """A part of the model by its module's name, with its weights."""
        module = copy.deepcopy(self._skeleton.get_submodule(part))
        module.load_state_dict({name: self._read(f"{part}.{name}") for name in module.state_dict()}, assign=True)
        return module

    def _read(self, name: str) -> torch.Tensor:
        if name == "lm_head.weight" and self.architecture.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        experts = self.architecture.experts
        stacked = None if experts is None else experts.stacked(name, self._tensor)
        return self._tensor(name) if stacked is None else stacked

    def _tensor(self, name: str) -> torch.Tensor:
        """One of the files'."""
        return self.reader[name].to(self.device).to(self.dtype)  # goes to a GPU in the type that it is stored in


class Layer:
    """A decoder layer and its weights."""

    def __init__(self, model: OriginalModel, index: int, module: Any) -> None:
        self.model, self.index, self.module = model, index, module

    def run(self, hidden: torch.Tensor, attention: nn.Module | None = None) -> torch.Tensor:
        """[b, S, h] -> [b, S, h], causal. attention: takes the place of the layer's own."""
        own = self.module.self_attn
        self.module.self_attn = own if attention is None else attention
        try:
            return self.module(
                hidden,
                attention_mask=self.model.mask(self.index, hidden),
                position_embeddings=self.model.tables(hidden),
            )
        finally:
            self.module.self_attn = own

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer's attention gets: [b, S, h]."""
        return self.module.input_layernorm(hidden)

    def attention(self, inputs: torch.Tensor) -> torch.Tensor:
        """The attention's output, [b, S, h], for `normed` inputs."""
        model = self.model
        return run_attention(self.module.self_attn, inputs, model.tables(inputs), model.mask(self.index, inputs))


class Head:
    """What makes logits of the last layer's output: the final norm and the output projection [V, h]."""

    def __init__(self, norm: Any, output: Any) -> None:
        self.norm, self.output = norm, output

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token, from what the last layer puts out: [b, S, V], float32."""
        return self.output(self.norm(hidden)).float().log_softmax(-1)


def run_attention(
    attention: nn.Module,
    inputs: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention's output for inputs [b, S, h]. mask: of `OriginalModel.mask`."""
    return attention(hidden_states=inputs, position_embeddings=tables, attention_mask=mask)[0]
