"""Which mixtures of the heads' keys to rotate: few that stand for many pairs of similar frequencies.

A pair of dims is a complex number that turns with its frequency; so pairs of one frequency, of whatever heads, may be
mixed by complex numbers before the rotation or after it. Pairs of neighbouring frequencies may be, too, at the price of
letting them turn at one of these (`substitution`). So the frequencies are cut into runs of one or several; all pairs of
a run turn alike, and of their keys k_i a rotated key k' is a mixture, k' = sum_i reads_i k_i, in which each finds its
part of itself, k_i ~ writes_i k'. Which mixtures matter most is a principal component analysis of each run, with each
pair's keys scaled so that their energy is what rotating them is worth: eigenvalues then add up to that, and those kept
are the largest of all runs together. The cut is the one with which they are worth most.

(TransMLA, arXiv 2502.07864, mixes the heads' planes and neighbouring frequencies, too: runs of one length, by the
keys' energy alone, with one mixture of each.)

Shape letters: h inputs, H query heads, G key/value heads, d head dim, P = d/2 pairs, n mixtures kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from mha2mla_megatron.calibration.pairs import complex_pairs
from mha2mla_megatron.calibration.substitution import Rotations

BISECTIONS = 50
"""Of the price of a mixture."""


class Run(NamedTuple):
    """Pairs from `start` to `stop` (exclusive) that turn with the frequency of pair `frequency`, one of them."""

    start: int
    stop: int
    frequency: int


def longest_run(pairs: int) -> int:
    """Pairs of the longest run: about as far as the neighbours of one in it (`substitution.neighbours`)."""
    return max(2, pairs // 8)


class _Candidate(NamedTuple):
    """The index-th mixture of a run."""

    worth: float
    run: Run
    index: int


@dataclass(frozen=True)
class Mixtures:
    """Those that are rotated."""

    pairs: torch.Tensor
    """Their frequencies, int64 [n], ascending; a frequency may occur several times."""

    reads: torch.Tensor
    """complex128 [n, G, P]: the mixture is the sum of reads times keys."""

    writes: torch.Tensor
    """complex128 [n, G, P], of norm 1: a pair's key is writes times the mixture, and what is uncorrelated to it."""

    query_map: torch.Tensor
    """complex128 [H, P], times which a pair's query goes with the frequency of its run."""

    gain: float
    """What their rotation is worth, in the units of `pairs.pair_losses`."""


