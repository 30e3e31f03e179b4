"""Healing without labels: each converted attention layer is trained to put the residual stream back on its track.

Layers are healed from the first to the last. Two streams run side by side over the calibration sequences: the
original model's, and that of the model whose layers below are converted and healed already. A layer sees the second
stream, and its weights are moved (Adam, a few hundred steps) until what it adds brings that stream as near as it can
to where the original's attention leaves the first:

    minimise E |x' + A'(norm(x')) - (x + A(norm(x)))|^2

x, x': the streams before the layer; A, A': the original and the converted attention. So a layer also mends what the
layers below it broke. Only attention weights change; nothing is learnt from labels.

Shape letters: n sequences, S tokens of each, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.original import OriginalModel, run_attention
from mha2mla_megatron.converted_attention import make_attention
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout

WARM_UP = 20
"""Steps over which the learning rate rises."""


@dataclass(frozen=True)
class HealSettings:
    """Healing after the conversion."""

    steps: int = 0
    """Adam steps for each layer; 0: no healing."""

    batch_tokens: int = 4096
    """Tokens of a step."""

    sequence_length: int = 512
    """Sequences of the statistics file are cut to this length."""

    learning_rate: float = 0.03
    """Relative to the root mean square of each weight; cosine decay to 0."""

    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        require_at_least("heal.steps", self.steps, 0)
        require_at_least("heal.sequence_length", self.sequence_length, 2)
        require_at_least("heal.batch_tokens", self.batch_tokens, 2)
        if not 0 < self.learning_rate <= 1:
            raise UserError(f"heal.learning_rate: {self.learning_rate} is not above 0 and at most 1")


class Healer:
    """Heals the layers of one model, in order: `follow` comes after each, `heal` before it where there is need."""

    def __init__(
        self, model: OriginalModel, original: Architecture, sequences: torch.Tensor, settings: HealSettings
    ) -> None:
        """sequences: int [n, S]."""
        self.model, self.original, self.settings = model, original, settings
        length = min(settings.sequence_length, sequences.shape[1])
        pieces = sequences.shape[1] // length
        tokens = sequences[:, : pieces * length].reshape(-1, length).long()
        self.batch = max(1, min(len(tokens), settings.batch_tokens // length))
        self.next_layer = 0
        self.expected = model.embed(tokens)
        self.reached = self.expected.clone()

    def heal(self, layer: int, layout: LatentLayout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layer's tensors, trained. Returns tensors of the same names, float32."""
        assert layer == self.next_layer, "layers are healed in order"
        inputs, targets = self._task(layer)
        attention = make_attention(self.original, layout, balanced(tensors, layout), self.model.device)
        self._train(attention, inputs, targets, self.model.mask(layer, inputs))
        return {name: tensor.detach().clone() for name, tensor in attention.state_dict().items()}

    @torch.no_grad()
    def _task(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the converted attention gets, and what it should make of it: [n, S, h] each."""
        original = self.model.layer(layer)
        targets = self._map(lambda x: x + original.attention(original.normed(x)), self.expected)
        targets -= self.reached
        return self._map(original.normed, self.reached), targets

    def follow(self, layer: int, layout: LatentLayout, tensors: dict[str, torch.Tensor]) -> None:
        """Go on to the next layer, from what this one puts out with its tensors as they are written."""
        assert layer == self.next_layer, "layers are healed in order"
        self.next_layer += 1
        original = self.model.layer(layer)
        attention = make_attention(self.original, layout, tensors, self.model.device)
        with torch.no_grad():
            self.expected = self._map(original.run, self.expected)
            self.reached = self._map(lambda x: original.run(x, attention), self.reached)

    def _train(
        self, attention: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        settings = self.settings
        groups = []
        for parameter in attention.parameters():
            parameter.requires_grad_(True)
            size = parameter.square().mean().sqrt().item() or 0.01  # a bias may be all zeros
            groups.append({"params": [parameter], "lr": settings.learning_rate * size})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        peaks = [group["lr"] for group in groups]
        order = torch.Generator().manual_seed(settings.seed)
        tables = self.model.tables(inputs[:1])
        for step in range(settings.steps):
            factor = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            index = torch.randint(len(inputs), (self.batch,), generator=order).to(inputs.device)
            with torch.enable_grad():
                output = run_attention(attention, inputs[index], tables, mask)
                loss = (output - targets[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        attention.requires_grad_(False)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`function` on a few sequences at a time."""
        return torch.cat([function(part) for part in hidden.split(self.batch)])


def balanced(tensors: dict[str, torch.Tensor], layout: LatentLayout) -> dict[str, torch.Tensor]:
    """The same layer with up- and down-projections of equal root mean square, so that one learning rate suits both."""
    down = tensors.get("kv_down_proj.weight")
    if down is None:
        return tensors
    ups = [name for name in ("k_up_proj.weight", "v_up_proj.weight") if name in tensors]
    up_size = torch.cat([tensors[name].flatten() for name in ups]).square().mean().sqrt()
    ratio = (up_size / down.square().mean().sqrt()).sqrt()
    return {
        **tensors,
        "kv_down_proj.weight": down * ratio,
        **{name: tensors[name] / ratio for name in ups},
    }
