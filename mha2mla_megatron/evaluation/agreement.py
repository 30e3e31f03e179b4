"""How far two models agree on the same windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mha2mla_megatron.progress import Progress


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


def agreement(a: Any, b: Any, windows: torch.Tensor, batch_size: int) -> Agreement:
    """Compare two running causal models, on one device. windows: int64 [w, t]. Logits are compared in float32."""
    kl = top1 = largest = 0.0
    progress = Progress("comparing", windows.numel(), "tokens")
    for batch in windows.split(batch_size):
        ids = batch.to(a.device)
        with torch.inference_mode():
            pair = [model(input_ids=ids, use_cache=False).logits for model in (a, b)]
            for one, other in zip(*pair, strict=True):  # [t, V]: the float32 logits of a whole batch take much memory
                one, other = one.float(), other.float()
                log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
                kl += F.kl_div(log_q, log_p, reduction="none", log_target=True).double().sum().item()
                top1 += (one.argmax(-1) == other.argmax(-1)).sum().item()
                # `max` of Python drops NaN, that of torch does not.
                largest = torch.tensor([largest, (one - other).abs().max().item()]).max().item()
        progress.advance(batch.numel())
    progress.close()
    count = windows.numel()
    return Agreement(kl / count, top1 / count, largest, count)
