"""Speed and memory of the converters on a model of a given shape, against `cp` of the same bytes.

    python tools/benchmarks/convert.py FOLDER [layers=32] [hidden=4096] [key=value ...]

The default shape is Llama-2-7B's. FOLDER, new or empty, holds at most two copies of the model at a time, and nothing at
the end. For the original model and for one with latents: Hugging Face -> Megatron and back, each a whole command with
its start, in turn with `cp -r` of what it reads. Then MHA -> MLA (plain SVD) of an original of `svd_layers` layers,
into a Hugging Face folder and straight to a Megatron checkpoint (ckpt_format=torch_dist). All are timed until the bytes
are on the disk (fsync), and with cold=true what is read is dropped from the page cache before. Memory is the command's
anonymous resident memory (RssAnon), sampled every 10 ms: pages of mapped files, which the system takes back when it
needs them, are not in it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.checkpoint.hf import HFWriter, write_config
from mha2mla_megatron.checkpoint.resume import identity, resumable_folder
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.convert import CKPT_FORMATS, converted_config
from mha2mla_megatron.errors import UserError, require_at_least, run_tool
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.settings import load_settings

USAGE = "convert.py FOLDER [key=value ...]"
TOOLS = Path(__file__).resolve().parents[1]
HEADER = ("conversion", "GB", "s", "GB/s", "cp GB/s", "of cp", "spread", "CPU s", "CPU s of cp", "anonymous GiB")


@dataclass(frozen=True)
class ConvertBenchmarkSettings:
    layers: int = 32
    """L."""

    hidden: int = 4096
    """h."""

    intermediate: int = 11008
    """Width of the MLP."""

    heads: int = 32
    """H; the head dim is hidden / heads."""

    groups: int = 32
    """G."""

    vocabulary: int = 32000
    """Rows of the embeddings, which are not tied."""

    rope: int = 16
    """r of the models with latents."""

    rank: int = 2048
    """c of the models with latents."""

    repeats: int = 3
    """Rounds; the median counts."""

    cold: bool = True
    """Drop what is read from the page cache before each reading."""

    svd_layers: int = 1
    """Layers of the model that is converted to MLA; 0: leave it out."""

    def __post_init__(self) -> None:
        for key in ("layers", "repeats"):
            require_at_least(key, getattr(self, key), 1)
        require_at_least("svd_layers", self.svd_layers, 0)


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu: float
    """Seconds, of all threads and of the kernel for them."""

    anonymous: int
    """Bytes."""


def main(argv: list[str]) -> None:
    (target,), overrides, file = split_words(argv, USAGE, 1, 1, schema=ConvertBenchmarkSettings)
    settings, folder = load_settings(ConvertBenchmarkSettings, overrides, file), Path(target)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for converted in (False, True) for row in round_trip(settings, folder, converted)]
    rows += mha_to_mla(settings, folder) if settings.svd_layers else []
    print(format_table(HEADER, rows))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(f"medians of {settings.repeats}, page cache {'cold' if settings.cold else 'as it comes'}, {threads} threads")
    shutil.rmtree(folder)


def round_trip(settings: ConvertBenchmarkSettings, folder: Path, converted: bool) -> Iterator[tuple[str, ...]]:
    """A row for each direction; the source goes when its direction is done."""
    kind = "MLA" if converted else "original"
    source = make_model(settings, folder / "hf", converted)
    for tool, target in (("hf_to_megatron", folder / "megatron"), ("megatron_to_hf", folder / "back")):
        yield compare(settings, f"{tool}, {kind}", tool, source, target)
        shutil.rmtree(source)
        source = target
    shutil.rmtree(source)


def mha_to_mla(settings: ConvertBenchmarkSettings, folder: Path) -> Iterator[tuple[str, ...]]:
    """A row for each format that the conversion can write."""
    source = make_model(dataclasses.replace(settings, layers=settings.svd_layers), folder / "hf", False)
    words = [f"partial_rope.qk_rope_head_dim={settings.rope}", "low_rank.method=joint"]
    words.append(f"low_rank.kv_lora_rank={settings.rank}")
    for ckpt_format in CKPT_FORMATS:
        name = f"mha_to_mla to {ckpt_format}, {settings.svd_layers} layers"
        yield compare(settings, name, "mha_to_mla", source, folder / "mla", *words, f"ckpt_format={ckpt_format}")


def compare(
    settings: ConvertBenchmarkSettings, name: str, tool: str, source: Path, target: Path, *words: str
) -> tuple[str, ...]:
    """The row `name`: a converter and `cp`, in turn; the converter's last output stays."""
    size = sum(file.stat().st_size for file in files_of(source))
    copies, runs = [], []
    for _ in range(settings.repeats):
        shutil.rmtree(target, ignore_errors=True)
        drop_cache(source, settings.cold)
        copies.append(copy(source, target))
        shutil.rmtree(target)
        drop_cache(source, settings.cold)
        runs.append(convert(tool, source, target, *words))
    seconds, cp = (statistics.median(run.seconds for run in kind) for kind in (runs, copies))
    spread = (max(run.seconds for run in runs) - min(run.seconds for run in runs)) / seconds
    cpu, cp_cpu = (statistics.median(run.cpu for run in kind) for kind in (runs, copies))
    return (
        name, f"{size / 1e9:.3f}", f"{seconds:.1f}", f"{size / seconds / 1e9:.3f}",
        f"{size / cp / 1e9:.3f}", f"{cp / seconds:.2f}", f"{spread:.0%}",
        f"{cpu:.1f}", f"{cp_cpu:.1f}", f"{max(run.anonymous for run in runs) / 2**30:.2f}",
    )  # fmt: skip


