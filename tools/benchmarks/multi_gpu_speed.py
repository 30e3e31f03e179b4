"""The jobs of multi_gpu.py that measure: time and memory of training steps, and how long a save holds them up.

They run in every process of a world at once; what they return is that of rank 0.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from shapes import KINDS, SHAPES, Shape, make_architecture
from timing import device_time
from train_step import random_batches

from mha2mla_megatron.layout_plan.settings import PlanSettings
from mha2mla_megatron.layout_plan.stages import plan_stages
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel
from mha2mla_megatron.training.checkpoint import StepSaver
from mha2mla_megatron.training.config import DataSettings
from mha2mla_megatron.training.host_copies import HostCopies
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import build_training_model, gather_weights, train_step

WARMUP = 3
LONGEST_SAVE = 120
"""Seconds after which a save in the background is waited for, so that the rest of the script has its time."""


class Training:
    """Random weights and the same random batch over and over, in the type that the device trains in."""

    def __init__(self, shape: Shape, kind: str, implementation: str, parallel: dict[str, Any]) -> None:
        self.shape, self.architecture = shape, make_architecture(shape, KINDS[kind])
        layout = ParallelConfig(**parallel)
        self.device = initialize_parallel(layout)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.settings = PlanSettings(
            steps=1000,
            micro_batch_size=shape.micro_batch_size,
            global_batch_size=shape.micro_batch_size * parallel_state.get_data_parallel_world_size(),
            implementation=implementation,
            dtype=str(dtype).removeprefix("torch."),
            data=DataSettings(sequence_length=shape.sequence_length),
            parallel=layout,
            device=self.device.type,
            gpus=torch.distributed.get_world_size(),
        )
        torch.cuda.synchronize()
        self.before = torch.cuda.memory_allocated()
        self.chunks = build_training_model(self.architecture, self.settings, dtype, self.device)
        self.optimizer, self.schedule = build_optimizer(self.chunks, self.settings, dtype)
        self.schedule.step(0)
        self.model = [chunk.module for chunk in self.chunks]
        self.batches = random_batches(shape, self.device)

    def step(self) -> float:
        """Milliseconds of one."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step(self.chunks, self.optimizer, self.batches, self.settings, self.device)
        self.schedule.step(1)
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)


def train(
    shape: str,
    kind: str,
    implementation: str,
    parallel: dict[str, Any],
    batches: dict[str, int],
    steps: int,
    micro_batch_size: int | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Steps with several global batches. batches: name -> micro-batches of each rank in a step; where there are more,
    fewer steps are timed.

    For each name: milliseconds of the steps, tokens a second of all ranks, and of every rank the planned and the
    measured peak of what torch allocates, in bytes; with `profile` what `device_time` says of one more step.
    """
    sizes = SHAPES[shape]
    run = Training(
        replace(sizes, micro_batch_size=micro_batch_size or sizes.micro_batch_size), kind, implementation, parallel
    )
    found = {}
    for name, count in batches.items():
        samples = count * run.settings.micro_batch_size * parallel_state.get_data_parallel_world_size()
        run.settings = replace(run.settings, global_batch_size=samples)
        for _ in range(1 if found else WARMUP):
            run.step()
        torch.cuda.reset_peak_memory_stats()
        times = [run.step() for _ in range(max(min(3, steps), steps // count))]
        stage = plan_stages(run.architecture, run.settings)[parallel_state.get_pipeline_model_parallel_rank()]
        mine = stage.total, torch.cuda.max_memory_allocated() - run.before
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, mine)
        rate = samples * run.shape.sequence_length / median(times) * 1000
        found[name] = {"ms": times, "tokens_per_second": rate, "memory": everyones, "layers": sizes.layers}
        if profile:
            found[name]["profile"] = device_time(run.step)
    return found


def save_stall(
    shape: str,
    kind: str,
    implementation: str,
    parallel: dict[str, Any],
    folder: str,
    layers: int,
    steps: int,
    saves: int,
    sequence_length: int | None = None,
) -> dict[str, Any]:
    """Milliseconds of steps without a save and while one is written; seconds that saves hold training up.

    saves: in the background, one after the other. `blocking`: one begun and finished at once. `begin`, `finish`: of
    each one in the background, `while_writing` the steps in between; `written` is false where one took longer than
    LONGEST_SAVE and training waited for the rest. `bytes`: of a checkpoint; `own`: of what rank 0 writes of it; `copy`:
    seconds of a copy of so many bytes to the host's memory.
    """
    sizes = replace(SHAPES[shape], layers=layers)
    sizes = replace(sizes, sequence_length=sequence_length or sizes.sequence_length)
    run, root = Training(sizes, kind, implementation, parallel), Path(folder)
    layout = run.settings.parallel.sizes(torch.distributed.get_world_size())
    for _ in range(WARMUP):
        run.step()
    plain = [run.step() for _ in range(steps)]
    root.mkdir(parents=True, exist_ok=True)

    def saver(in_background: bool) -> StepSaver:
        return StepSaver(root, run.model, run.optimizer, run.schedule, layout, 1, in_background)

    def timed(action: Callable[[], Any]) -> tuple[float, Any]:
        torch.distributed.barrier()
        start = time.perf_counter()
        result = action()
        return time.perf_counter() - start, result

    gather_weights(run.chunks)
    blocking, _ = timed(lambda: saver(False).begin(1, {"step": 1}).finish())
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    own = sum(file.stat().st_size for file in root.rglob("__0_*.distcp"))
    begin, finish, busy, written, writing = [], [], [], True, 0.0
    background = saver(True)
    for step in range(2, 2 + saves):
        gather_weights(run.chunks)
        start = time.perf_counter()
        seconds, pending = timed(lambda step=step: background.begin(step, {"step": step}))
        begin.append(seconds)
        while not (done := pending.written()) and time.perf_counter() - start < LONGEST_SAVE:
            busy.append(run.step())
        written, writing = written and done, time.perf_counter() - start
        finish.append(timed(pending.finish)[0])
    tensor, copies = torch.zeros(own, dtype=torch.uint8, device=run.device), HostCopies(kept=True)
    copies.take([tensor])
    copy, _ = timed(lambda: copies.take([tensor]))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(root)
    return {
        "plain": plain, "blocking": blocking, "begin": begin, "while_writing": busy, "finish": finish,
        "writing": writing, "written": written, "bytes": size, "own": own, "copy": copy,
    }  # fmt: skip
