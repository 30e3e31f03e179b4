"""Time to factor one attention layer with the objective `outputs`, from its moments to the latent's projections.

    python tools/benchmarks/factorise.py [hidden=4096] [heads=32] [groups=32] [key=value ...]

The default shape is a layer of Llama-2-7B. Weights and moments are random, the moments with a decaying spectrum. With
check=true the value of the objective is compared with a plain singular value decomposition's (slow at 7B's size).
"""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass

import torch

from mha2mla_megatron.calibration.metric import Metric, make_columns, make_rows
from mha2mla_megatron.calibration.statistics import LayerStatistics
from mha2mla_megatron.checkpoint.causal_lm import pick_device
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import require_at_least, run_tool
from mha2mla_megatron.low_rank import factorise, truncation_losses
from mha2mla_megatron.partial_rope import head_row_order
from mha2mla_megatron.settings import load_settings

USAGE = "factorise.py [key=value ...]"


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

    check: bool = False
    """Compare with torch.linalg.svd."""

    def __post_init__(self) -> None:
        require_at_least("rounds", self.rounds, 1)
        pick_device(self.device)


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=FactoriseSettings)
    settings = load_settings(FactoriseSettings, overrides, file)
    device = pick_device(settings.device)
    layer, rows, order, query_map = make_layer(settings, device)
    seconds = []
    for _ in range(settings.rounds):
        synchronise(device)
        start = time.perf_counter()
        metric = Metric(
            make_rows("outputs", layer, 1, query_map, order, settings.rope, 1e-5),
            make_columns("outputs", layer, 1, 1e-5),
        )
        up, down = factorise(rows, settings.rank, "up", metric)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{name}: {list(rows.shape)} to rank {settings.rank}: median {statistics.median(seconds):.2f} s of "
        f"{settings.rounds} ({min(seconds):.2f} to {max(seconds):.2f}), peak memory {peak / 2**30:.2f} GiB"
    )
    if settings.check:
        white = metric.whiten(rows.double() - up @ down).square().sum().item()
        exact = torch.linalg.svdvals(metric.whiten(rows.double()))[settings.rank :].square().sum().item()
        tail = truncation_losses(rows, metric)[settings.rank].item()
        print(f"objective / singular values' tail: {white / exact:.9f}; eigenvalues' tail: {tail / exact:.9f}")


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


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_tool(main)
