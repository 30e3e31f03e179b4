"""Time to factor one attention layer, from its weights (and moments) to the latent's projections.

    python tools/benchmarks/factorise.py [svd=true] [hidden=4096] [heads=32] [groups=32] [key=value ...]

The default shape is a layer of Llama-2-7B. Weights and moments are random, the moments with a decaying spectrum. A row
for each objective; with svd=true also for `torch.linalg.svd` of the same weights, in float32 as the original code has
it and in float64 (minutes on a CPU). `excess`: by how much ||W - up down||^2 is larger than what the rank allows,
relative to that; the best is the sum of the other singular values squared, from the float64 decomposition.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

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

    rank: int = 2048
    """c."""

    rounds: int = 3
    """Timed rounds; the median counts."""

    device: str = "auto"
    """auto, cpu, cuda."""

    svd: bool = False
    """Time torch.linalg.svd too, once."""

    def __post_init__(self) -> None:
        require_at_least("rounds", self.rounds, 1)
        pick_device(self.device)


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=FactoriseSettings)
    settings = load_settings(FactoriseSettings, overrides, file)
    device = pick_device(settings.device)
    layer, weight, order, query_map = make_layer(settings, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {' x '.join(map(str, weight.shape))} to rank {settings.rank}; median of {settings.rounds} rounds")

    def with_moments() -> Factors:
        rows = make_rows("outputs", layer, 1, query_map, order, settings.rope, 1e-5)
        return factorise(weight, settings.rank, "up", Metric(rows, make_columns("outputs", layer, 1, 1e-5)))

    def by_svd(dtype: torch.dtype) -> Factors:
        u, s, v = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        return u[:, : settings.rank] * s[: settings.rank], v[: settings.rank]

    ways: dict[str, tuple[Callable[[], Factors], int]] = {
        "objective outputs": (with_moments, settings.rounds),
        "objective weights": (lambda: factorise(weight, settings.rank, "up"), settings.rounds),
    }
    if settings.svd:
        ways["torch.linalg.svd, float32"] = lambda: by_svd(torch.float32), 1
        ways["torch.linalg.svd, float64"] = lambda: by_svd(torch.float64), 1
    measured = {way: measure(run, rounds, device) for way, (run, rounds) in ways.items()}
    errors = {
        way: (weight.double() - up.double() @ down.double()).square().sum().item()
        for way, (_, (up, down)) in measured.items()
    }
    ours, _ = measured["objective weights"]
    rows = []
    for way, (seconds, _) in measured.items():
        row = [way, f"{statistics.median(seconds):.2f}", f"{statistics.median(seconds) / statistics.median(ours):.2f}"]
        # The other objective spends its rank on something else.
        row.append(
            f"{errors[way] / errors['torch.linalg.svd, float64'] - 1:.1e}"
            if settings.svd and way != "objective outputs"
            else ""
        )
        rows.append(row)
    print(format_table(["way", "seconds", "/ objective weights", "excess"], rows))
    print(f"peak memory {peak_memory(device):.2f} GiB")


def measure(run: Callable[[], Factors], rounds: int, device: torch.device) -> tuple[list[float], Factors]:
    """Seconds of each round, and the factors."""
    seconds, factors = zip(*(timed(run, device) for _ in range(rounds)), strict=True)
    return list(seconds), factors[-1]


def make_layer(
    settings: FactoriseSettings, device: torch.device
) -> tuple[LayerStatistics, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random statistics of one token's weight, the rows [K_nope; V], the row order and the queries' map."""
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
    )
    order = head_row_order(torch.arange(settings.rope // 2).repeat(settings.groups, 1), d)
    count = settings.groups * (2 * d - settings.rope)
    query_map = torch.randn(settings.heads, d // 2, 2, device=device, dtype=torch.float64)
    return layer, torch.randn(count, h, device=device), order, query_map


if __name__ == "__main__":
    run_tool(main)
