"""Cross entropy with the text, divergence from a teacher and the normaliser, of logits that stay split over the
vocabulary.

Logits are the largest tensors of a step by far: at a vocabulary of 49152 those of 32768 tokens are 3.2 GB in bf16. So
all losses, and later their common gradient, come from one reading of the logits, and nothing of that size is kept
beside them. The processes exchange seven numbers a token.

On a GPU each pass is one Triton kernel (`vocab_parallel_triton.py`); the same in plain torch stands here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp

from mha2mla_megatron.training.top_k_divergence import TopK, add_gradient, divergence, exact, outcomes


def vocab_parallel_losses(
    student: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    labels: torch.Tensor,
    temperature: float,
    group: ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross entropy, T^2 KL(p || q), log sum exp) of each token, where p = softmax(teacher / T) and
    q = softmax(student / T); the last is of the student's logits, whose softmax it normalises.

    student, teacher: logits [..., V/tp] of this process's part of the vocabulary. Of a teacher's most probable tokens
    alone the KL is that of `top_k_divergence.py`, from a reading of its own. Without a teacher the KL is 0.
    labels: int64 [...], of the whole vocabulary. group: the tp processes that share it (None: all there are). The
    results [...] are float32, or float64 of float64 logits, and the same on all of them; their gradient goes to the
    student alone. T^2 keeps the gradient's size whatever the temperature (Hinton et al., arXiv 1503.02531, section 2).
    """
    return _VocabParallelLosses.apply(student, teacher, labels, temperature, group)  # type: ignore[no-any-return]


class _VocabParallelLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | TopK | None,
        labels: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        columns = student.shape[-1]
        known = teacher.flat() if isinstance(teacher, TopK) else None
        logits = None if isinstance(teacher, TopK) else teacher
        rows = student.reshape(-1, columns), None if logits is None else logits.reshape(-1, columns)
        own_labels = labels.flatten() - columns * torch.distributed.get_rank(group)
        highest, sums = _passes(student)[0](*rows, own_labels, temperature)
        if torch.distributed.get_world_size(group) > 1:
            local = highest.clone()
            torch.distributed.all_reduce(highest, ReduceOp.MAX, group)
            _move_to(sums, local - highest, temperature)
            torch.distributed.all_reduce(sums, ReduceOp.SUM, group)
        losses = losses_of_sums(highest, sums, temperature, logits is not None)
        ctx.save_for_backward(*rows, own_labels, highest, sums)
        ctx.temperature, ctx.shape, ctx.group, ctx.known = temperature, student.shape, group, None
        cross_entropy, kl, normaliser = (loss.view(labels.shape) for loss in losses)
        if known is not None:
            found = outcomes(rows[0], known.ids, temperature, group)
            kl = divergence(found, known.log_probs, temperature).view(labels.shape)
            ctx.known = found, known
        return cross_entropy, kl, normaliser

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, labels, highest, sums = ctx.saved_tensors
        upstream = torch.stack([gradient.flatten() for gradient in grad_outputs])
        gradient = _passes(student)[1](student, teacher, labels, highest, sums, upstream, ctx.temperature)
        if ctx.known is not None:
            found, known = ctx.known
            add_gradient(gradient, student, found, known, upstream[1], ctx.temperature, ctx.group)
        return gradient.view(ctx.shape), None, None, None, None


def _passes(logits: torch.Tensor) -> tuple[Any, Any]:
    """(forward, backward) over rows of logits, for this device and type."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from mha2mla_megatron.training import vocab_parallel_triton  # builds of torch for the CPU have no Triton

        return vocab_parallel_triton.sum_columns, vocab_parallel_triton.logits_gradient
    return sum_columns, logits_gradient


def sum_columns(
    student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the losses are made of, over this process's columns. student, teacher [n, v], labels [n], from 0 to v - 1
    where they are in this part.

    Returns highest [2, n], the largest logits s' of the student and t' of the teacher, and sums [5, n]: of
    exp(s - s'), exp((s - s') / T), exp((t - t') / T), the last times ((t - t') - (s - s')) / T, and the student's logit
    at the label, 0 if it is in another part. All float32, or float64 of float64 logits. Without a teacher t' and the
    middle three are 0.
    """
    s = exact(student)
    if teacher is None:
        highest = torch.stack((s.amax(-1), torch.zeros_like(s[:, 0])))
    else:
        t = exact(teacher)
        highest = torch.stack((s.amax(-1), t.amax(-1)))
    at_label = s.gather(1, labels.clamp(0, s.shape[1] - 1)[:, None])[:, 0]
    at_label = torch.where((labels >= 0) & (labels < s.shape[1]), at_label, 0)
    s = s - highest[0, :, None]
    if teacher is None:
        zero = torch.zeros_like(at_label)
        return highest, torch.stack((s.exp_().sum(-1), zero, zero, zero, at_label))
    t = t - highest[1, :, None]
    p = (t / temperature).exp_()
    total_p = p.sum(-1)
    difference = p.mul_(t.sub_(s)).sum(-1) / temperature
    del p, t
    total_q = (s / temperature).exp_().sum(-1)
    return highest, torch.stack((s.exp_().sum(-1), total_q, total_p, difference, at_label))


def losses_of_sums(
    highest: torch.Tensor, sums: torch.Tensor, temperature: float, taught: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`vocab_parallel_losses` [n] from what `sum_columns` gives of the whole vocabulary. taught: there is a teacher."""
    total, total_q, total_p, difference, at_label = sums
    cross_entropy = total.log() - (at_label - highest[0])
    divergence = torch.zeros_like(total)
    if taught:
        divergence = (difference / total_p + (total_q.log() - total_p.log())) * temperature**2
    return cross_entropy, divergence, total.log() + highest[0]


def _move_to(sums: torch.Tensor, moved: torch.Tensor, temperature: float) -> None:
    """Make `sums` relative to other maxima, in place. moved: old ones minus new ones, [2, n]."""
    s, t = moved
    sums[3] += sums[2] * (t - s) / temperature
    sums[0] *= s.exp()
    sums[1] *= (s / temperature).exp()
    sums[2:4] *= (t / temperature).exp()


def logits_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    highest: torch.Tensor,
    sums: torch.Tensor,
    upstream: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The gradient by the student's logits [n, v], in their type, from those of the three losses [3, n].

    Of the cross entropy: softmax(student) - onehot(label). Of T^2 KL: T (q - p). Of log sum exp: softmax(student).
    """
    s = exact(student) - highest[0, :, None]
    total, total_q, total_p = sums[:3, :, None]
    of_kl = None
    if teacher is not None:
        t = exact(teacher) - highest[1, :, None]
        p, q = t.div_(temperature).exp_().div_(total_p), (s / temperature).exp_().div_(total_q)
        of_kl = q.sub_(p).mul_(temperature * upstream[1, :, None])
    of_text, _, of_normaliser = upstream
    gradient = s.exp_().div_(total)
    inside = ((labels >= 0) & (labels < s.shape[1])).nonzero()[:, 0]
    gradient[inside, labels[inside]] -= 1
    gradient.mul_((of_text + of_normaliser)[:, None])
    gradient[inside, labels[inside]] += of_normaliser[inside]
    return (gradient if of_kl is None else gradient.add_(of_kl)).to(student.dtype)