class KeyMixtures:
    """The mixtures of one layer, as many as are asked for."""

    def __init__(self, keys: torch.Tensor, input_moment: torch.Tensor, rotations: Rotations) -> None:
        """keys: weights [G, d, h]; input_moment: E[x x^T], [h, h]. Float64."""
        self.groups, self.pairs = keys.shape[0], keys.shape[1] // 2
        second = complex_pairs(keys @ input_moment).flatten(0, 1) @ complex_pairs(keys).flatten(0, 1).mH
        self._second = second.view(self.groups, self.pairs, self.groups, self.pairs)  # E[k_gp conj(k_hq)]
        self._energy = second.diagonal().real.view(self.groups, self.pairs)
        self._rotations = rotations
        self._worths: dict[Run, list[float]] = {}

    def best(self, count: int) -> Mixtures:
        """`count` mixtures, of whichever frequencies are worth most. count: at most G P."""
        runs = self._runs
        each = [torch.tensor(self.worths(run), dtype=torch.float64) for run in runs]
        padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)

        def cut_at(price: float) -> list[Run]:
            exceeding = (padded - price).clamp_min(0).sum(1).tolist()
            return best_cut(dict(zip(runs, exceeding, strict=True)), self.pairs)

        # If each mixture had a price, a run would be worth what its mixtures exceed it by; and at the price that
        # `count` mixtures exceed, the best cut is the best one for `count`. Where no price leaves as many, as of equal
        # ones, it is the better of the cuts at two neighbouring prices.
        low, high = 0.0, padded.max().item()
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            exceeding = sum(worth > price for run in cut_at(price) for worth in self.worths(run))
            if exceeding == count:
                low = high = price
                break
            low, high = (price, high) if exceeding > count else (low, price)
        found = [self._largest(cut_at(price), count) for price in (low, high)]
        return self._mixtures(max(found, key=lambda kept: sum(candidate.worth for candidate in kept)))

    def of_frequencies(self, frequencies: torch.Tensor) -> Mixtures:
        """One mixture for each of these frequencies, different ones, of the pairs in a run around it."""
        given = set(frequencies.tolist())
        worths = {}
        for length in range(1, longest_run(self.pairs) + 1):
            for start in range(self.pairs - length + 1):
                among = given.intersection(range(start, start + length))
                if len(among) == 1:
                    run = Run(start, start + length, *among)
                    worths[run] = self.worths(run)[0]
        cut = best_cut(worths, self.pairs, required=given)
        return self._mixtures([_Candidate(worths[run], run, 0) for run in cut])

    def worths(self, run: Run) -> list[float]:
        """What the rotation of each of a run's mixtures is worth, the largest first."""
        if run not in self._worths:
            values = torch.linalg.eigvalsh(self._scaled(run)[0])
            self._worths[run] = values.clamp_min(0).flip(0).tolist()
        return self._worths[run]

    @cached_property
    def _runs(self) -> list[Run]:
        """Runs of 1, 2, 4, ... pairs, from every half of a run's length on, each with the frequency that suits it best.
        (All lengths from every pair on would be several times as many and hardly better.)"""
        runs, length = [], 1
        while length <= longest_run(self.pairs):
            for start in range(0, self.pairs - length + 1, max(1, length // 2)):
                stop = start + length
                gains = self._rotations.gains[start:stop, :, start:stop].sum((1, 2))
                runs.append(Run(start, stop, start + int(gains.argmax())))
            length *= 2
        return runs

    def _scaled(self, run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The run's keys' second moment with keys scaled by their worth, as it is, and the scale: with n = G times the
        run's length, [n, n], [n, n] and [n]."""
        pairs = slice(run.start, run.stop)
        gains, energy = self._rotations.gains[run.frequency, :, pairs].flatten(), self._energy[:, pairs].flatten()
        second = self._second[:, pairs, :, pairs].reshape(len(gains), len(gains))
        scale = torch.where(energy > 0, (gains / energy.clamp_min(1e-300)).sqrt(), 0.0)
        return scale[:, None] * second * scale, second, scale

    def _largest(self, cut: list[Run], count: int) -> list[_Candidate]:
        every = [_Candidate(worth, run, i) for run in cut for i, worth in enumerate(self.worths(run))]
        return sorted(every, key=lambda candidate: candidate.worth, reverse=True)[:count]

    def _mixtures(self, kept: list[_Candidate]) -> Mixtures:
        device, size = self._second.device, (len(kept), self.groups, self.pairs)
        reads = torch.zeros(size, dtype=torch.complex128, device=device)
        writes = torch.zeros_like(reads)
        maps = torch.view_as_complex(self._rotations.query_maps)  # [P, H, P]
        query_map = torch.ones_like(maps[0])
        kept = sorted(kept, key=lambda candidate: (candidate.run.frequency, candidate.index))
        components = {run: self._components(run) for _, run, _ in kept}
        for run in components:
            query_map[:, run.start : run.stop] = maps[run.frequency, :, run.start : run.stop]
        for row, (_, run, index) in enumerate(kept):
            for whole, part in zip((reads, writes), components[run], strict=True):
                whole[row, :, run.start : run.stop] = part[index]
        frequencies = torch.tensor([run.frequency for _, run, _ in kept], dtype=torch.int64, device=device)
        return Mixtures(frequencies, reads, writes, query_map, sum(candidate.worth for candidate in kept))

    def _components(self, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """reads and writes of a run's n mixtures, those worth most first: complex128 [n, G, the run's length] each."""
        scaled, second, scale = self._scaled(run)
        values, vectors = torch.linalg.eigh(scaled)
        reads = vectors.mH.flip(0) * scale  # of E|mixture|^2 = the eigenvalue
        writes = reads.conj() @ second.T
        # Of a mixture's size and phase nothing depends: writes get norm 1, and a largest entry that is real. So of one
        # pair alone the mixture is that pair's key.
        largest = writes.gather(1, writes.abs().argmax(1, keepdim=True))
        factor = largest / largest.abs().clamp_min(1e-300) * writes.norm(dim=1, keepdim=True)
        reads = reads * factor / values.flip(0)[:, None].clamp_min(1e-300)
        writes = writes / torch.where(factor == 0, 1.0, factor)
        return reads.unflatten(1, (self.groups, -1)), writes.unflatten(1, (self.groups, -1))


def best_cut(worths: Mapping[Run, float], pairs: int, required: Collection[int] = ()) -> list[Run]:
    """Runs without common pairs that are worth most together. Pairs may be in none, but for those required."""
    best: list[tuple[float, list[Run]]] = [(0.0, [])]
    ending: dict[int, list[Run]] = {}
    for run in worths:
        ending.setdefault(run.stop, []).append(run)
    for stop in range(1, pairs + 1):
        options = [(best[run.start][0] + worths[run], [*best[run.start][1], run]) for run in ending.get(stop, [])]
        if stop - 1 not in required:
            options.append(best[stop - 1])
        best.append(max(options, key=lambda option: option[0]))
    return best[-1][1]
