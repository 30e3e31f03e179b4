"""Parity and speed of the training step on one GPU: original and converted, every implementation, and transformers.

    python tools/benchmarks/train_step.py [shapes=[135M,1.7B]] [key=value ...]

Models are random with a real model's shapes. First the logits: transformers and each implementation in bf16, against
transformers in float32; what transformers itself loses in bf16 is the noise floor. Then whole steps (forward, backward,
gradient clipping, AdamW with float32 master weights), each model and implementation in turn, round after round. A peer
is the step that research code takes of the same model: transformers, all in bf16, torch's fused AdamW, without master
weights, as it is or compiled. With +teacher beside the same implementation without, what a teacher costs:
(its forward pass + the step without it) / the step with it.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.convert_hf_megatron import ToMegatronSettings, hf_to_megatron
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.convert import ConvertSettings, convert_model
from mha2mla_megatron.errors import UserError, require_one_of, run_tool
from mha2mla_megatron.model.cpu_mode import has_transformer_engine
from mha2mla_megatron.model.implementation import IMPLEMENTATIONS, choose_implementation
from mha2mla_megatron.model.parallel import initialize_parallel, own_world
from mha2mla_megatron.model.provider import build_model, transformer_config
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.checkpoint import load_weights
from mha2mla_megatron.training.config import DataSettings, DistillationSettings, FinetuneSettings
from mha2mla_megatron.training.distillation import Distillation, build_teacher
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import StepResult, build_training_model, train_step
from mha2mla_megatron.training.step_graph import WARMUP, capture, graph_of, use_own_stream

sys.path.insert(0, str(Path(__file__).parent))
from shapes import CONVERSIONS, MODELS, SHAPES, Shape, conversion, make_architecture, original_config, step_flops
from timing import device_time

USAGE = "train_step.py [key=value ...]"
NOISE_FACTOR = 1.5
"""A bf16 implementation may lose this much more than transformers' own bf16 does: sums run in another order."""

OPTIONS: dict[str, dict[str, Any]] = {
    "graph": {"cuda_graph": True},
    "fp8": {"fp8": "current"},
    "latent": {"recompute": "latent"},
    "full": {"recompute": "full"},
    "teacher": {"distillation": DistillationSettings(teacher="the original model, with random weights")},
}
"""What may follow an implementation after +, and the settings that it stands for."""

PEERS = ("transformers", "transformers_compiled")


@dataclass(frozen=True)
class BenchmarkSettings:
    shapes: list[str] = field(default_factory=lambda: ["135M", "1.7B"])
    """Which shapes are timed: tiny, 135M, 360M, 1.7B, 7B."""

    models: list[str] = field(default_factory=lambda: ["original", "mla-68.75"])
    """Which models: original, mla-68.75, mla-87.5 (joint latents, by the part of the cache saved), split-68.75,
    shared-68.75 (one rotated key for all heads), wide-68.75 (the same beside all d unrotated dims)."""

    implementations: list[str] = field(default_factory=lambda: ["auto"])
    """Which are timed: those of `implementation` in tools/finetune.py, with +graph, +fp8, +latent, +full, +teacher for
    the settings that these stand for, and the peers transformers and transformers_compiled."""

    parity_shape: str | None = "135M"
    """Whose logits are compared; null: none."""

    steps: int = 9
    """Timed steps of each round."""

    micro_batches: int = 1
    """Whose gradients are added up in a step."""

    rounds: int = 2
    """Times that models and implementations take turns."""

    profile: int = 0
    """Kernels to list of one more step, those that take longest. 0: no profile."""

    output: str | None = None
    """A JSON file for the numbers."""

    def __post_init__(self) -> None:
        for key, valid in (
            ("shapes", tuple(SHAPES)),
            ("models", MODELS),
        ):
            for word in getattr(self, key):
                require_one_of(key, word, valid)
        for word in self.implementations:
            name, *options = word.split("+")
            require_one_of("implementations", name, ("auto", *IMPLEMENTATIONS, *PEERS))
            if name in PEERS and options:
                raise UserError(f"implementations: {word}: nothing can follow a peer; valid: {name}")
            for option in options:
                require_one_of(f"implementations: {name}+", option, tuple(OPTIONS))
        if self.parity_shape is not None:
            require_one_of("parity_shape", self.parity_shape, tuple(SHAPES))


