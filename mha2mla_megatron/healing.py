"""Healing without labels: each converted attention layer is trained to put the residual stream back on its track.

Layers are healed from the first to the last. Two streams run side by side over the calibration sequences: the
original model's, and that of the model whose layers below are converted and healed already. A layer sees the second
stream, and its weights are moved until what it adds brings that stream as near as it can to where the original's
attention leaves the first:

    minimise E |x' + A'(norm(x')) - y|^2 / (|y|^2 + 0.01 median |y|^2),    y = x + A(norm(x))

x, x': the streams before the layer; A, A': the original and the converted attention. So a layer also mends what the
layers below it broke. What follows reads a stream through a norm, so a token's error counts relative to its stream's
size: the first token's can be a thousand times the others'. A few hundred steps of Muon move all weights of the
attention; then its output projection is solved for, which is a least squares problem. Nothing is learnt from labels.

Shape letters: n sequences, S tokens of each, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.original import OriginalModel, run_attention
from mha2mla_megatron.converted_attention import make_attention
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout

WARM_UP = 20
"""Steps over which the learning rate rises."""

MOMENTUM = 0.9

MUON_UPDATE = 0.2
"""Root mean square of an update of torch's Muon at a learning rate of 1, if that is adjusted by "match_rms_adamw"."""

PRIOR_TOKENS = 4096
"""What the trained output projection counts for when it is solved for: few tokens do not suffice for all its rows."""


@dataclass(frozen=True)
class HealSettings:
    """Healing after the conversion."""

    steps: int = 0
    """Optimizer steps for each layer; 0: no healing."""

    batch_tokens: int = 4096
    """Tokens of a step."""

    sequence_length: int = 512
    """Sequences of the statistics file are cut to this length."""

    learning_rate: float = 0.015
    """Root mean square of a step's change of a weight, relative to that of the weight and to the layer's error when it
    begins: times the root of its share in what the layer should put out. Cosine decay to 0."""

    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        require_at_least("heal.steps", self.steps, 0)
        require_at_least("heal.sequence_length", self.sequence_length, 2)
        require_at_least("heal.batch_tokens", self.batch_tokens, 2)
        if not 0 < self.learning_rate <= 1:
            raise UserError(f"heal.learning_rate: {self.learning_rate} is not above 0 and at most 1")


