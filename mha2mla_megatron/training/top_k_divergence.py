"""Divergence from a teacher of whom only the most probable tokens are known, of logits split over the vocabulary.

All other tokens are one outcome, the rest: p and q become distributions over k + 1 outcomes, and their divergence is at
most that over the vocabulary, equal to it with k = V. Were the k renormalised to a sum of 1 instead, the student would
learn that no other token can come.

n tokens, V tokens of the vocabulary, v of them in this process's part, k known of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

CHUNK = 1 << 24
"""Logits that are there in float32 at once."""

LOWEST = -65504.0
"""Of float16, and far below what has any probability: what stands for minus infinity."""


@dataclass(frozen=True)
class TopK:
    """A teacher's predictions at some temperature T: ids, int [..., k], of the whole vocabulary, each one once;
    log_probs, float [..., k + 1], of softmax(logits / T) there, the last one of the rest together."""

    ids: torch.Tensor
    log_probs: torch.Tensor

    def flat(self) -> TopK:
        """With the tokens in one dimension, and int64 ids."""
        return TopK(self.ids.flatten(0, -2).long(), self.log_probs.flatten(0, -2))

    def of_shape(self, shape: Sequence[int]) -> TopK:
        """With the tokens in these dimensions."""
        return TopK(self.ids.unflatten(0, shape), self.log_probs.unflatten(0, shape))


def outcomes(logits: torch.Tensor, ids: torch.Tensor, temperature: float, group: ProcessGroup | None) -> torch.Tensor:
    """Logits of the k + 1 outcomes: logits / T at the ids, and the log of the sum of exp(logits / T) of the rest.

    logits [n, v] of this process's part; ids int64 [n, k]. float32, or float64 of float64 logits, [n, k + 1], the same
    on all processes of the group.
    """
    columns = logits.shape[1]
    own, inside = _own(ids, columns, group)
    at = torch.where(inside, exact(logits.gather(1, own)) / temperature, 0)
    hidden = torch.where(inside, -torch.inf, 0.0).to(at.dtype)
    rest = at.new_empty(len(at))
    for rows in _chunks(logits):
        rest[rows] = (exact(logits[rows]) / temperature).scatter_add_(1, own[rows], hidden[rows]).logsumexp(-1)
    if (size := torch.distributed.get_world_size(group)) > 1:
        torch.distributed.all_reduce(at, group=group)
        parts = [torch.empty_like(rest) for _ in range(size)]
        torch.distributed.all_gather(parts, rest, group)
        rest = torch.stack(parts).logsumexp(0)
    return torch.cat((at, rest[:, None]), 1)


def divergence(student: torch.Tensor, log_probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(p || q) [n] of the teacher's log_probs [n, k + 1] and the student's `outcomes`."""
    log_p, log_q = log_probs.to(student.dtype).log_softmax(-1), student.log_softmax(-1)
    p = log_p.exp()
    # Where the rest is nothing, its logarithms have no difference.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1) * temperature**2


def add_gradient(
    gradient: torch.Tensor,
    logits: torch.Tensor,
    student: torch.Tensor,
    teacher: TopK,
    upstream: torch.Tensor,
    temperature: float,
    group: ProcessGroup | None,
) -> None:
    """Add the gradient of `divergence` by the student's logits [n, v] to `gradient` [n, v], in place.

    student: its `outcomes`; upstream [n]. T (q - p) of each outcome, and of a token of the rest its part of that.
    """
    own, inside = _own(teacher.ids, logits.shape[1], group)
    p, q = teacher.log_probs.to(student.dtype).softmax(-1), student.softmax(-1)
    by_outcome = (q - p) * (temperature * upstream.to(q.dtype))[:, None]
    known = torch.where(inside, by_outcome[:, :-1], 0)
    hidden = torch.where(inside, -torch.inf, 0.0).to(q.dtype)
    rest = torch.where(student[:, -1:].isfinite(), student[:, -1:], 0)
    for rows in _chunks(logits):
        share = (exact(logits[rows]) / temperature - rest[rows]).scatter_add_(1, own[rows], hidden[rows]).exp_()
        gradient[rows] += share.mul_(by_outcome[rows, -1:]).scatter_add_(1, own[rows], known[rows])


def top_k(logits: torch.Tensor, k: int, temperature: float, group: ProcessGroup | None) -> TopK:
    """The k most probable tokens of softmax(logits / T), the first one first; logits [n, v] of this process's part.

    ids int64 [n, k], log_probs float16 [n, k + 1]; the same on all processes of the group. k: at most V.
    """
    columns, size = logits.shape[1], torch.distributed.get_world_size(group)
    values, ids = logits.topk(min(k, columns), -1)
    if size > 1:
        ids = ids + columns * torch.distributed.get_rank(group)
        values, ids = (_gather(found, size, group) for found in (values, ids))
        ids = ids.gather(1, values.topk(k, -1).indices)
    log_probs = outcomes(logits, ids, temperature, group).log_softmax(-1)
    return TopK(ids, log_probs.clamp(min=LOWEST).half())


def exact(logits: torch.Tensor) -> torch.Tensor:
    """In float32, or the float64 that they are in; not always a copy."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _own(ids: torch.Tensor, columns: int, group: ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns of this process's part, whether the ids are in it), [n, k]; a column of any kind where they are not.

    What is added there is 0: an index of those inside alone would have another size each time, which a CUDA graph
    cannot have.
    """
    own = ids - columns * torch.distributed.get_rank(group)
    return own.clamp(0, columns - 1), (own >= 0) & (own < columns)


def _chunks(logits: torch.Tensor) -> list[slice]:
    rows = max(1, CHUNK // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _gather(found: torch.Tensor, size: int, group: Any) -> torch.Tensor:
    """Side by side, what each process has."""
    parts = [torch.empty_like(found) for _ in range(size)]
    torch.distributed.all_gather(parts, found.contiguous(), group)
    return torch.cat(parts, 1)
