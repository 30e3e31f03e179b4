"""Saving and loading a run: model, optimizer and schedule, at any parallel layout."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import queue
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.adapters import ALPHA, with_adapters
from mha2mla_megatron.checkpoint.average import has_average
from mha2mla_megatron.checkpoint.manifest import MANIFEST, check_manifest, seal_step
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.checkpoint.megatron import (
    BestStep,
    TorchDistReader,
    check_coverage,
    iteration_folder,
    read_latest,
    write_best,
)
from mha2mla_megatron.checkpoint.merged import MergedReader
from mha2mla_megatron.checkpoint.rotation import delete_older, partial_folder, publish_step, remove_leftovers
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import make_writable
from mha2mla_megatron.model.provider import parameters_of, sharded_weights
from mha2mla_megatron.together import describe_os_error, on_every_rank, on_first_rank
from mha2mla_megatron.training.config import LoraSettings
from mha2mla_megatron.training.host_copies import HostCopies
from mha2mla_megatron.training.lora import lora_shapes
from mha2mla_megatron.training.own_shards import own_weights
from mha2mla_megatron.training.param_groups import take_own_groups
from mha2mla_megatron.training.weight_average import WeightAverage

LOCK = ".lock"
"""Empty file in a root, there and locked while a run is at work in it."""

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state in model space, so that it loads at any layout."""


def load_weights(model: Sequence[torch.nn.Module], step_folder: Path, architecture: Architecture) -> None:
    """Fill the parameters and buffers of the model's chunks from a step folder, saved at any layout.

    Low-rank updates in it are added to their matrices; those that the model has stay as they are. The folder may come
    from anywhere: nothing in it is executed, which `dist_checkpointing.load` does not promise.

    Raises UserError for a checkpoint of another model, named by its first tensor that differs.
    """
    check_manifest(step_folder)
    reader, shapes = MergedReader(step_folder), megatron_shapes(architecture)
    check_coverage(reader.shapes(), shapes, step_folder)
    whole = lru_cache(maxsize=1)(reader.__getitem__)
    pieces = _model_state(model)
    apply_factories(pieces)
    with torch.no_grad():
        for piece in nested_values(pieces):
            assert isinstance(piece, ShardedTensor) and piece.data is not None
            if piece.key not in shapes:
                continue
            piece.data.copy_(whole(piece.key)[piece.global_slice()])


@contextmanager
def own_root(root: Path) -> Iterator[None]:
    """Make the folder, keep it to this run while the block lasts, see that it can be written, and remove what an
    interrupted run left in it.

    Raises UserError where another run is at work in it: each would delete what the other is writing.
    """
    lock = ExitStack()

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        file = root / LOCK
        stream = lock.enter_context(file.open("wb"))
        taken = False
        try:
            # Not flock: processes that read data ahead would hold that too, for seconds after this one was killed.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # others: a file system without locks
            taken = error.errno in (errno.EAGAIN, errno.EACCES)
        # The other run may have ended, and removed its file, since this one opened it.
        if taken or not file.exists() or not os.path.samestat(file.stat(), os.fstat(stream.fileno())):
            raise UserError(f"save: {root}: another run is at work in it")
        lock.callback(file.unlink, missing_ok=True)
        make_writable(root)
        if leftovers := remove_leftovers(root):
            print(f"{root}: removed what an interrupted save or deletion left: {', '.join(leftovers)}", flush=True)

    with lock:
        on_first_rank(prepare, f"save: {root}: cannot be written")
        yield


