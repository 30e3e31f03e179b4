"""Names of the moving average of the weights in checkpoints: `average.X`, float32, beside X, where X is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mha2mla_megatron.errors import UserError

AVERAGE = "average."


def average_name(name: str) -> str:
    """Of the average of the tensor of this name."""
    return AVERAGE + name


def has_average(names: Iterable[str]) -> bool:
    """Whether there is one among all names of a step folder."""
    return any(name.startswith(AVERAGE) for name in names)


def check_average(found: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], step: Path) -> None:
    """Raise UserError unless a step folder has the average of each tensor that the optimizer has moments of, or none.

    found, model: name -> shape of what is in the folder, and of what the model has.
    """
    for name, shape in found.items():
        own = name.removeprefix(AVERAGE)
        if own != name and own not in model:
            raise UserError(f"{step}: surplus tensor {name}: this architecture has no {own}")
        if own != name and shape != model[own]:
            raise UserError(f"{step}: {name} has shape {shape}, {own} has {model[own]}")
    if has_average(found):
        for name in model:
            if f"optimizer.state.exp_avg.{name}" in found and average_name(name) not in found:
                raise UserError(f"{step}: tensor {average_name(name)} is missing")