def make_model(settings: ConvertBenchmarkSettings, target: Path, converted: bool) -> Path:
    """A random bf16 model in shards of 5 GB. Tensors are cut out of one pool, which is larger than an attention
    projection of 7B: drawing each number would take longer than all conversions."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": settings.layers,
        "hidden_size": settings.hidden, "intermediate_size": settings.intermediate,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.groups,
        "vocab_size": settings.vocabulary, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if converted:
        mla = MHA2MLAConfig(
            PartialRopeConfig(qk_rope_head_dim=settings.rope),
            LowRankConfig(method="joint", kv_lora_rank=settings.rank),
        )
        original = parse_architecture(config, "the settings")
        config = converted_config(config, original.converted(original.resolve(mla)), "auto")
    shapes = parse_architecture(config, "the settings").tensor_shapes()
    torch.manual_seed(0)
    pool = (torch.randn(1 << 25) * 0.02).to(torch.bfloat16)
    planned = {
        name: torch.empty(shape, dtype=torch.int64 if name.endswith("rope_pairs") else pool.dtype, device="meta")
        for name, shape in shapes.items()
    }
    with resumable_folder(target, False, identity(f"random, converted={converted}", settings, [])) as partial:
        writer = HFWriter(partial, planned, 5 * 10**9)
        for i, (name, tensor) in enumerate(planned.items()):
            if name.endswith("rope_pairs"):
                writer.add(name, torch.arange(tensor.shape[1]).repeat(tensor.shape[0], 1))
            else:
                repeated = pool.roll(-997 * i).repeat(-(-tensor.numel() // len(pool)))
                writer.add(name, repeated[: tensor.numel()].view(tensor.shape))
        writer.close()
        write_config(partial.path, config)
    return target


def copy(source: Path, target: Path) -> Run:
    """`cp -r`, until the copy is on the disk."""
    return timed(["cp", "-r", str(source), str(target)], target)


def convert(name: str, source: Path, target: Path, *words: str) -> Run:
    """A converter's command, which ends when its output is on the disk."""
    return timed([sys.executable, str(TOOLS / f"convert_{name}.py"), str(source), str(target), *words], target)


def timed(command: list[str], target: Path) -> Run:
    """Run a command to its end, and until what it wrote into `target` is on the disk."""
    start, anonymous = time.monotonic(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max([anonymous, *(int(n) * 1024 for n in re.findall(r"RssAnon:\s*(\d+)", status))])
            time.sleep(0.01)
        for file in files_of(target):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{command[:2]} ended with {process.returncode}: {errors.read().decode()}")
    return Run(seconds, ended[2].ru_utime + ended[2].ru_stime, anonymous)


def drop_cache(folder: Path, cold: bool) -> None:
    """Write back and forget what the page cache has of these files; needs no rights."""
    for file in files_of(folder) if cold else []:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


if __name__ == "__main__":
    run_tool(main)
