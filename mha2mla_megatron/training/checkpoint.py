"""Saving and loading a run: model, optimizer and schedule, at any parallel layout."""

from __future__ import annotations

import io
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.manifest import MANIFEST, check_manifest, seal_step
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.checkpoint.megatron import TorchDistReader, check_coverage, iteration_folder, read_latest
from mha2mla_megatron.checkpoint.rotation import delete_older, partial_folder, publish_step, remove_leftovers
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.model.provider import sharded_weights
from mha2mla_megatron.training.together import describe_os_error, on_every_rank, on_first_rank

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state in model space, so that it loads at any layout."""


def load_weights(model: Sequence[torch.nn.Module], step_folder: Path, architecture: Architecture) -> None:
    """Fill the parameters and buffers of the model's chunks from a step folder, saved at any layout.

    The folder may come from anywhere: nothing in it is executed, which `dist_checkpointing.load` does not promise.

    Raises UserError for a checkpoint of another model, named by its first tensor that differs.
    """
    check_manifest(step_folder)
    reader = TorchDistReader(step_folder)
    check_coverage(reader.shapes(), megatron_shapes(architecture), step_folder)
    whole = lru_cache(maxsize=1)(reader.__getitem__)
    pieces = _model_state(model)
    apply_factories(pieces)
    with torch.no_grad():
        for piece in nested_values(pieces):
            assert isinstance(piece, ShardedTensor) and piece.data is not None
            piece.data.copy_(whole(piece.key)[piece.global_slice()])


def prepare_root(root: Path) -> None:
    """Make the folder, see that it can be written, and remove what an interrupted run left in it."""

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".writable"
        probe.write_text("yes")
        probe.unlink()
        if leftovers := remove_leftovers(root):
            print(f"{root}: removed what an interrupted save or deletion left: {', '.join(leftovers)}", flush=True)

    on_first_rank(prepare, f"save: {root}: cannot be written")


def save_run(
    root: Path,
    iteration: int,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: dict[str, Any],
    layout: dict[str, int],
    keep_last: int | None,
) -> None:
    """Write one step; it has its name, and counts, only once everything is there. Older ones go after that.

    model: its chunks. run: plain values to find again on resuming (step, steps left out). layout: the parallel sizes.

    Raises UserError where it cannot be written; the steps that are there stay.
    """
    folder = partial_folder(root, iteration)
    context = f"save: {root}: step {iteration} cannot be saved"

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def finish() -> None:
        seal_step(folder, iteration, layout)
        publish_step(root, iteration)

    try:
        on_first_rank(begin, context)
        _start_writers_helper()
        model_state = _model_state(model)
        state = {
            **model_state,
            "optimizer": optimizer.sharded_state_dict(model_state, metadata=METADATA),
            "schedule": schedule.state_dict(),
            "run": run,
        }
        _save(state, folder, context)
        on_first_rank(finish, context)
    except UserError as error:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = read_latest(root)
        last = "no step was saved before" if kept is None else f"the last complete step, {kept}, is as it was"
        raise UserError(f"{error}; {last}") from None
    if keep_last is not None and torch.distributed.get_rank() == 0:
        try:
            delete_older(root, iteration, keep_last)
        except OSError as error:  # the new step is safe; there is only less room for the next one
            print(f"warning: {describe_os_error(error, f'{root}: an old step cannot be deleted')}", file=sys.stderr)


def resume_run(
    root: Path,
    architecture: Architecture,
    model: Sequence[torch.nn.Module],
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
    on_every_rank(lambda: _check_step(root, folder, architecture), f"{folder}: cannot be read")
    model_state = _model_state(model)
    state = {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=METADATA),
    }
    loaded = _load(state, folder)
    for name, chunk in zip(model_state, model, strict=True):
        chunk.load_state_dict(loaded[name], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return loaded["run"]


def _model_state(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Each chunk's weights under a name of its own; inside, tensors carry their names in the whole model."""
    return {f"model{index}": sharded_weights(chunk) for index, chunk in enumerate(model)}


def _check_step(root: Path, folder: Path, architecture: Architecture) -> None:
    """Raise UserError unless all of a step's files are as they were saved, and of this model.

    Megatron reads the pieces without a look at their checksums; here each process checks its share of them.
    """
    if check_manifest(folder) is None and torch.distributed.get_rank() == 0 and folder.is_dir():
        print(f"{folder}: saved without {MANIFEST}; sizes and checksums of its files are not compared", flush=True)
    reader = TorchDistReader(folder)
    try:
        check_coverage(reader.shapes(), megatron_shapes(architecture), folder)
    except UserError as error:
        raise UserError(f"save: {root} holds a run of another model ({error})") from None
    share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
    for index in list(reader.storage)[share]:
        reader.check_piece(index)


def _save(state: dict[str, Any], folder: Path, context: str) -> None:
    """Megatron's save; where a process cannot write its tensors, all of them raise that process's reason."""
    failed: list[str] = []
    try:
        with _write_failures(failed):
            dist_checkpointing.save(state, str(folder), content_metadata=METADATA)
            return
    except CheckpointException as error:
        reason = next((f"rank {rank}: {first_line(why[0])}" for rank, why in error.failures.items()), "see rank 0")
    except OSError as error:  # of rank 0, which writes the index alone
        raise UserError(describe_os_error(error, context)) from None

    def tell() -> None:
        if failed:
            raise UserError(f"{context} (rank {torch.distributed.get_rank()}: {failed[0]})")

    on_every_rank(tell, context)
    raise UserError(f"{context} ({reason})")


@contextmanager
def _write_failures(failed: list[str]) -> Iterator[None]:
    """Fill `failed` with why files could not be written: neither torch nor Megatron hands the OSError on.

    Megatron's own lines about it, which have the type of the error alone, are left out.
    """

    class File(io.FileIO):
        def write(self, data: Any, /) -> int:
            try:
                return super().write(data)
            except OSError as error:
                failed.append(f"{self.name}: {error.strerror}")
                raise

    logger = logging.getLogger(filesystem_async.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    filesystem_async.open = lambda name, mode: io.BufferedWriter(File(name, mode))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del filesystem_async.open  # type: ignore[attr-defined]
        logger.setLevel(level)


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
        filesystem_async.get_write_results_queue()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
