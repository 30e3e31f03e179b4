"""The training loop: Megatron's DDP, schedules and distributed optimizer over an original or converted model."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.convert_hf_megatron import write_hf_side
from mha2mla_megatron.checkpoint.megatron import BestStep, iteration_folder, locate_checkpoint, write_best
from mha2mla_megatron.data.dataset import check_data, sample_batches
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.implementation import choose_implementation
from mha2mla_megatron.model.parallel import check_layout, initialize_parallel, launched_world_size
from mha2mla_megatron.settings import require_keys, save_settings
from mha2mla_megatron.together import on_first_rank
from mha2mla_megatron.training.cached_teacher import CachedTeacher, find_cache
from mha2mla_megatron.training.checkpoint import (
    PendingStep,
    StepSaver,
    load_weights,
    own_root,
    resume_average,
    resume_run,
)
from mha2mla_megatron.training.checks import check_reset, check_samples
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.determinism import deterministic_algorithms
from mha2mla_megatron.training.distillation import Teacher, find_teacher, load_teacher
from mha2mla_megatron.training.flops import Utilisation, peak_tflops, training_flops
from mha2mla_megatron.training.log import StepLog
from mha2mla_megatron.training.lora import lora_shapes
from mha2mla_megatron.training.lr_scale import lr_factors
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.position import Position
from mha2mla_megatron.training.run_data import RunData, end_of_document
from mha2mla_megatron.training.signals import StopRequest
from mha2mla_megatron.training.skipped_steps import SkippedSteps
from mha2mla_megatron.training.step import build_training_model, gather_weights, train_step, training_dtype
from mha2mla_megatron.training.step_graph import StepGraph, graph_of
from mha2mla_megatron.training.validation import Validation
from mha2mla_megatron.training.wandb_log import check_wandb
from mha2mla_megatron.training.weight_average import WeightAverage


def finetune(settings: FinetuneSettings) -> None:
    """Run (or resume) a fine-tuning to its last step; checkpoints, settings and logs go under `settings.save`.

    Raises UserError for bad settings, an impossible layout or files of another model, before a weight is read.
    """
    with deterministic_algorithms(settings.deterministic):
        _finetune(settings)


def _finetune(settings: FinetuneSettings) -> None:
    require_keys(settings, "load", "save", "data.train")
    side, weights = locate_checkpoint(Path(str(settings.load)))
    root = Path(str(settings.save))
    if weights_of_hf := sorted(root.glob("*.safetensors")):
        raise UserError(f"save: {root}: holds a Hugging Face model ({weights_of_hf[0].name}); give another folder")
    architecture = read_architecture(side)
    check_layout(architecture, settings.parallel, launched_world_size())
    check_samples(settings, architecture, launched_world_size())
    lr_factors(architecture, settings.optimizer.lr_scale, lora_shapes(architecture, settings.lora))
    check_wandb(settings)
    eod = end_of_document(settings, side)
    # Where something depends on the ends of documents, the files must have the model's.
    end = eod if settings.data.eod_mask_loss or settings.data.reset_attention_mask else None
    check_data("data.train", settings.data.train, architecture.vocab_size, settings.data.shares, end)
    if settings.validation.data is not None:
        check_data("validation.data", settings.validation.data, architecture.vocab_size, eod=end)
    implementation = settings.implementation if settings.implementation != "auto" else choose_implementation("auto")
    check_reset(settings, architecture, implementation)
    teacher = None if settings.distillation.teacher is None else find_teacher(settings, architecture)
    cache = None if settings.distillation.cache is None else find_cache(settings, architecture.vocab_size, eod)
    device = initialize_parallel(settings.parallel, settings.seed)
    dtype = training_dtype(settings, device)
    graph = graph_of(settings, device)
    chunks = build_training_model(architecture, settings, dtype, device)
    optimizer, schedule = build_optimizer(chunks, settings, dtype)
    distillation: Teacher | None = None if teacher is None else load_teacher(*teacher, chunks, settings, dtype, device)
    if cache is not None:
        distillation = CachedTeacher(chunks, settings, device)
        cache.read = parallel_state.is_pipeline_last_stage()
    model = [chunk.module for chunk in chunks]
    with own_root(root):
        resumed = resume_run(root, architecture, model, optimizer, schedule, settings.lora)
        run: dict[str, Any] = {"step": 0} if resumed is None else resumed.run
        step, best = run["step"], BestStep.of(run)
        if step > settings.steps:
            raise UserError(
                f"steps: {settings.steps}, but {root} is at step {step}; valid: {step} or more, or another save"
            )
        if best is not None and not iteration_folder(root, best.step).is_dir():
            best = None
        # A run saved by an earlier version has no position of its own.
        position = Position.of(settings, step, run.get("samples", step * settings.global_batch_size))
        if resumed is None:
            load_weights(model, weights, architecture)
            optimizer.reload_model_params()
        decay = settings.optimizer.ema_decay
        average = WeightAverage(optimizer, decay) if decay > 0 else None
        if resumed is not None:
            resume_average(resumed, model, average)

        def write_beside() -> None:
            if resumed is None:
                write_hf_side(side, root)
            save_settings(settings, root / "settings.yaml")
            write_best(root, best)
            for line in position.changes(run.get("order", position.order)):
                print(f"warning: {root}: {line}", file=sys.stderr, flush=True)
            way = f"from step {step} to {settings.steps}" if step < settings.steps else f"step {step} was the last one"
            print(f"{root}: {way}, {dtype}, {settings.implementation} on {device}", flush=True)

        on_first_rank(write_beside, f"save: {root}: cannot be written")
        data = RunData(settings, eod, architecture.vocab_size, root)
        batches = sample_batches(
            data.samples(settings.data.train, position.total, settings.data.shares, 0, cache),
            position.first,
            position.total,
            settings.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            settings.data.workers,
        )
        held_out = {name: Validation(samples, settings, device) for name, samples in data.held_out().items()}
        guard = SkippedSteps(settings, run, position)
        log = _open_log(root, settings, step, _utilisation(architecture, settings, dtype, device))
        _Training(
            settings, root, chunks, optimizer, schedule, average, batches, guard, position, step, best, device,
            distillation, held_out, graph, log,
        ).run()  # fmt: skip


def _utilisation(
    architecture: Architecture, settings: FinetuneSettings, dtype: torch.dtype, device: torch.device
) -> Utilisation:
    length = settings.data.sequence_length
    peak = settings.peak_tflops
    if peak is None and device.type == "cuda" and dtype == torch.bfloat16:
        peak = peak_tflops(torch.cuda.get_device_name(device))
    return Utilisation(
        settings.global_batch_size * length * training_flops(architecture, length),
        None if peak is None else peak * 1e12 * torch.distributed.get_world_size(),
    )


def _open_log(root: Path, settings: FinetuneSettings, step: int, utilisation: Utilisation) -> StepLog | None:
    """The run's log on rank 0. Raises UserError on all where it cannot be opened."""
    opened: list[StepLog] = []
    on_first_rank(lambda: opened.append(StepLog(root, settings, step, utilisation)), f"save: {root}: cannot be written")
    return opened[0] if opened else None


