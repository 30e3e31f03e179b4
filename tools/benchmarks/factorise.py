"""Time to factor one attention layer, from its weights (and moments) to the latent's projections.

    python tools/benchmarks/factorise.py [svd=true] [hidden=4096] [heads=32] [groups=32] [key=value ...]

The default shape is a layer of Llama-2-7B, to ranks of a half, a quarter and an eighth of its hidden size. Weights and
moments are random, the moments with a decaying spectrum. A row for each rank and objective; with svd=true also for
`torch.linalg.svd` of the same weights, in float32 as the original code has it and in float64 (minutes on a CPU), and
`svd32 / this`, `svd64 / this`, their time over this one's. `excess`: by how much ||W - up down||^2 is larger than what
the rank allows, relative to that; the best is what the float64 decomposition loses.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from timing import peak_memory, timed

from mha2mla_megatron.calibration.metric import Metric, make_columns, make_rows
from mha2mla_megatron.calibration.statistics import LayerStatistics
from mha2mla_megatron.checkpoint.causal_lm import pick_device
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import require_at_least, run_tool
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.low_rank import factorise
from mha2mla_megatron.partial_rope import head_row_order
from mha2mla_megatron.settings import load_settings

USAGE = "factorise.py [key=value ...]"

Factors = tuple[torch.Tensor, torch.Tensor]

PLAIN, SVD32, SVD64 = "objective weights", "torch.linalg.svd, float32", "torch.linalg.svd, float64"


@dataclass(frozen=True)
class FactoriseSettings:
    hidden: int = 4096
    """h."""

    heads: int = 32
    """H; the head dim is hidden / heads."""

    groups: int = 32
    """G."""

    rope: int = 16
    """r."""

    ranks: list[int] = field(default_factory=lambda: [2048, 1024, 512])
    """c."""

    decay: float = 0.0
    """Orders of magnitude over which the weights' rows decay, and their columns. 0 is harder to search than most layers
    of a trained model, 1 about like them."""

    outputs: bool = True
    """Time the objective `outputs` too."""

    rounds: int = 3
    """Timed rounds, the ways in turn; the median counts."""

    device: str = "auto"
    """auto, cpu, cuda."""

    svd: bool = False
    """Time torch.linalg.svd too."""

    def __post_init__(self) -> None:
        require_at_least("rounds", self.rounds, 1)
        for rank in self.ranks:
            require_at_least("ranks", rank, 1)
        pick_device(self.device)


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=FactoriseSettings)
    settings = load_settings(FactoriseSettings, overrides, file)
    device = pick_device(settings.device)
    layer, weight, unrotated, query_map = make_layer(settings, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {' x '.join(map(str, weight.shape))}; median of {settings.rounds} rounds")

    def with_moments(rank: int) -> Factors:
        rows = make_rows("outputs", layer, 1, query_map, unrotated, 1e-5)
        return factorise(weight, rank, "up", Metric(rows, make_columns("outputs", layer, 1, 1e-5)))

    def by_svd(dtype: torch.dtype) -> Factors:
        u, s, v = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        return u * s, v

    runs: dict[tuple[str, int | None], Callable[[], Factors]] = {}
    for rank in settings.ranks:
        if settings.outputs:
            runs["objective outputs", rank] = partial(with_moments, rank)
        runs[PLAIN, rank] = partial(factorise, weight, rank, "up")
    if settings.svd:  # all ranks at once
        runs[SVD32, None], runs[SVD64, None] = partial(by_svd, torch.float32), partial(by_svd, torch.float64)
    seconds, factors = measure(runs, settings.rounds, device)

    def error(run: tuple[str, int | None], rank: int) -> float:
        up, down = (t.double() for t in factors[run])
        return (weight.double() - up[:, :rank] @ down[:rank]).square().sum().item()

    rows = []
    for rank in settings.ranks:
        for way, its_rank in runs:
            if its_rank not in (rank, None):
                continue
            time = seconds[way, its_rank]
            row = [way, str(rank), f"{time:.2f}"]
            if settings.svd:
                row += [f"{seconds[svd, None] / time:.1f}" for svd in (SVD32, SVD64)]
                # The other objective spends its rank on something else.
                excess = error((way, its_rank), rank) / error((SVD64, None), rank) - 1
                row.append(f"{excess:.1e}" if way != "objective outputs" else "")
            rows.append(row)
    header = ["way", "rank", "seconds", "svd32 / this", "svd64 / this", "excess"]
    print(format_table(header if settings.svd else header[:3], rows))
    print(f"peak memory {peak_memory(device):.2f} GiB")


def measure[Run](
    runs: dict[Run, Callable[[], Factors]], rounds: int, device: torch.device
) -> tuple[dict[Run, float], dict[Run, Factors]]:
    """The median of the seconds of each, and its factors. In turn, so that what else the machine does meets all."""
    seconds: dict[Run, list[float]] = {run: [] for run in runs}
    factors = {}
    for _ in range(rounds):
        for run, start in runs.items():
            taken, factors[run] = timed(start, device)
            seconds[run].append(taken)
    return {run: statistics.median(taken) for run, taken in seconds.items()}, factors


def make_layer(
    settings: FactoriseSettings, device: torch.device
) -> tuple[LayerStatistics, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random statistics of one token's weight, the rows [K_nope; V], the dims of a head that are not rotated, and the
    queries' map."""
    torch.manual_seed(0)
    h, d = settings.hidden, settings.hidden // settings.heads
    width = (settings.heads + settings.groups) * d

    def moment(n: int) -> torch.Tensor:
        samples = torch.randn(n, 2 * n, device=device) * torch.logspace(0, -2, n, device=device)[:, None]
        return (samples @ samples.T / (2 * n)).double()

    layer = LayerStatistics(
        query_norms=torch.empty(0),
        key_norms=torch.empty(0),
        input_moment=torch.empty(0),
        gradient_energy=torch.ones((), dtype=torch.float64, device=device),
        weighted_input_moment=moment(h),
        gradient_moment=moment(width),
        score_moments=torch.empty(0),
        loss_moments=torch.empty(0),
        substitution_moments=torch.empty(0),
    )
    order = head_row_order(torch.arange(settings.rope // 2).repeat(settings.groups, 1), d)
    unrotated = torch.eye(d, dtype=torch.float64)[order[:, settings.rope :]].to(device)
    count = settings.groups * (2 * d - settings.rope)
    query_map = torch.randn(settings.heads, d // 2, 2, device=device, dtype=torch.float64)
    fading = [torch.logspace(0, -settings.decay, size, device=device) for size in (count, h)]
    weight = torch.randn(count, h, device=device) * fading[0][:, None] * fading[1]
    return layer, weight, unrotated, query_map


if __name__ == "__main__":
    run_tool(main)
