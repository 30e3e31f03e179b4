"""How long a save holds training up: a blocking one, and one in the background.

    python tools/benchmarks/save.py [shape=small] [layers=20] [key=value ...]

For each number of data-parallel processes, one a GPU, or on the CPU over gloo where there is none: the bytes of a
checkpoint (random weights, float32 on a CPU, bfloat16 on a GPU), and what rank 0 waits for. `first` is the first save
in the background, which makes the host's memory for the copies; `later` the median of those that follow; `finish` what
the last one waits for once it is written. `copy` is a plain copy of what rank 0 writes to the host's memory, which no
save in the background can do without; `ratio` is later / blocking.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from job_worlds import JobFailed, World
from shapes import SHAPES

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of, run_tool
from mha2mla_megatron.model.cpu_mode import has_transformer_engine
from mha2mla_megatron.settings import load_settings

USAGE = "save.py [key=value ...]"
WORKER = Path(__file__).with_name("multi_gpu_worker.py")
TIMEOUT = 1200


@dataclass(frozen=True)
class SaveSettings:
    """Settings of this script."""

    shape: str = "small"
    """Of the converted model."""

    layers: int = 20
    """Of it; small with 20 has 86 million weights."""

    sequence_length: int = 64
    """Tokens of the steps while a save is written."""

    processes: tuple[int, ...] = (1, 2)
    """Data-parallel processes."""

    saves: int = 3
    """In the background."""

    folder: str | None = None
    """Where the checkpoints go. None: a temporary folder."""

    def __post_init__(self) -> None:
        require_one_of("shape", self.shape, tuple(SHAPES))
        for key in ("layers", "sequence_length"):
            require_at_least(key, getattr(self, key), 1)
        require_at_least("saves", self.saves, 2)
        for size in self.processes:
            require_at_least("processes", size, 1)


def main(argv: list[str]) -> None:
    _, words, file = split_words(argv, USAGE, 0, 0, schema=SaveSettings)
    settings = load_settings(SaveSettings, words, file)
    columns = ("processes", "GiB", "GiB of rank 0", "blocking s", "first s", "later s", "copy s", "finish s", "ratio")
    print(" | ".join(columns), flush=True)
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for size in settings.processes:
            print(" | ".join(measure(settings, size, Path(folder))), flush=True)


def measure(settings: SaveSettings, size: int, folder: Path) -> list[str]:
    """The row of so many processes. Raises UserError where they fail."""
    arguments = dict(
        shape=settings.shape, kind="converted", parallel={}, folder=str(folder / f"steps-{size}"), steps=1,
        implementation="transformer_engine" if has_transformer_engine() else "local", layers=settings.layers,
        saves=settings.saves, sequence_length=settings.sequence_length,
    )  # fmt: skip
    world = World(WORKER, size, folder / f"world-{size}")
    try:
        found = world.run("save_stall", arguments, TIMEOUT)
    except JobFailed as error:
        raise UserError(f"processes: {size}: {error}") from None
    finally:
        world.close()
    later = statistics.median(found["begin"][1:])
    seconds = (found["blocking"], found["begin"][0], later, found["copy"], found["finish"][-1])
    return [
        str(size),
        *(f"{found[key] / 2**30:.2f}" for key in ("bytes", "own")),
        *(f"{value:.2f}" for value in seconds),
        f"{later / found['blocking']:.3f}",
    ]


if __name__ == "__main__":
    run_tool(main)
