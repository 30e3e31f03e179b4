"""Speed of the calibration pass against the model's own passes over the same tokens, on one GPU or the CPU.

    python tools/benchmarks/calibrate.py [shapes=[135M,1.7B]] [key=value ...]

A random model of each shape, its weights on the device from the start: reading files is not measured. `forward` makes
logits, without gradients. `forward + backward` is all that calibration does but collect: a backward pass from labels
that the model samples, no gradients of weights. `sums` is the pass of tools/calibrate.py, whose sums are dropped;
`sums, stored` writes them to a file with the tokens of `stored_samples` sequences, as the tool does. The ways take
turns, round after round, after one round that is not timed; medians.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shape, make_architecture, original_config
from timing import peak_memory, timed

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.collect import Batch, loss_gradient, run_layers
from mha2mla_megatron.calibration.original import Head, Layer, OriginalModel
from mha2mla_megatron.calibration.run import (
    DTYPES,
    CalibrateSettings,
    layer_sums,
    make_batches,
    write_statistics,
)
from mha2mla_megatron.checkpoint.causal_lm import pick_device
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import require_at_least, require_one_of, run_tool
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.ranks import ALONE, require_one_process
from mha2mla_megatron.settings import load_settings

USAGE = "calibrate.py [key=value ...]"


@dataclass(frozen=True)
class BenchmarkSettings:
    shapes: list[str] = field(default_factory=lambda: ["135M", "1.7B"])
    """Which shapes: tiny, small, 135M, 360M, 1.7B, 7B."""

    layers: int | None = None
    """Of each of them. None: the shape's own, which for 7B are 8."""

    samples: int = 16
    """As of tools/calibrate.py: sequences that are run."""

    sequence_length: int | None = None
    """Tokens of a sequence. None: 1024, or the shape's if that is less."""

    stored_samples: int = 128
    """As of tools/calibrate.py."""

    batch_size: int | None = None
    """As of tools/calibrate.py."""

    dtype: str = "bfloat16"
    """As of tools/calibrate.py."""

    memory: str = "auto"
    """As of tools/calibrate.py: fewer layers at a time cost another forward pass."""

    rounds: int = 3
    """Timed rounds."""

    device: str = "auto"
    """auto, cpu, cuda."""

    output: str | None = None
    """A JSON file for the numbers."""

    def __post_init__(self) -> None:
        for word in self.shapes:
            require_one_of("shapes", word, tuple(SHAPES))
            self.calibration(SHAPES[word])  # refuses what is not possible
        if self.layers is not None:
            require_at_least("layers", self.layers, 1)
        require_at_least("rounds", self.rounds, 1)

    def calibration(self, shape: Shape) -> CalibrateSettings:
        """Those of tools/calibrate.py."""
        return CalibrateSettings(
            samples=self.samples,
            sequence_length=min(1024, shape.sequence_length) if self.sequence_length is None else self.sequence_length,
            stored_samples=self.stored_samples,
            batch_size=self.batch_size,
            dtype=self.dtype,
            memory=self.memory,
            device=self.device,
            overwrite=True,
        )


