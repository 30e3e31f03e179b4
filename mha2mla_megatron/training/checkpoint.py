"""Saving and loading a run: model, optimizer and schedule, at any parallel layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.checkpoint.megatron import TorchDistReader, iteration_folder, read_latest, write_latest
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.provider import sharded_weights

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state in model space, so that it loads at any layout."""


def load_weights(model: torch.nn.Module, step_folder: Path, architecture: Architecture) -> None:
    """Fill the model's parameters and buffers from a step folder, saved at any layout.

    Raises UserError for a checkpoint of another model, named by its first tensor that differs.
    """
    found, expected = TorchDistReader(step_folder).shapes(), megatron_shapes(architecture)
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise UserError(f"{step_folder}: {name} has shape {found.get(name)}, this model needs {shape}")
    model.load_state_dict(_load({"model": sharded_weights(model)}, step_folder)["model"], strict=False)


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
            for old in sorted(root.glob("iter_*"))[:-keep_last]:
                shutil.rmtree(old, ignore_errors=True)


def resume_run(
    root: Path, model: torch.nn.Module, optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler
) -> dict[str, Any] | None:
    """Load the newest step of `root` into the objects and return its `run` values; None where there is none."""
    latest = read_latest(root)
    if latest is None:
        return None
    model_state = sharded_weights(model)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=METADATA),
    }
    loaded = _load(state, iteration_folder(root, latest))
    model.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return loaded["run"]


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))  # type: ignore[return-value]
    except (CheckpointingException, OSError, EOFError) as error:
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
