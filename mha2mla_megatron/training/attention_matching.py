"""What a student's attention layers add to the residual stream, drawn to what the teacher's add.

Shape letters: s the tokens of a sample that this process has between the layers, b samples of a micro batch, h hidden
size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

Output = tuple[torch.Tensor, torch.Tensor | None]
"""Of an attention layer: [s, b, h], and its bias [h], which is still to be added to it."""


class AttentionMatching:
    """M of each token: the mean over the layers of ||o_s - o_t||^2 / ||o_t||^2.

    o is the output of a layer's attention with its bias, of the student and of the teacher. A token to which a
    teacher's layer adds nothing has none of that layer's term.

    Hooks do all of it, so that stages of a pipeline and layers that are recomputed need nothing of their own. The
    teacher's outputs wait, for each layer in the order of the micro batches, until the student's layer runs with
    gradients. What waits from then on is the gradient; the backward pass adds it to that of the layer's output, which
    is whole on each tensor-parallel process, or with sequence parallelism that of its tokens.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[torch.nn.Module, torch.nn.Module]],
        num_layers: int,
        factor: float,
        weight: torch.Tensor,
        sources: int,
        sequence_parallel: bool,
    ) -> None:
        """pairs: chunks of student and teacher with the same layers. num_layers: of the whole model. factor, weight:
        the loss has weight * factor * M; weight is a scalar on the device, read in each backward pass.
        sources: how many the blend has, 0 without one.
        """
        self.num_layers, self.factor, self.weight = num_layers, factor, weight
        self.by_sequence = sequence_parallel
        self.sums = torch.zeros(max(sources, 1), dtype=torch.float64, device=weight.device)
        for student, teacher in pairs:
            for ours, theirs in zip(_attention_layers(student), _attention_layers(teacher), strict=True):
                waiting: deque[tuple[Output, torch.Tensor, torch.Tensor]] = deque()
                theirs.register_forward_hook(self._keeper(waiting))
                ours.register_forward_hook(self._matcher(waiting))

    def begin(self, loss_mask: torch.Tensor, source: torch.Tensor | None) -> None:
        """Tell which tokens count in the micro batch that comes next, of which source its samples are.

        loss_mask [b, S], of this process's part of the sequence under context parallelism; source int64 [b].
        """
        if self.by_sequence:
            group: Any = parallel_state.get_tensor_model_parallel_group()
            loss_mask = loss_mask.chunk(group.size(), dim=1)[group.rank()]
        self.counted = loss_mask.transpose(0, 1).float()
        self.source = loss_mask.new_zeros(len(loss_mask), dtype=torch.int64) if source is None else source

    def take_sums(self) -> torch.Tensor:
        """Sums of M over the tokens of each source that count, of this process's layers and context-parallel part,
        since they were taken last; float64 [sources, or 1 without a blend]."""
        sums = self.sums / self.num_layers
        self.sums.zero_()
        if self.by_sequence:
            torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        return sums

    def _keeper(self, waiting: deque[tuple[Output, torch.Tensor, torch.Tensor]]) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Output) -> None:
            values, bias = output
            # A copy: without gradients Megatron adds the residual stream in place.
            waiting.append(((values.clone(), bias), self.counted, self.source))

        return keep

    def _matcher(self, waiting: deque[tuple[Output, torch.Tensor, torch.Tensor]]) -> Any:
        def match(module: torch.nn.Module, inputs: Any, output: Output) -> Output | None:
            if not torch.is_grad_enabled():  # validation, or a layer that will be recomputed
                return None
            pull = self._pull(output, *waiting.popleft())
            return _Pulled.apply(*output, pull, self), output[1]

        return match

    @torch.no_grad()
    def _pull(self, student: Output, teacher: Output, counted: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The gradient [s, b, h] of the layer's term, summed over tokens, in the type of the activations; adds the
        term to the sums. counted [s, b]; source [b]."""
        target = _whole(teacher)
        difference, size = _whole(student) - target, target.square().sum(-1)
        share = torch.where(size == 0, 0, counted / size)
        self.sums.index_add_(0, source, (share * difference.square().sum(-1)).double().sum(0))
        return (2 * share[..., None] * difference).to(student[0].dtype)


class _Pulled(torch.autograd.Function):
    """A layer's output as it is; its gradient, and that of its bias, with `pull` in the loss's proportion."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, bias: torch.Tensor | None, pull: torch.Tensor, matching: AttentionMatching
    ) -> torch.Tensor:
        ctx.save_for_backward(pull)
        ctx.matching = matching
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        (pull,) = ctx.saved_tensors
        pull = pull * (ctx.matching.weight * ctx.matching.factor / ctx.matching.num_layers)
        return gradient + pull, pull.sum((0, 1)) if ctx.needs_input_grad[1] else None, None, None


def _attention_layers(chunk: torch.nn.Module) -> list[Any]:
    """In the order of the layers."""
    return [module.self_attention for module in chunk.modules() if isinstance(module, TransformerLayer)]


def _whole(output: Output) -> torch.Tensor:
    """With its bias, in float32."""
    values, bias = output
    return values.float() if bias is None else values.float() + bias.float()
