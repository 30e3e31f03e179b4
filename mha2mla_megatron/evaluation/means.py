"""Means with their standard errors, samples being independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float

    error: float | None
    """None for a single sample."""


def mean(values: Sequence[float]) -> Mean:
    tensor = torch.tensor(values, dtype=torch.float64)
    return Mean(tensor.mean().item(), (tensor.std() / len(tensor) ** 0.5).item() if len(values) > 1 else None)


def weighted(means: Mapping[str, Mean], weights: Mapping[str, float]) -> Mean | None:
    """The weighted sum of the means that `weights` names, which are independent; None where one is not there."""
    if not weights.keys() <= means.keys():
        return None
    value = sum(weight * means[name].value for name, weight in weights.items())
    errors = [(weight, means[name].error) for name, weight in weights.items()]
    if any(error is None for _, error in errors):
        return Mean(value, None)
    return Mean(value, sum((weight * error) ** 2 for weight, error in errors if error is not None) ** 0.5)
