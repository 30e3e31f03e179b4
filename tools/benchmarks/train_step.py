"""Parity and speed of the training step on one GPU: original and converted, local and Transformer Engine.

    python tools/benchmarks/train_step.py [shapes=[135M,1.7B]] [key=value ...]

Models are random with a real model's shapes. First the logits: transformers, the local spec and the Transformer Engine
spec in bf16, each against transformers in float32; what transformers itself loses in bf16 is the noise floor. Then
tokens per second of a whole step (forward, backward, gradient clipping, AdamW with float32 master weights).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.convert_hf_megatron import ToMegatronSettings, hf_to_megatron
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.config import LowRankConfig, PartialRopeConfig
from mha2mla_megatron.convert import ConvertSettings, convert_model
from mha2mla_megatron.errors import UserError, run_tool
from mha2mla_megatron.model.cpu_mode import has_transformer_engine
from mha2mla_megatron.model.parallel import initialize_parallel
from mha2mla_megatron.model.provider import build_model, transformer_config
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.checkpoint import load_weights
from mha2mla_megatron.training.config import DataSettings, FinetuneSettings
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import build_training_model, train_step

sys.path.insert(0, str(Path(__file__).parent))
from shapes import SHAPES, Shape

USAGE = "train_step.py [key=value ...]"
NOISE_FACTOR = 1.5
"""A bf16 implementation may lose this much more than transformers' own bf16 does: sums run in another order."""


@dataclass(frozen=True)
class BenchmarkSettings:
    shapes: list[str] = field(default_factory=lambda: ["135M", "1.7B"])
    """Which shapes are timed: tiny, 135M, 1.7B."""

    parity_shape: str = "135M"
    """Whose logits are compared."""

    steps: int = 9
    """Timed steps of each round."""

    rounds: int = 2
    """Times that original and converted take turns."""

    implementations: list[str] = field(default_factory=lambda: ["transformer_engine"])
    """Which are timed: transformer_engine, local."""

    output: str | None = None
    """A JSON file for the numbers."""