@dataclass
class _Training:
    """A run from `step` on. Every rank has one; log and graph are None where there is none."""

    settings: FinetuneSettings
    root: Path
    chunks: list[DistributedDataParallel]
    optimizer: Any
    schedule: Any
    average: WeightAverage | None
    batches: Iterator[dict[str, torch.Tensor]]
    guard: SkippedSteps
    position: Position
    step: int
    best: BestStep | None
    device: torch.device
    distillation: Teacher | None
    held_out: dict[str, Validation]
    graph: StepGraph | None
    log: StepLog | None
    pending: PendingStep | None = None
    """A step that is being written."""

    def __post_init__(self) -> None:
        settings, model = self.settings, [chunk.module for chunk in self.chunks]
        layout = settings.parallel.sizes(torch.distributed.get_world_size())
        self.saver = StepSaver(
            self.root, model, self.optimizer, self.schedule, layout, settings.keep_last, settings.save_async,
            self.average,
        )  # fmt: skip

    def run(self) -> None:
        """Until the last step, or until the process is asked to stop."""
        stop = StopRequest(self.device)
        for chunk in self.chunks:
            chunk.train()
        self.schedule.step(0)
        try:
            stopping = False
            while self.step < self.settings.steps and not stopping:
                self._take_step()
                self._measure()
                stopping = stop.requested()
                self._save(stopping)
            if stopping and self.log is not None:
                print(
                    f"{self.root}: asked to stop; step {self.step} of {self.settings.steps} is saved, and the same "
                    "command goes on from there",
                    flush=True,
                )
        finally:
            stop.close()
            if self.log is not None:
                self.log.close()

    def _take_step(self) -> None:
        lr = self.schedule.get_lr({})  # of tensors whose rate is not scaled
        if self.distillation is not None:
            self.distillation.weight.fill_(self.settings.distillation_weight(self.step + 1))
        result = train_step(
            self.chunks, self.optimizer, self.batches, self.settings, self.device, self.distillation, self.graph,
            self.guard.is_usual,
        )  # fmt: skip
        try:
            self.guard.check(self.step + 1, result)
        except UserError:  # every rank has it: a step that is still being written is a good one
            self._finish_pending()
            raise
        if self.average is not None and result.updated:
            self.average.update()
        self.schedule.step(1)
        self.step += 1
        if self.log is not None:
            self.log.step(self.step, result, float(lr))

    def _measure(self) -> None:
        """The losses of held-out samples that are due at this step."""
        for name, validation in self.held_out.items():
            if self.step == self.settings.steps or (name == "validation" and validation.due(self.step)):
                loss = validation.measure(self.chunks)
                if self.log is not None:
                    self.log.held_out(self.step, name, loss)
                lowest = math.inf if self.best is None else self.best.validation_loss
                if self.settings.keep_best and name == "validation" and loss < lowest:
                    self.best = BestStep(self.step, loss)

    def _save(self, stopping: bool) -> None:
        """Save this step where it is due, and give one that has been written its name."""
        last = stopping or self.step == self.settings.steps
        due = last or self.step % self.settings.save_interval == 0
        due = due or (self.best is not None and self.best.step == self.step)
        if self.pending is not None and (due or self.pending.written()):
            self._finish_pending()
        if not due:
            return
        run = {
            "step": self.step,
            **self.guard.state(),
            **self.settings.lora.saved,
            "samples": self.position.at(self.step),
            "order": self.position.order,
            "best": None if self.best is None else dataclasses.asdict(self.best),
        }
        gather_weights(self.chunks)
        self.pending = self.saver.begin(self.step, run)
        if last or not self.settings.save_async:
            self._finish_pending()

    def _finish_pending(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.finish()
