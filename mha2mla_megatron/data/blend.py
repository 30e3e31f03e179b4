"""Several sources of samples in fixed proportions: which source each sample of a run comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from mha2mla_megatron.errors import UserError


class Blend:
    """A map-style data set of torch's: sample n is the next one of source `sources[n]`; each says so as `source`.

    datasets: one for each source, with as many samples as `sources` asks of it.
    """

    def __init__(self, datasets: Sequence[Any], sources: numpy.ndarray) -> None:
        """sources: int16 [n]."""
        self.datasets, self.sources = datasets, sources
        self.places = numpy.empty(len(sources), dtype=numpy.int64)
        for source in range(len(datasets)):
            mine = sources == source
            self.places[mine] = numpy.arange(numpy.count_nonzero(mine))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = int(self.sources[index])
        return {**self.datasets[source][int(self.places[index])], "source": source}


def interleave(weights: Sequence[float], count: int) -> numpy.ndarray:
    """A source for each of `count` samples, int16 [count], such that after any number n of them each source i has been
    taken weights[i] n times, give or take less than one. weights: positive, with the sum 1.

    Megatron's own BlendedDataset takes the source that is furthest behind, by which another can fall more than one
    sample behind. Here it is, among those that may be taken, the one that must be taken the soonest (R. Tijdeman, The
    chairman assignment problem, Discrete Mathematics 32, 1980): the error is at most 1 - 1 / (2 k - 2) of k sources.
    """
    taken, k = numpy.zeros(count, dtype=numpy.int16), len(weights)
    if k == 1:
        return taken
    margin = 1 / (2 * k - 2)
    behind, every = [0.0] * k, range(k)  # weights[i] n less what was taken of i
    for n in range(count):
        best, soonest = -1, float("inf")
        for i in every:
            due = behind[i] = behind[i] + weights[i]
            # 1e-9: for two sources the two sides may be equal but for rounding.
            if due >= margin - 1e-9 and (deadline := (1 - margin - due) / weights[i]) < soonest:
                best, soonest = i, deadline
        behind[best] -= 1
        taken[n] = best
    return taken


def blend_weights(key: str, blend: str | Mapping[str, float]) -> dict[str, float]:
    """Prefix -> share, which sum to 1. Raises UserError, naming `key`, for weights that are no proportions.

    Whole numbers are proportions; fractions must sum to 1, so that a forgotten source or a slip shows.
    """
    if isinstance(blend, str):
        return {blend: 1.0}
    if not blend:
        raise UserError(f"{key}: an empty mapping; give prefix: weight pairs")
    for prefix, weight in blend.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{key}: the weight of {prefix} is {weight!r}; a positive number is needed")
    total = sum(blend.values())
    if any(weight != int(weight) for weight in blend.values()) and abs(total - 1) > 1e-6:
        raise UserError(
            f"{key}: the weights sum to {total:.6g}; fractions must sum to 1 (whole numbers are taken as proportions)"
        )
    return {prefix: weight / total for prefix, weight in blend.items()}


def source_names(blend: str | Mapping[str, float]) -> list[str]:
    """What to call the sources: the last parts of their prefixes where these differ, else the prefixes."""
    prefixes = [blend] if isinstance(blend, str) else list(blend)
    short = [Path(prefix).name for prefix in prefixes]
    return short if len(set(short)) == len(short) else prefixes