@dataclass(frozen=True)
class PendingStep:
    """A step whose tensors are being written, by `thread` where training goes on meanwhile, else by `finish` itself.

    It gets its name, and counts, in `finish`, only once every process has written all of its part.
    """

    root: Path
    iteration: int
    layout: dict[str, int]
    keep_last: int | None
    best: BestStep | None
    request: Any
    failed: list[str]
    thread: threading.Thread | None

    def written(self) -> bool:
        """Whether `finish` would not wait; all ranks get the same answer."""
        busy = self.thread is not None and self.thread.is_alive()
        flag = torch.tensor(int(busy), dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return not flag.item()

    def finish(self) -> None:
        """Wait for all processes, complete the step and delete older ones.

        Raises UserError where it cannot be written; the steps that are there stay.
        """
        if self.thread is None:
            _write(self.request, self.failed)
        else:
            self.thread.join()
        folder = partial_folder(self.root, self.iteration)

        def complete() -> None:
            seal_step(folder, self.iteration, self.layout)
            publish_step(self.root, self.iteration)
            write_best(self.root, self.best)

        with _cleaned_up(self.root, folder):
            _write_index(self.request, self.failed, _context(self.root, self.iteration))
            on_first_rank(complete, _context(self.root, self.iteration))
        if self.keep_last is not None and torch.distributed.get_rank() == 0:
            try:
                delete_older(self.root, self.iteration, self.keep_last, self.best)
            except OSError as error:  # the new step is safe; there is only less room for the next one
                context = f"{self.root}: an old step cannot be deleted"
                print(f"warning: {describe_os_error(error, context)}", file=sys.stderr)


class StepSaver:
    """Saves the steps of one run; what does not change between them is made for the first ones only.

    model: its chunks. layout: the parallel sizes. in_background: write while training changes the tensors, from copies
    whose memory is kept. average: of the weights, where the run has one.
    """

    def __init__(
        self,
        root: Path,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        layout: dict[str, int],
        keep_last: int | None,
        in_background: bool,
        average: WeightAverage | None = None,
    ) -> None:
        self.root, self.model, self.optimizer, self.schedule = root, model, optimizer, schedule
        self.average = average
        self.layout, self.keep_last, self.in_background = layout, keep_last, in_background
        self.copies = HostCopies(kept=in_background)
        # It plans anew until two plans in a row were the same.
        self.strategy = TorchDistSaveShardedStrategy(cached_metadata=True)
        self.planned = False
        # Megatron's writer hands its results over within this process. The queue that it makes itself is for those of
        # another process, and is one more process, which takes seconds to start and half a gigabyte.
        filesystem_async._results_queue = queue.SimpleQueue()

    def begin(self, iteration: int, run: dict[str, Any]) -> PendingStep:
        """Start writing one step, whose `finish` must be called before the next one is started.

        run: plain values to find again on resuming (step, steps left out, the best step, which is kept whatever
        `keep_last` says).

        Raises UserError where it cannot be written; the steps that are there stay.
        """
        folder = partial_folder(self.root, iteration)

        def make_folder() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

        with _cleaned_up(self.root, folder):
            on_first_rank(make_folder, _context(self.root, iteration))
        request: Any = dist_checkpointing.save(
            self._copied_state(run),
            str(folder),
            self.strategy,
            # The pieces are the same ones each time.
            validate_access_integrity=not self.planned,
            content_metadata=METADATA,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        self.planned = True
        failed: list[str] = []
        thread = None
        if self.in_background:
            thread = threading.Thread(target=_write, args=(request, failed))
            thread.start()
        return PendingStep(self.root, iteration, self.layout, self.keep_last, BestStep.of(run), request, failed, thread)

    def _copied_state(self, run: dict[str, Any]) -> dict[str, Any]:
        """All that a step holds; the tensors that this process writes are copies in its host's memory."""
        model_state = _model_state(self.model)
        state = {
            **own_weights(model_state, self.optimizer),
            "optimizer": self.optimizer.sharded_state_dict(model_state, metadata=METADATA),
            "schedule": self.schedule.state_dict(),
            "run": run,
        }
        if self.average is not None:
            state["average"] = self.average.placed(model_state)
        apply_factories(state)
        pieces = [
            piece for piece in nested_values(state)
            if isinstance(piece, ShardedTensor) and is_main_replica(piece.replica_id)
        ]  # fmt: skip
        copies = self.copies.take([piece.data.detach() for piece in pieces])  # type: ignore[union-attr]
        for piece, copy in zip(pieces, copies, strict=True):
            piece.data = copy
        return state


class Resumed(NamedTuple):
    """The step that a run goes on from. run: its `run` values. averaged: whether it has an average of the weights."""

    folder: Path
    run: dict[str, Any]
    averaged: bool


def resume_run(
    root: Path,
    architecture: Architecture,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    lora: LoraSettings,
) -> Resumed | None:
    """Load the newest step of `root` into the objects, but for the average; None where there is none.

    Learning rates, weight decay and moments' decay are those of the optimizer, not the saved ones.

    Raises UserError for a step of another model, one with other tensors frozen or other low-rank updates, or one that
    is damaged.
    """
    latest = read_latest(root)
    if latest is None:
        return None
    folder = iteration_folder(root, latest)
    trained = {name: parameter.requires_grad for chunk in model for name, parameter in parameters_of(chunk)}
    check = partial(_check_step, root, folder, architecture, trained, lora)
    averaged = all(on_every_rank(check, f"{folder}: cannot be read"))
    model_state = _model_state(model)
    state = {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=METADATA),
    }
    loaded = _load(state, folder)
    for name, chunk in zip(model_state, model, strict=True):
        chunk.load_state_dict(loaded[name], strict=False)
    run = loaded["run"]
    take_own_groups(loaded["optimizer"], optimizer, run["step"] - run.get("skipped", 0))
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    return Resumed(folder, run, averaged)


def resume_average(resumed: Resumed, model: Sequence[torch.nn.Module], average: WeightAverage | None) -> None:
    """Load that of the step.

    Where the step has none the average stays as it is, and where the run has none the step's is left; a line says so.
    """
    folder, saved = resumed.folder, resumed.averaged
    if average is not None and saved:
        placed = average.placed(_model_state(model))
        pieces = {n: {at: piece.without_data() for at, piece in found.items()} for n, found in placed.items()}
        # Nothing is loaded where a pipeline stage trains nothing.
        average.take(_load({"average": pieces}, folder).get("average", {}))
    elif average is not None and torch.distributed.get_rank() == 0:
        print(f"{folder}: has no average of the weights; that of optimizer.ema_decay begins as they are", flush=True)
    elif saved and torch.distributed.get_rank() == 0:
        line = "its average of the weights ends here; optimizer.ema_decay would go on with it"
        print(f"warning: {folder}: {line}", file=sys.stderr, flush=True)


def _model_state(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Each chunk's weights under a name of its own; inside, tensors carry their names in the whole model."""
    return {f"model{index}": sharded_weights(chunk) for index, chunk in enumerate(model)}


def _check_step(
    root: Path, folder: Path, architecture: Architecture, trained: dict[str, bool], lora: LoraSettings
) -> bool:
    """Raise UserError unless all of a step's files are as they were saved, of this model, and of a run that trained the
    tensors that this one trains; of these each process knows its own. Returns whether the step has an average.

    Megatron reads the pieces without a look at their checksums; here each process checks its share of them.
    """
    if check_manifest(folder) is None and torch.distributed.get_rank() == 0 and folder.is_dir():
        print(f"{folder}: saved without {MANIFEST}; sizes and checksums of its files are not compared", flush=True)
    reader = TorchDistReader(folder)
    try:
        check_coverage(reader.shapes(), megatron_shapes(architecture), folder)
    except UserError as error:
        raise UserError(f"save: {root} holds a run of another model ({error})") from None
    if (run := reader.values().get("run")) is None:
        raise UserError(
            f"save: {root} holds the weights of a model and no run that could go on; valid: another folder, with "
            f"load={root}"
        )
    own, alpha = megatron_shapes(architecture), run.get(ALPHA)
    other = with_adapters(own, reader.shapes()) != {**own, **lora_shapes(architecture, lora)}
    if other or alpha != lora.saved.get(ALPHA):
        raise UserError(
            f"lora: {folder} was saved with other low-rank updates, or with none; valid: the settings that "
            f"{root / 'settings.yaml'} has, or a new run (another save) with load={folder}"
        )
    for name, now in trained.items():
        before = f"optimizer.state.exp_avg.{name}" in reader.shapes()
        if before != now:
            words = {True: "trained", False: "frozen"}
            raise UserError(
                f"optimizer.lr_scale: {name} was {words[before]} in {folder} and is {words[now]} now; valid: the same "
                f"tensors frozen, or a new run (another save) with load={folder}"
            )
    share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
    for index in list(reader.storage)[share]:
        reader.check_piece(index)
    return has_average(reader.shapes())


def _context(root: Path, iteration: int) -> str:
    return f"save: {root}: step {iteration} cannot be saved"


@contextmanager
def _cleaned_up(root: Path, folder: Path) -> Iterator[None]:
    """Where a step cannot be saved, which all ranks know then, remove what there is of it and say what is left."""
    try:
        yield
    except UserError as error:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = read_latest(root)
        last = "no step was saved before" if kept is None else f"the last complete step, {kept}, is as it was"
        raise UserError(f"{error}; {last}") from None


def _write(request: Any, failed: list[str]) -> None:
    """Write this process's tensors; why that failed goes to `failed`."""
    if request.async_fn is None:
        return
    with _write_failures(failed):
        try:
            request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)
        except AssertionError as error:  # of Megatron's, where its first file of several fails
            failed.append(first_line(error))


def _write_index(request: Any, failed: list[str], context: str) -> None:
    """Megatron's end of a save, after `_write`; where any process failed, all of them raise that one's reason."""
    reason = None
    try:
        with _noted(FileSystemWriterAsync, "finish", failed), _noted(serialization, "save_config", failed):
            for finalize in request.finalize_fns:
                finalize()
    except CheckpointException as error:
        reason = next((f"rank {rank}: {first_line(why[0])}" for rank, why in error.failures.items()), "see rank 0")

    def tell() -> None:
        if failed:
            raise UserError(f"{context} (rank {torch.distributed.get_rank()}: {failed[0]})")

    on_every_rank(tell, context)
    if reason is not None:
        raise UserError(f"{context} ({reason})")


@contextmanager
def _noted(owner: Any, name: str, failed: list[str]) -> Iterator[None]:
    """Let a function that rank 0 alone calls note an OSError: raised, it would leave the other ranks waiting."""
    function = getattr(owner, name)

    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except OSError as error:
            failed.append(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))

    setattr(owner, name, attempt)
    try:
        yield
    finally:
        setattr(owner, name, function)


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