@dataclass(frozen=True)
class Task:
    """What a converted attention shall do."""

    inputs: torch.Tensor
    """What it gets: [n, S, h]."""

    targets: torch.Tensor
    """What it should make of it: [n, S, h]."""

    weights: torch.Tensor
    """Of the tokens' squared errors, 1 on average: [n, S]."""

    tables: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    """`OriginalModel`'s of the layer."""

    def run(self, attention: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """The attention's output for some of the inputs."""
        return run_attention(attention, inputs, self.tables, self.mask)

    def split(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Inputs, targets and weights of `count` sequences at a time."""
        return zip(self.inputs.split(count), self.targets.split(count), self.weights.split(count), strict=True)


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
        self._task: Task | None = None  # of the next layer, which several conversions of it share

    def heal(self, layer: int, layout: LatentLayout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layer's tensors, trained. Returns tensors of the same names, float32."""
        assert layer == self.next_layer, "layers are healed in order"
        task = self._task = self._task or self._make_task(layer)
        attention = make_attention(self.original, layout, balanced(tensors, layout), self.model.device)
        self._train(attention, task)
        self._solve_output(attention, task)
        return {name: tensor.detach().clone() for name, tensor in attention.state_dict().items()}

    @torch.no_grad()
    def _make_task(self, layer: int) -> Task:
        original = self.model.layer(layer)
        goal = self._map(lambda x: x + original.attention(original.normed(x)), self.expected)
        sizes = goal.square().mean(-1)
        weights = (sizes + 0.01 * sizes.median()).reciprocal()  # a padding token's may be 0
        goal -= self.reached  # in place: these are as large as the stored sequences' hidden states
        inputs = self._map(original.normed, self.reached)
        tables, mask = self.model.tables(inputs[:1]), self.model.mask(layer, inputs)
        return Task(inputs, goal, weights / weights.mean(), tables, mask)

    def follow(self, layer: int, layout: LatentLayout, tensors: dict[str, torch.Tensor]) -> None:
        """Go on to the next layer, from what this one puts out with its tensors as they are written."""
        self._leave(layer)
        original = self.model.layer(layer)
        attention = make_attention(self.original, layout, tensors, self.model.device)
        with torch.no_grad():
            self.expected = self._map(original.run, self.expected)
            self.reached = self._map(lambda x: original.run(x, attention), self.reached)

    def pass_by(self, layer: int) -> None:
        """Go on to the next layer with this one as the original has it, in both streams."""
        self._leave(layer)
        with torch.no_grad():
            self.expected = self.reached = self._map(self.model.layer(layer).run, self.expected)

    def _leave(self, layer: int) -> None:
        assert layer == self.next_layer, "layers are healed in order"
        self.next_layer += 1
        self._task = None  # before the streams go on: it is as large as they are

    def _train(self, attention: nn.Module, task: Task) -> None:
        settings = self.settings
        error = self._relative_error(attention, task)
        optimizers = self._optimizers(attention.requires_grad_(True), settings.learning_rate * error**0.5)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        peaks = [group["lr"] for group in groups]
        order = torch.Generator().manual_seed(settings.seed)
        for step in range(settings.steps):
            factor = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * factor
            index = torch.randint(len(task.inputs), (self.batch,), generator=order).to(task.inputs.device)
            with torch.enable_grad():
                output = task.run(attention, task.inputs[index])
                loss = ((output - task.targets[index]).square().mean(-1) * task.weights[index]).mean()
            attention.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        attention.requires_grad_(False)

    @torch.no_grad()
    def _relative_error(self, attention: nn.Module, task: Task) -> float:
        """Its share in what the attention should put out, both as squares; 1 at most."""
        error = 0.0
        for inputs, targets, weights in task.split(self.batch):
            errors = task.run(attention, inputs) - targets
            error += (errors.square().mean(-1) * weights).sum().item()
        whole = (task.targets.square().mean(-1) * task.weights).sum().item()
        return error / whole if error < whole else 1.0

    @torch.no_grad()
    def _solve_output(self, attention: nn.Module, task: Task) -> None:
        """Give o_proj the weight that is best for what the heads put out now."""
        projection: Any = attention.o_proj
        bias = 0.0 if projection.bias is None else projection.bias
        before = projection.weight.double()
        moment = before.new_zeros(before.shape[1], before.shape[1])
        product = torch.zeros_like(before)
        attention.o_proj = nn.Identity()
        for inputs, targets, weights in task.split(self.batch):
            heads = task.run(attention, inputs).flatten(0, 1)
            weighted = heads * weights.flatten()[:, None]
            moment += weighted.T @ heads
            product += (targets - bias).flatten(0, 1).T @ weighted
        attention.o_proj = projection
        prior = (PRIOR_TOKENS / task.weights.numel() * moment.diagonal().mean()).clamp(min=1e-12)
        moment.diagonal().add_(prior)
        projection.weight.copy_(torch.linalg.solve(moment, product + prior * before, left=False))

    def _optimizers(self, attention: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Muon for matrices, whose orthogonal steps do not depend on the basis of the latents; Adam for biases and
        norms."""
        matrices, vectors = [], []
        for parameter in attention.parameters():
            size = parameter.square().mean().sqrt().item() or 0.01  # a bias may be all zeros
            rate = learning_rate * size
            if parameter.ndim == 2:
                matrices.append({"params": [parameter], "lr": rate / MUON_UPDATE})
            else:
                vectors.append({"params": [parameter], "lr": rate})
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        ]
        return [*optimizers, torch.optim.Adam(vectors, betas=(0.9, 0.98))] if vectors else optimizers

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