class RandomReader(HFReader):
    """Random weights in place of a folder's, on the device. folder: has the config.json."""

    def __init__(self, folder: Path, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        generator = torch.Generator(device).manual_seed(0)
        self.weights = {
            name: torch.ones(shape, device=device, dtype=dtype)
            if len(shape) == 1
            else torch.empty(shape, device=device, dtype=dtype).normal_(std=0.04, generator=generator)
            for name, shape in architecture.tensor_shapes().items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name]


def make_ways(
    model: OriginalModel, sequences: torch.Tensor, settings: CalibrateSettings, target: Path
) -> dict[str, Callable[[], Any]]:
    """What is timed. sequences: int64 [n, S], of which the first `samples` are run; target: the statistics file."""
    batches = make_batches(sequences, settings, settings.sequences_at_once(model.device), ALONE)
    layers, head = [model.layer(index) for index in range(model.architecture.num_layers)], model.head()
    provenance = {
        "tokens": settings.samples * settings.sequence_length,
        "model": {"source": "random", "fingerprint": "random"},
        "stored_sequences": settings.stored_samples,
    }
    return {
        "forward": lambda: forward(model, layers, head, batches),
        "forward + backward": lambda: forward_backward(model, layers, head, batches),
        "sums": lambda: sum(1 for _ in layer_sums(model, sequences, settings, ALONE)),
        "sums, stored": lambda: write_statistics(model, sequences, target, settings, provenance),
    }


@torch.no_grad()
def forward(model: OriginalModel, layers: Sequence[Layer], head: Head, batches: Sequence[Batch]) -> None:
    for batch in batches:
        head.output(head.norm(run_layers(layers, model.embed(batch.tokens))))


def forward_backward(model: OriginalModel, layers: Sequence[Layer], head: Head, batches: Sequence[Batch]) -> None:
    for batch in batches:
        hidden = head.norm(run_layers(layers, model.embed(batch.tokens).requires_grad_(True)))
        hidden.backward(loss_gradient(head, hidden.detach(), batch.seeds))


def measure(name: str, settings: BenchmarkSettings, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way."""
    shape = SHAPES[name] if settings.layers is None else replace(SHAPES[name], layers=settings.layers)
    wanted, architecture = settings.calibration(shape), make_architecture(shape, "original")
    dtype = DTYPES[wanted.dtype]
    size = (max(wanted.samples, wanted.stored_samples), wanted.sequence_length)
    sequences = torch.randint(0, shape.vocabulary, size, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(original_config(shape)))
        model = OriginalModel(RandomReader(Path(scratch), architecture, device, dtype), architecture, device, dtype)
        ways = make_ways(model, sequences, wanted, Path(scratch) / "statistics.safetensors")
        for turn in range(1 + settings.rounds):
            for way, run in ways.items():
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # memory=auto asks for what is free
                    torch.cuda.reset_peak_memory_stats(device)
                time, _ = timed(run, device)
                if turn > 0:
                    seconds.setdefault(way, []).append(time)
                    peaks[way] = peak_memory(device)
    tokens = wanted.samples * wanted.sequence_length
    rates = {way: tokens / statistics.median(times) for way, times in seconds.items()}
    return [
        {
            "shape": name,
            "layers": shape.layers,
            "tokens": tokens,
            "way": way,
            "seconds": statistics.median(seconds[way]),
            "spread": (max(seconds[way]) - min(seconds[way])) / statistics.median(seconds[way]),
            "tokens_per_second": rate,
            "of_forward": rate / rates["forward"],
            "of_forward_backward": rate / rates["forward + backward"],
            "GiB": peaks[way],
        }
        for way, rate in rates.items()
    ]


def main(argv: list[str]) -> None:
    require_one_process("tools/benchmarks/calibrate.py")
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=BenchmarkSettings)
    settings = load_settings(BenchmarkSettings, overrides, file)
    device = pick_device(settings.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    for name in settings.shapes:
        rows += measure(name, settings, device)
        if settings.output:
            result = {"device": card, "torch": torch.__version__, "dtype": settings.dtype, "rows": rows}
            Path(settings.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{card}, {settings.dtype}; medians of {settings.rounds} rounds")
    header = ["shape", "layers", "way", "seconds", "spread", "tokens/s", "/ forward", "/ forward + backward", "GiB"]
    cells = [
        [
            row["shape"],
            str(row["layers"]),
            row["way"],
            f"{row['seconds']:.3f}",
            f"{row['spread']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_forward']:.3f}",
            f"{row['of_forward_backward']:.3f}",
            f"{row['GiB']:.2f}",
        ]
        for row in rows
    ]
    print(format_table(header, cells))


if __name__ == "__main__":
    run_tool(main)
