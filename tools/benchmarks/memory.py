"""The plan's memory against one GPU's: weights and gradients, optimizer, and the peak of real training steps.

    python tools/benchmarks/memory.py [shapes=[135M,1.7B]] [recompute=[none,full]] [key=value ...]

Random models with a real model's shapes, original and converted, three steps each. The plan is that of tools/plan.py
for the same settings; ratio is plan / measured. Memory that torch's allocator does not know (CUDA context, libraries)
is in neither.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, require_one_of, run_tool
from mha2mla_megatron.layout_plan.settings import GIB, PlanSettings
from mha2mla_megatron.layout_plan.stages import StagePlan, plan_stages
from mha2mla_megatron.model.implementation import IMPLEMENTATIONS
from mha2mla_megatron.model.parallel import initialize_parallel, own_world
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.config import DataSettings
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import build_training_model, train_step

sys.path.insert(0, str(Path(__file__).parent))
from shapes import KINDS, SHAPES, Shape, make_architecture
from train_step import random_batches

USAGE = "memory.py [key=value ...]"
STEPS = 3


@dataclass(frozen=True)
class MemorySettings:
    shapes: list[str] = field(default_factory=lambda: ["135M", "1.7B"])
    """Which are built: tiny, 135M, 1.7B (those of train_step.py, with their batches)."""

    recompute: list[str] = field(default_factory=lambda: ["none", "full"])
    """Which kinds of recomputing are run: none, latent (converted only), selective, full."""

    implementations: list[str] = field(default_factory=lambda: ["transformer_engine"])
    """Which are run, of those of tools/finetune.py."""

    output: str | None = None
    """A JSON file for the numbers."""

    def __post_init__(self) -> None:
        for key, valid in (
            ("shapes", tuple(SHAPES)),
            ("recompute", ("none", "latent", "selective", "full")),
            ("implementations", IMPLEMENTATIONS),
        ):
            for word in getattr(self, key):
                require_one_of(key, word, valid)


def planned(stage: StagePlan) -> dict[str, float]:
    """Bytes that should be allocated after each part."""
    model = stage.parameters + stage.gradients
    return {"model": model, "optimizer": model + stage.optimizer, "peak": stage.total}


def measured(
    architecture: Architecture, settings: PlanSettings, shape: Shape, device: torch.device
) -> dict[str, float]:
    """Bytes allocated after the model is built and after the optimizer is, and the most in three steps."""
    gc.collect()  # the model before this one: its wrappers refer to each other
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    found = {}
    (model,) = build_training_model(architecture, settings, torch.bfloat16, device)
    gc.collect()
    found["model"] = torch.cuda.memory_allocated() - before
    optimizer, schedule = build_optimizer([model], settings, torch.bfloat16)
    model.train()
    schedule.step(0)
    batches = random_batches(shape, device)
    # Transformer Engine's Adam makes its moments in the first update, so what stays is looked at after a step.
    train_step([model], optimizer, batches, settings, device)
    optimizer.zero_grad()
    found["optimizer"] = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS - 1):
        train_step([model], optimizer, batches, settings, device)
        schedule.step(1)
    torch.cuda.synchronize()
    found["peak"] = torch.cuda.max_memory_allocated() - before
    return found


@own_world()
def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=MemorySettings)
    settings = load_settings(MemorySettings, overrides, file)
    if not torch.cuda.is_available():
        raise UserError("memory.py measures a GPU's memory, and torch finds none here")
    device = initialize_parallel(PlanSettings().parallel)
    rows: list[dict[str, Any]] = []
    print(f"GiB on {torch.cuda.get_device_name()}, plan / measured = ratio")
    for name in settings.shapes:
        for implementation in settings.implementations:
            for recompute in settings.recompute:
                for model in ("original", "converted") if recompute != "latent" else ("converted",):
                    shape, architecture = SHAPES[name], make_architecture(SHAPES[name], KINDS[model])
                    run = PlanSettings(
                        micro_batch_size=shape.micro_batch_size, global_batch_size=shape.micro_batch_size, gpus=1,
                        implementation=implementation, recompute=recompute, dtype="bfloat16",
                        data=DataSettings(sequence_length=shape.sequence_length),
                    )  # fmt: skip
                    (stage,) = plan_stages(architecture, run)
                    plan, real = planned(stage), measured(architecture, run, shape, device)
                    rows.append({"shape": name, "implementation": implementation, "recompute": recompute,
                                 "model": model, "plan": plan, "measured": real})  # fmt: skip
                    parts = "   ".join(
                        f"{part} {plan[part] / GIB:6.2f} / {real[part] / GIB:6.2f} = {plan[part] / real[part]:.3f}"
                        for part in plan
                    )
                    print(f"{name:<5} {implementation:<18} {recompute:<9} {model:<9}  {parts}", flush=True)
    if settings.output:
        Path(settings.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_tool(main)
