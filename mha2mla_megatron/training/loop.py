"""The training loop: Megatron's DDP, schedules and distributed optimizer over an original or converted model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from mha2mla_megatron.architecture import Architecture, read_architecture, read_config
from mha2mla_megatron.checkpoint.convert_hf_megatron import write_hf_side
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.data.dataset import build_dataset, check_data, remove_cut_indices, sample_batches
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.parallel import check_layout, initialize_parallel, launched_world_size
from mha2mla_megatron.settings import require_keys, save_settings
from mha2mla_megatron.training.checkpoint import PendingStep, begin_save, load_weights, prepare_root, resume_run
from mha2mla_megatron.training.config import FinetuneSettings, check_samples
from mha2mla_megatron.training.distillation import Distillation, check_teacher, load_teacher
from mha2mla_megatron.training.log import StepLog
from mha2mla_megatron.training.nonfinite import NonFiniteSteps
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.signals import StopRequest
from mha2mla_megatron.training.step import build_training_model, gather_weights, train_step
from mha2mla_megatron.training.step_graph import StepGraph, graph_of
from mha2mla_megatron.training.together import on_first_rank
from mha2mla_megatron.training.validation import Validation


def finetune(settings: FinetuneSettings) -> None:
    """Run (or resume) a fine-tuning to its last step; checkpoints, settings and logs go under `settings.save`.

    Raises UserError for bad settings, an impossible layout or files of another model, before a weight is read.
    """
    require_keys(settings, "load", "save", "data.train")
    side, weights = locate_checkpoint(Path(str(settings.load)))
    root = Path(str(settings.save))
    architecture = read_architecture(side)
    check_layout(architecture, settings.parallel, launched_world_size())
    check_samples(settings, architecture, launched_world_size())
    eod = _end_of_document(settings, side)
    check_data("data.train", settings.data.train, architecture.vocab_size)
    if settings.validation.data is not None:
        check_data("validation.data", settings.validation.data, architecture.vocab_size)
    teacher = None if settings.distillation.teacher is None else check_teacher(settings, architecture)
    device = initialize_parallel(settings.parallel, settings.seed)
    dtype = training_dtype(settings, device)
    graph = graph_of(settings, device)
    chunks = build_training_model(architecture, settings, dtype, device)
    optimizer, schedule = build_optimizer(chunks, settings, dtype)
    distillation = None if teacher is None else load_teacher(*teacher, settings, dtype, device)
    model = [chunk.module for chunk in chunks]
    prepare_root(root)
    resumed = resume_run(root, architecture, model, optimizer, schedule)
    run = {"step": 0, "skipped": 0, "skipped_in_a_row": 0} if resumed is None else resumed
    step = run["step"]
    if resumed is None:
        load_weights(model, weights, architecture)
        optimizer.reload_model_params()

    def write_beside() -> None:
        if resumed is None:
            write_hf_side(side, root)
        save_settings(settings, root / "settings.yaml")
        print(
            f"{root}: from step {step} to {settings.steps}, {dtype}, {settings.implementation} on {device}", flush=True
        )

    on_first_rank(write_beside, f"save: {root}: cannot be written")
    batches = _batches(settings, eod, architecture, root, step)
    validation = _validation(settings, eod, architecture, root, device)
    # A run saved by an earlier version has no counts of skipped steps.
    guard = NonFiniteSteps(settings, run.get("skipped", 0), run.get("skipped_in_a_row", 0))
    _train(settings, root, chunks, optimizer, schedule, batches, guard, step, device, distillation, validation, graph)


def training_dtype(settings: FinetuneSettings, device: torch.device) -> torch.dtype:
    name = settings.dtype if settings.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, name)


def _end_of_document(settings: FinetuneSettings, side: Path) -> int:
    """The id of the token that ends a document, -1 where the model has none."""
    eod = read_config(side).get("eos_token_id")
    eod = eod[0] if isinstance(eod, list) else eod
    if settings.data.eod_mask_loss and eod is None:
        raise UserError(f"data.eod_mask_loss: {side / 'config.json'} has no eos_token_id")
    return -1 if eod is None else eod


def _batches(
    settings: FinetuneSettings, eod: int, architecture: Architecture, root: Path, step: int
) -> Iterator[dict[str, torch.Tensor]]:
    total = settings.steps * settings.global_batch_size
    return sample_batches(
        _dataset(settings.data.train, total, settings, eod, architecture, root),
        step * settings.global_batch_size,
        total,
        settings.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        settings.data.workers,
    )


def _validation(
    settings: FinetuneSettings, eod: int, architecture: Architecture, root: Path, device: torch.device
) -> Validation | None:
    wanted = settings.validation
    if wanted.data is None:
        return None
    return Validation(_dataset(wanted.data, wanted.samples, settings, eod, architecture, root), settings, device)


def _dataset(
    blend: str | dict[str, float],
    samples: int,
    settings: FinetuneSettings,
    eod: int,
    architecture: Architecture,
    root: Path,
) -> torch.utils.data.Dataset:
    cache = Path(settings.data.cache) if settings.data.cache else root / "cache"
    on_first_rank(lambda: remove_cut_indices(cache), f"data.cache: {cache}: cannot be written")
    return build_dataset(
        blend,
        settings.data.sequence_length,
        samples,
        settings.seed,
        settings.data.eod_mask_loss,
        eod,
        architecture.vocab_size,
        cache,
    )


def _train(
    settings: FinetuneSettings,
    root: Path,
    chunks: list[DistributedDataParallel],
    optimizer: Any,
    schedule: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    guard: NonFiniteSteps,
    step: int,
    device: torch.device,
    distillation: Distillation | None,
    validation: Validation | None,
    graph: StepGraph | None,
) -> None:
    layout = settings.parallel.sizes(torch.distributed.get_world_size())
    log = StepLog(root, settings.steps, step) if torch.distributed.get_rank() == 0 else None
    stop = StopRequest(device)
    pending: PendingStep | None = None
    for chunk in chunks:
        chunk.train()
    schedule.step(0)
    try:
        while step < settings.steps:
            lr = optimizer.param_groups[0]["lr"]
            result = train_step(chunks, optimizer, batches, settings, device, distillation, graph)
            try:
                guard.check(step + 1, result)
            except UserError:  # every rank has it: a step that is still being written is a good one
                if pending is not None:
                    pending.finish()
                raise
            schedule.step(1)
            step += 1
            if log is not None:
                log.step(step, result, float(lr))
            if validation is not None and validation.due(step):
                held_out = validation.measure(chunks)
                if log is not None:
                    log.validation(step, held_out)
            stopping = stop.requested()
            saving = step == settings.steps or step % settings.save_interval == 0 or stopping
            if pending is not None and (saving or pending.written()):
                pending.finish()
                pending = None
            if saving:
                run = {"step": step, "skipped": guard.skipped, "skipped_in_a_row": guard.in_a_row}
                gather_weights(chunks)
                model = [chunk.module for chunk in chunks]
                pending = begin_save(
                    root, step, model, optimizer, schedule, run, layout, settings.keep_last, settings.save_async
                )
                if not settings.save_async or stopping or step == settings.steps:
                    pending.finish()
                    pending = None
            if stopping:
                if log is not None:
                    print(
                        f"{root}: asked to stop; step {step} of {settings.steps} is saved, and the same command goes "
                        "on from there",
                        flush=True,
                    )
                break
    finally:
        stop.close()
        if log is not None:
            log.close()