def make_folder(folder: Path, shape: Shape, converted: bool, dtype: torch.dtype) -> Path:
    """A random model of this shape as a Hugging Face folder, converted (uniform, joint) or not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=shape.hidden, intermediate_size=shape.intermediate, max_position_embeddings=2048,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        tie_word_embeddings=True, initializer_range=0.04,
    )  # fmt: skip
    config.dtype = dtype
    original = folder / "original"
    if not original.exists():
        LlamaForCausalLM(config).to(dtype).save_pretrained(original)
    if not converted:
        return original
    mla = folder / "mla"
    head_dim = shape.hidden // shape.heads
    settings = ConvertSettings(
        partial_rope=PartialRopeConfig(qk_rope_head_dim=head_dim // 8),
        low_rank=LowRankConfig(d_kv=shape.d_kv),
        overwrite=True,
    )
    convert_model(original, mla, settings)
    return mla


def parity(shape: Shape, implementations: list[str], device: torch.device) -> list[dict]:
    """Relative errors of the logits against transformers in float32, for the original and the converted model."""
    rows = []
    tokens = torch.randint(0, 49152, (2, 512), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(512, device=device).expand(2, -1)
    for converted in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_folder(Path(scratch), shape, converted, torch.bfloat16)
            exact = _hf_logits(folder, torch.float32, tokens, device)
            errors = {"transformers bf16": _error(_hf_logits(folder, torch.bfloat16, tokens, device), exact)}
            hf_to_megatron(folder, Path(scratch) / "megatron", ToMegatronSettings())
            _, step = locate_checkpoint(Path(scratch) / "megatron")
            architecture = read_architecture(folder)
            for implementation in implementations:
                for dtype in (torch.float32, torch.bfloat16):
                    if dtype == torch.float32 and implementation != "local":
                        continue  # fused attention kernels are for 16-bit types
                    config = transformer_config(architecture, FinetuneSettings().parallel, dtype)
                    model = build_model(architecture, config, implementation).to(device).eval()
                    load_weights([model], step, architecture)
                    with torch.no_grad():
                        logits = model(tokens, positions, None)
                    errors[f"{implementation} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = _error(logits, exact)
                    del model
        rows += [
            {"model": "converted" if converted else "original", "logits of": k, "error": v} for k, v in errors.items()
        ]
        floor = errors["transformers bf16"]
        for name, error in errors.items():
            limit = 1e-5 if name.endswith("fp32") else NOISE_FACTOR * floor
            if not error < limit:
                raise SystemExit(f"{name}: relative error {error:.2e} of the logits is above {limit:.2e}")
    return rows


def _hf_logits(folder: Path, dtype: torch.dtype, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).to(device)
    with torch.no_grad():
        return model(tokens).logits


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """||logits - exact|| / ||exact||."""
    return ((logits.float() - exact).norm() / exact.norm()).item()


def timed_steps(folder: Path, shape: Shape, implementation: str, steps: int, device: torch.device) -> dict:
    """Milliseconds of each of `steps` training steps after three untimed ones, and the memory they took."""
    settings = FinetuneSettings(
        steps=100,
        micro_batch_size=shape.micro_batch_size,
        global_batch_size=shape.micro_batch_size,
        implementation=implementation,
        data=DataSettings(sequence_length=shape.sequence_length),
    )
    gc.collect()  # the model timed before this one: its wrappers refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chunks = build_training_model(read_architecture(folder), settings, dtype, device)
    optimizer, schedule = build_optimizer(chunks, settings, dtype)
    schedule.step(0)
    batches = random_batches(shape, device)
    times = []
    for i in range(3 + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step(chunks, optimizer, batches, settings, device)
        schedule.step(1)
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return {"ms": times, "GiB": torch.cuda.max_memory_allocated() / 2**30}


def random_batches(shape: Shape, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The same random tokens over and over, already on the device: reading data is not what is measured."""
    tokens = torch.randint(0, 49152, (shape.micro_batch_size, shape.sequence_length + 1), device=device)
    positions = torch.arange(shape.sequence_length, device=device).expand(shape.micro_batch_size, -1)
    mask = torch.ones(shape.micro_batch_size, shape.sequence_length, device=device)
    return repeat(
        {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions,
         "loss_mask": mask}
    )  # fmt: skip


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=BenchmarkSettings)
    settings = load_settings(BenchmarkSettings, overrides, file)
    for name in [*settings.shapes, settings.parity_shape]:
        if name not in SHAPES:
            raise UserError(f"shapes: unknown shape '{name}'; valid: {', '.join(SHAPES)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = initialize_parallel(FinetuneSettings().parallel)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    implementations = ["local", "transformer_engine"] if has_transformer_engine() else ["local"]
    result: dict = {"device": card, "torch": torch.__version__, "parity": [], "speed": []}
    result["parity"] = parity(SHAPES[settings.parity_shape], implementations, device)
    print(f"\nLogits on {card}, {settings.parity_shape} shape, relative to transformers in float32:")
    for row in result["parity"]:
        print(f"  {row['model']:<10} {row['logits of']:<24} {row['error']:.2e}", flush=True)
    print(f"\nTraining step on {card}:")
    print(f"  {'shape':<6} {'spec':<19} {'model':<10} {'ms/step':>9} {'spread':>7} {'tokens/s':>10} {'GiB':>6}")
    for name in settings.shapes:
        for implementation in settings.implementations:
            result["speed"] += speed(name, implementation, settings, device)
    if settings.output:
        Path(settings.output).write_text(json.dumps(result, indent=2) + "\n")


def speed(name: str, implementation: str, settings: BenchmarkSettings, device: torch.device) -> list[dict]:
    """Original and converted in turn; a row each, with the ratio of their tokens/s on the second."""
    shape, samples = SHAPES[name], {"original": [], "converted": []}
    memory = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {m: make_folder(Path(scratch), shape, m == "converted", torch.bfloat16) for m in samples}
        for _ in range(settings.rounds):
            for model, times in samples.items():
                timed = timed_steps(folders[model], shape, implementation, settings.steps, device)
                times += timed["ms"]
                memory[model] = timed["GiB"]
    rows = []
    for model, times in samples.items():
        ms = statistics.median(times)
        rate = 1000 * shape.sequence_length * shape.micro_batch_size / ms
        spread = (max(times) - min(times)) / ms
        rows.append({"shape": name, "implementation": implementation, "model": model, "ms": ms, "spread": spread,
                     "tokens_per_second": rate, "GiB": memory[model]})  # fmt: skip
        print(
            f"  {name:<6} {implementation:<19} {model:<10} {ms:>9.1f} {spread:>7.1%} {rate:>10,.0f} "
            f"{memory[model]:>6.1f}"
        )
    ratio = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    print(f"  {name:<6} {implementation:<19} converted / original: {ratio:.3f}", flush=True)
    return rows


if __name__ == "__main__":
    run_tool(main)
