"""How far two models agree on the same windows of tokens.

Shape letters: w windows, b of them in a batch, t tokens in a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mha2mla_megatron.progress import Progress

SLICE = 512
"""Positions whose float32 distributions are in memory at a time: those of a long window take much."""


@dataclass(frozen=True)
class Agreement:
    """Means over all positions of all windows; not finite where a model's logits are not."""

    kl_divergence: float
    """KL(A || B) of the next-token distributions, in nats."""

    top1: float
    """The part of the positions at which both have the same most likely token."""

    largest_difference: float
    """Of two logits."""

    tokens: int
    """Positions compared."""


class PositionScores(NamedTuple):
    """One window's comparison, position by position, on the CPU: float64 [t] each, the last one [t - 1]."""

    kl: torch.Tensor
    """KL(A || B) of the next-token distributions, in nats."""

    same_top1: torch.Tensor
    """1 where both have the same most likely token, else 0."""

    logit_rms: torch.Tensor
    """Root mean square, over the vocabulary, of the difference of the two logits."""

    logit_max: torch.Tensor
    """The largest of these differences."""

    nll: torch.Tensor
    """[2, t - 1]: negative log-likelihood, in nats, of the window's tokens 2 to t under A and under B."""


def agreement(a: Any, b: Any, windows: torch.Tensor, batch_size: int) -> Agreement:
    """Compare two running causal models, on one device. windows: int64 [w, t]. Logits are compared in float32."""
    kl = top1 = largest = 0.0
    for scores in compare_windows(a, b, windows, batch_size):
        kl += scores.kl.sum().item()
        top1 += scores.same_top1.sum().item()
        # `max` of Python drops NaN, that of torch does not.
        largest = torch.tensor([largest, scores.logit_max.max().item()]).max().item()
    count = windows.numel()
    return Agreement(kl / count, top1 / count, largest, count)


def compare_windows(a: Any, b: Any, windows: torch.Tensor, batch_size: int) -> Iterator[PositionScores]:
    """The comparison of each window, as `agreement`; the logits of one batch are in memory at a time."""
    progress = Progress("comparing", windows.numel(), "tokens")
    for batch in windows.split(batch_size):
        ids = batch.to(a.device)
        with torch.inference_mode():
            pair = [model(input_ids=ids, use_cache=False).logits for model in (a, b)]  # [b, t, V]
            for row in zip(*pair, ids, strict=True):
                yield _compare(*row)
        progress.advance(batch.numel())
    progress.close()


def _compare(one: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> PositionScores:
    """one, other: logits [t, V] of any floating type; ids: int64 [t]."""
    targets = F.pad(ids[1:], (0, 1))  # the last position predicts nothing that is known
    parts = []
    for p, q, target in zip(one.split(SLICE), other.split(SLICE), targets.split(SLICE), strict=True):
        p, q = p.float(), q.float()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        difference = p - q
        nll = [-log.gather(1, target[:, None])[:, 0] for log in (log_p, log_q)]
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
        same, rms = p.argmax(-1) == q.argmax(-1), difference.square().mean(-1, dtype=torch.float64).sqrt()
        columns = (kl, same, rms, difference.abs().amax(-1), *nll)
        parts.append(torch.stack([column.double().cpu() for column in columns]))
    kl, same, rms, largest, *nll = torch.cat(parts, dim=1)
    return PositionScores(kl, same, rms, largest, torch.stack(nll)[:, :-1])
