"""Saving and loading a run: model, optimizer and schedule, at any parallel layout."""

from __future__ import annotations

import shutil
import signal
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.checkpoint.megatron import (
    TorchDistReader,
    check_coverage,
    iteration_folder,
    read_latest,
    write_latest,
)
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.model.provider import sharded_weights

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state in model space, so that it loads at any layout."""


def load_weights(model: torch.nn.Module, step_folder: Path, architecture: Architecture) -> None:
    """Fill the model's parameters and buffers from a step folder, saved at any layout.

    The folder may come from anywhere: nothing in it is executed, which `dist_checkpointing.load` does not promise.

    Raises UserError for a checkpoint of another model, named by its first tensor that differs.
    """
    reader = TorchDistReader(step_folder)
    check_coverage(reader.shapes(), megatron_shapes(architecture), step_folder)
    whole = lru_cache(maxsize=1)(reader.__getitem__)
    pieces = sharded_weights(model)
    apply_factories(pieces)
    with torch.no_grad():
        for piece in nested_values(pieces):
            assert isinstance(piece, ShardedTensor) and piece.data is not None
            piece.data.copy_(whole(piece.key)[piece.global_slice()])


def save_run(
    root: Path,
    iteration: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: dict[str, Any],
    keep_last: int | None,
) -> None:
    """Write one step; it counts only once everything is there, when `latest` points at it.

    run: plain values to find again on resuming (step, samples seen).
    """
    folder = iteration_folder(root, iteration)
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    _start_writers_helper()
    model_state = sharded_weights(model)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=METADATA),
        "schedule": schedule.state_dict(),
        "run": run,
    }
    dist_checkpointing.save(state, str(folder), content_metadata=METADATA)
    torch.distributed.barrier()
    if rank == 0:
        write_latest(root, iteration)
        if keep_last is not None:
            # Later steps may lie there too, of a run that was put back or died while it wrote.
            saved = sorted(old for old in root.glob("iter_*") if old.name <= folder.name)
            for old in saved[:-keep_last]:
                shutil.rmtree(old, ignore_errors=True)


def resume_run(
    root: Path,
    architecture: Architecture,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
) -> dict[str, Any] | None:
    """Load the newest step of `root` into the objects and return its `run` values; None where there is none.

    Raises UserError for a step of another model, or one that is damaged.
    """
    latest = read_latest(root)
    if latest is None:
        return None
    folder = iteration_folder(root, latest)
    found = TorchDistReader(folder).shapes()
    try:
        check_coverage(found, megatron_shapes(architecture), folder)
    except UserError as error:
        raise UserError(f"save: {root} holds a run of another model ({error})") from None
    model_state = sharded_weights(model)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=METADATA),
    }
    loaded = _load(state, folder)
    model.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return loaded["run"]


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))  # type: ignore[return-value]
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder}: cannot be loaded ({type(reason).__name__}: {first_line(reason)})") from None
    except (CheckpointingException, OSError, EOFError) as error:
        raise UserError(f"{folder}: cannot be loaded ({first_line(error)})") from None


def _start_writers_helper() -> None:
    """Start the process that Megatron's writer hands its results to, deaf to the signals that end a run.

    A scheduler or a shell may send those to every process of a job, and without its helper the last save would fail.
    """
    resource_tracker.ensure_running()  # it unblocks the signals, so it must not be started in between
    deaf_to = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
    try:
        get_write_results_queue()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