def make_folder(folder: Path, shape: Shape, model: str, dtype: torch.dtype) -> Path:
    """A random model as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(**original_config(shape), initializer_range=0.04)
    config.dtype = dtype
    original = folder / "original"
    if not original.exists():
        LlamaForCausalLM(config).to(dtype).save_pretrained(original)
    if model == "original":
        return original
    wanted = conversion(shape, model)
    convert_model(
        original,
        folder / model,
        ConvertSettings(partial_rope=wanted.partial_rope, low_rank=wanted.low_rank, overwrite=True),
    )
    return folder / model


def parity(shape: Shape, implementations: list[str], device: torch.device) -> list[dict]:
    """Relative errors of the logits against transformers in float32, for the original and the converted model."""
    rows = []
    tokens = torch.randint(0, shape.vocabulary, (2, 512), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(512, device=device).expand(2, -1)
    for kind in ("original", "mla-68.75"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_folder(Path(scratch), shape, kind, torch.bfloat16)
            exact = _hf_logits(folder, torch.float32, tokens, device)
            errors = {"transformers bf16": _error(_hf_logits(folder, torch.bfloat16, tokens, device), exact)}
            hf_to_megatron(folder, Path(scratch) / "megatron", ToMegatronSettings())
            _, step = locate_checkpoint(Path(scratch) / "megatron")
            architecture = read_architecture(folder)
            for implementation in implementations:
                for dtype in (torch.float32, torch.bfloat16):
                    if dtype == torch.float32 and not implementation.startswith("local"):
                        continue  # fused attention kernels are for 16-bit types
                    config = transformer_config(architecture, FinetuneSettings().parallel, dtype)
                    model = build_model(architecture, config, implementation).to(device).eval()
                    load_weights([model], step, architecture)
                    with torch.no_grad():
                        logits = model(tokens, positions, None)
                    errors[f"{implementation} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = _error(logits, exact)
                    del model
        rows += [{"model": kind, "logits of": name, "error": error} for name, error in errors.items()]
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


def run_settings(shape: Shape, word: str, micro_batches: int = 1) -> FinetuneSettings:
    """Of a run with this one of `implementations`, and so many micro batches a step."""
    implementation, *options = word.split("+")
    return FinetuneSettings(
        steps=10_000,
        micro_batch_size=shape.micro_batch_size,
        global_batch_size=shape.micro_batch_size * micro_batches,
        implementation=implementation,
        data=DataSettings(sequence_length=shape.sequence_length),
        **{key: value for option in options for key, value in OPTIONS[option].items()},
    )


def training_step(
    architecture: Architecture, shape: Shape, run: FinetuneSettings, device: torch.device
) -> Callable[[], StepResult]:
    """A function that takes one training step of a random model."""
    dtype = training_type(device)
    graph = graph_of(run, device)
    chunks = build_training_model(architecture, run, dtype, device)
    distillation = None
    if run.distillation.teacher is not None:
        distillation = Distillation(make_architecture(shape, "original"), chunks, run, dtype, device)
    optimizer, schedule = build_optimizer(chunks, run, dtype)
    schedule.step(0)
    batches = random_batches(shape, device)

    def step() -> StepResult:
        result = train_step(chunks, optimizer, batches, run, device, distillation, graph)
        schedule.step(1)
        return result

    return step


def teacher_forward(shape: Shape, run: FinetuneSettings, device: torch.device) -> Callable[[], Any]:
    """A function that runs what a teacher adds to the step, its forward pass, alone; as a graph where the step is."""
    if run.cuda_graph:
        use_own_stream()
    (teacher,) = build_teacher(make_architecture(shape, "original"), run, training_type(device), device)
    batch = next(random_batches(shape, device))
    forward = torch.no_grad()(partial(teacher, batch["tokens"], batch["position_ids"], None))
    if not run.cuda_graph:
        return forward
    for _ in range(WARMUP):
        forward()
    graph, logits = capture(forward)

    def replay(kept: Any = (forward, logits)) -> None:  # the weights and tokens that the graph reads live on in it
        graph.replay()

    return replay


def training_type(device: torch.device) -> torch.dtype:
    """Of a model and its teacher."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peer_step(shape: Shape, model: str, compiled: bool, micro_batches: int, device: torch.device) -> Callable[[], Any]:
    """The same of a model in transformers, all of it in bf16."""
    import dataclasses

    from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
    from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM

    words = original_config(shape)
    words.pop("model_type")
    with device:
        torch.set_default_dtype(torch.bfloat16)
        if model == "original":
            network: Any = LlamaForCausalLM(LlamaConfig(**words))
        else:
            mla = dataclasses.asdict(make_architecture(shape, model).mla)  # type: ignore[arg-type]
            network = MHA2MLALlamaForCausalLM(MHA2MLALlamaConfig(**words, mha2mla=mla))
        torch.set_default_dtype(torch.float32)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward = torch.compile(network) if compiled else network
    batch = next(random_batches(shape, device))

    def step() -> None:
        for _ in range(micro_batches):
            # transformers shifts the labels itself.
            loss = forward(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False).loss
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_batches(shape: Shape, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The same random tokens over and over, already on the device: reading data is not what is measured."""
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.micro_batch_size, shape.sequence_length + 1)
    tokens = torch.randint(0, shape.vocabulary, size, device=device, generator=generator)
    positions = torch.arange(shape.sequence_length, device=device).expand(shape.micro_batch_size, -1)
    mask = torch.ones(shape.micro_batch_size, shape.sequence_length, device=device)
    return repeat(
        {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions,
         "loss_mask": mask}
    )  # fmt: skip


def timed_steps(make: Callable[[], Callable[[], Any]], steps: int, kernels: int) -> dict[str, Any]:
    """Milliseconds of each of `steps` steps after some untimed ones, the memory they took, and a profile's kernels."""
    gc.collect()  # the model timed before this one: its wrappers refer to each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    times = []
    for i in range(WARMUP + 1 + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i > WARMUP:
            times.append(1000 * (time.perf_counter() - start))
    return {"ms": times, "GiB": torch.cuda.max_memory_allocated() / 2**30, "kernels": profiled(step, kernels)}


def profiled(step: Callable[[], Any], kernels: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of calls of those that take longest in a step, then all of them together."""
    if kernels == 0:
        return []
    rows = device_time(step)["kernels"]
    return [*rows[:kernels], ("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def matrix_product_ceiling(device: torch.device) -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product of random bf16 matrices, the best of three medians."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    medians = []
    for _ in range(3):
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return 2 * size**3 / min(medians)


@own_world()
def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=BenchmarkSettings)
    settings = load_settings(BenchmarkSettings, overrides, file)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = initialize_parallel(FinetuneSettings().parallel)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    compared = list(IMPLEMENTATIONS) if has_transformer_engine() else ["local"]
    result: dict = {"device": card, "torch": torch.__version__, "parity": [], "speed": []}
    if settings.parity_shape is not None:
        result["parity"] = parity(SHAPES[settings.parity_shape], compared, device)
        print(f"\nLogits on {card}, {settings.parity_shape} shape, relative to transformers in float32:")
        for row in result["parity"]:
            print(f"  {row['model']:<10} {row['logits of']:<32} {row['error']:.2e}", flush=True)
    result["ceiling"] = matrix_product_ceiling(device)
    print(f"\nTraining step on {card}; a large bf16 matrix product runs at {result['ceiling'] / 1e12:.0f} TFLOP/s:")
    print(
        f"  {'shape':<5} {'implementation':<27} {'model':<11} {'ms/step':>8} {'spread':>7} {'tokens/s':>9} "
        f"{'TFLOP/s':>8} {'MFU':>6} {'GiB':>6}"
    )
    for name in settings.shapes:
        result["speed"] += speed(name, settings, result["ceiling"], device)
        if settings.output:
            Path(settings.output).write_text(json.dumps(result, indent=2) + "\n")


def speed(name: str, settings: BenchmarkSettings, ceiling: float, device: torch.device) -> list[dict]:
    """A row for each implementation and model, taken in turn; MFU: of what a large matrix product reaches."""
    shape = SHAPES[name]
    runs = [
        (word.replace("auto", choose_implementation("auto")), model)
        for word in settings.implementations
        for model in settings.models
    ]
    samples: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    teachers: dict[tuple[str, str], list[float]] = {run: [] for run in runs if (untaught(run[0]), run[1]) in runs}
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for turn in range(settings.rounds):
        for run in runs:
            implementation, model = run
            if implementation in PEERS:
                compiled = implementation == "transformers_compiled"
                make = partial(peer_step, shape, model, compiled, settings.micro_batches, device)
            else:
                wanted = run_settings(shape, implementation, settings.micro_batches)
                make = partial(training_step, make_architecture(shape, model), shape, wanted, device)
            try:
                last[run] = timed_steps(make, settings.steps, settings.profile * (turn == settings.rounds - 1))
                if run in teachers:
                    alone = partial(teacher_forward, shape, wanted, device)
                    forward = timed_steps(alone, settings.steps, 0)["ms"]  # of one micro batch
                    teachers[run] += [settings.micro_batches * ms for ms in forward]
            except torch.cuda.OutOfMemoryError:
                print(f"  {name:<5} {implementation:<27} {model:<11} does not fit", flush=True)
                continue
            samples[run] += last[run]["ms"]
    rows = []
    for (implementation, model), times in samples.items():
        if not times:
            continue
        ms = statistics.median(times)
        batches = settings.micro_batches
        rate, flops = 1000 * batches * shape.tokens / ms, 1000 * batches * step_flops(shape, model) / ms
        row = {"shape": name, "implementation": implementation, "model": model, "micro_batches": batches, "ms": ms,
               "spread": (max(times) - min(times)) / ms, "tokens_per_second": rate, "flops": flops,
               "mfu": flops / ceiling, **{k: last[implementation, model][k] for k in ("GiB", "kernels")}}  # fmt: skip
        rows.append(row)
        print(
            f"  {name:<5} {implementation:<27} {model:<11} {ms:>8.1f} {row['spread']:>7.1%} {rate:>9,.0f} "
            f"{flops / 1e12:>8.0f} {row['mfu']:>6.3f} {row['GiB']:>6.1f}",
            flush=True,
        )
        for kernel, milliseconds, calls in row["kernels"]:
            print(f"      {milliseconds:>8.2f} ms  {calls:>5}  {kernel[:90]}", flush=True)
    rates = {(row["implementation"], row["model"]): row["tokens_per_second"] for row in rows}
    for (implementation, model), rate in rates.items():
        if model in CONVERSIONS and (implementation, "original") in rates:
            ratio = rate / rates[implementation, "original"]
            print(f"  {name:<5} {implementation:<27} {model} / original: {ratio:.3f}", flush=True)
    found = {(row["implementation"], row["model"]): row for row in rows}
    for run, times in teachers.items():
        implementation, model = run
        plain = found.get((untaught(implementation), model))
        if run in found and plain is not None:
            row, forward = found[run], statistics.median(times)
            row["teacher_ms"], row["teacher_ratio"] = forward, (forward + plain["ms"]) / row["ms"]
            print(
                f"  {name:<5} {implementation:<27} {model} (teacher's forward {forward:.1f} ms + step without it "
                f"{plain['ms']:.1f}) / step with it: {row['teacher_ratio']:.3f}",
                flush=True,
            )
    return rows


def untaught(implementation: str) -> str | None:
    """The same one of `implementations` without its teacher; None for one that has none."""
    word, *options = implementation.split("+")
    if "teacher" not in options:
        return None
    return "+".join((word, *(option for option in options if option != "teacher")))


if __name__ == "__main__":
    run_tool(main)
