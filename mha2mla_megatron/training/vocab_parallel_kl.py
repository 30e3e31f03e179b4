"""The Kullback-Leibler divergence between two models whose logits stay split over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp


def vocab_parallel_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, group: ProcessGroup | None
) -> torch.Tensor:
    """T^2 KL(p || q) of each token, where p = softmax(teacher / T) and q = softmax(student / T).

    student, teacher: logits [..., V/tp] of this process's part of the vocabulary. group: the tp processes that share
    it (None: all there are). The result [...] is float32, or float64 of float64 logits, and the same on all of them;
    its gradient goes to the student alone. T^2 keeps the gradient's size whatever the temperature (Hinton et al.,
    arXiv 1503.02531, section 2).
    """
    return _VocabParallelKL.apply(student, teacher, temperature, group)  # type: ignore[no-any-return]


class _VocabParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float, group: ProcessGroup | None
    ) -> torch.Tensor:
        log_q, log_p = _log_softmax(torch.stack((student, teacher)), temperature, group)
        p = log_p.exp()
        divergence = (p * (log_p - log_q)).sum(-1)
        torch.distributed.all_reduce(divergence, group=group)
        # The derivative of T^2 KL by the student's logits is T (q - p), on each process its own part of it.
        ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature))
        ctx.dtype = student.dtype
        return divergence.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (upstream,) = ctx.saved_tensors, grad_outputs
        return (gradient * upstream.unsqueeze(-1)).to(ctx.dtype), None, None, None


def _log_softmax(logits: torch.Tensor, temperature: float, group: ProcessGroup | None) -> torch.Tensor:
    """log(softmax(logits / temperature)) over all processes' last dims; only maxima and sums are sent, [...] each."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    highest = scaled.amax(-1, keepdim=True)
    torch.distributed.all_reduce(highest, ReduceOp.MAX, group)
    scaled -= highest
    total = scaled.exp().sum(-1, keepdim=True)
    torch.distributed.all_reduce(total, ReduceOp.SUM, group)
    return scaled.sub_(total.log_())
