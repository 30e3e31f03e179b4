"""The training loop: Megatron's DDP, schedules and distributed optimizer over an original or converted model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from mha2mla_megatron.architecture import Architecture, read_architecture, read_config
from mha2mla_megatron.checkpoint.convert_hf_megatron import write_hf_side
from mha2mla_megatron.checkpoint.megatron import locate_checkpoint
from mha2mla_megatron.data.dataset import build_dataset, check_data, sample_batches
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.parallel import check_layout, initialize_parallel, launched_world_size
from mha2mla_megatron.settings import require_keys, save_settings
from mha2mla_megatron.training.checkpoint import load_weights, resume_run, save_run
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.log import StepLog
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import build_training_model, train_step


def finetune(settings: FinetuneSettings) -> None:
    """Run (or resume) a fine-tuning to its last step; checkpoints, settings and logs go under `settings.save`.

    Raises UserError for bad settings, an impossible layout or files of another model, before a weight is read.
    """
    require_keys(settings, "load", "save", "data.train")
    side, weights = locate_checkpoint(Path(str(settings.load)))
    root = Path(str(settings.save))
    architecture = read_architecture(side)
    check_layout(architecture, settings.parallel, launched_world_size())
    data_size = launched_world_size() // settings.parallel.model_parallel_size
    if settings.global_batch_size % (settings.micro_batch_size * data_size):
        raise UserError(
            f"global_batch_size: {settings.global_batch_size} does not divide by micro_batch_size "
            f"{settings.micro_batch_size} x {data_size} data-parallel ranks"
        )
    if settings.data.sequence_length > architecture.max_position_embeddings:
        raise UserError(
            f"data.sequence_length: {settings.data.sequence_length} is more than the model's context "
            f"{architecture.max_position_embeddings}"
        )
    eod = _end_of_document(settings, side)
    check_data(settings.data.train, architecture.vocab_size)
    device = initialize_parallel(settings.parallel, settings.seed)
    dtype = training_dtype(settings, device)
    model = build_training_model(architecture, settings, dtype, device)
    optimizer, schedule = build_optimizer([model], settings, dtype)
    rank = torch.distributed.get_rank()
    step = 0
    run = resume_run(root, architecture, model.module, optimizer, schedule)
    if run is not None:
        step = run["step"]
    else:
        load_weights(model.module, weights, architecture)
        optimizer.reload_model_params()
        if rank == 0:
            write_hf_side(side, root)
    if rank == 0:
        save_settings(settings, root / "settings.yaml")
        print(
            f"{root}: from step {step} to {settings.steps}, {dtype}, {settings.implementation} on {device}", flush=True
        )
    batches = _batches(settings, eod, architecture, root, step, data_size)
    _train(settings, root, model, optimizer, schedule, batches, step, device)


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
    settings: FinetuneSettings, eod: int, architecture: Architecture, root: Path, step: int, data_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    total = settings.steps * settings.global_batch_size
    dataset = build_dataset(
        settings.data.train,
        settings.data.sequence_length,
        total,
        settings.seed,
        settings.data.eod_mask_loss,
        eod,
        architecture.vocab_size,
        Path(settings.data.cache) if settings.data.cache else root / "cache",
    )
    return sample_batches(
        dataset,
        step * settings.global_batch_size,
        total,
        settings.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        data_size,
        settings.data.workers,
    )


def _train(
    settings: FinetuneSettings,
    root: Path,
    model: DistributedDataParallel,
    optimizer: Any,
    schedule: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    step: int,
    device: torch.device,
) -> None:
    log = StepLog(root, settings.steps, step) if torch.distributed.get_rank() == 0 else None
    stop = _StopRequest(device)
    model.train()
    schedule.step(0)
    try:
        while step < settings.steps:
            lr = optimizer.param_groups[0]["lr"]
            result = train_step(model, optimizer, batches, settings, device)
            schedule.step(1)
            step += 1
            if log is not None:
                log.step(step, result.loss, result.grad_norm, float(lr), result.tokens)
            stopping = stop.requested()
            if step == settings.steps or step % settings.save_interval == 0 or stopping:
                save_run(root, step, model.module, optimizer, schedule, {"step": step}, settings.keep_last)
            if stopping:
                break
    finally:
        stop.close()
        if log is not None:
            log.close()


class _StopRequest:
    """SIGINT and SIGTERM end the run after the current step, which is saved; a later one ends it at once.

    One that comes within GRACE seconds is the same request: a launcher passes on what its processes got already.
    """

    GRACE = 5.0

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.asked: float | None = None
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: Any) -> None:
        now = time.monotonic()
        self.asked = now if self.asked is None else self.asked
        if now - self.asked > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer."""
        self.flag.fill_(self.asked is not None)
        torch.distributed.all_reduce(self.flag, op=torch.distributed.ReduceOp.MAX)
        return bool(self.flag.item())
