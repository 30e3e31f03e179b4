"""Errors that one process meets and all must end with: a process that raises alone leaves the others waiting."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import ErrorType

from mha2mla_megatron.errors import LostProcess, UserError, first_line


def on_every_rank[T](action: Callable[[], T], context: str | None) -> list[T]:
    """Run `action` on every process and wait for all; returns what it returned on each.

    context: put before the reason of an OSError, which does not say what it was in the way of. None: an OSError stays
    one, and ends this process alone.

    They all raise the UserError of the first one that failed.
    """
    result = failure = None
    try:
        result = action()
    except UserError as error:
        failure = error
    except OSError as error:
        if context is None:
            raise
        failure = UserError(describe_os_error(error, context))
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (result, failure))
    for _, failure in found:
        if failure is not None:
            raise failure
    return [result for result, _ in found]


def on_first_rank(action: Callable[[], None], context: str) -> None:
    """Run `action` on rank 0 while the others wait; they all raise what it raises."""
    on_every_rank(action if torch.distributed.get_rank() == 0 else lambda: None, context)


NCCL_INTERVAL = 1.0
"""Seconds between two looks at NCCL's groups."""


@contextmanager
def names_lost_processes(reason: str, then: str) -> Iterator[None]:
    """Turn what torch.distributed finds where another process has died, or kept this one waiting, into one line.

    reason: what may have happened; then: what the user can do.

    gloo raises in the thread that waits, which becomes LostProcess. NCCL leaves that thread waiting for the GPU:
    another one prints the line and ends the process with exit code 2, a minute before torch itself would abort it.
    """

    def message(error: str) -> str:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "not known yet"
        return f"rank {rank}: {reason} ({error}); {then}"

    over = threading.Event()
    threading.Thread(target=_end_with_nccl, args=(message, over), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        raise LostProcess(message(first_line(error))) from None
    finally:
        over.set()


def _end_with_nccl(message: Callable[[str], str], over: threading.Event) -> None:
    while not over.wait(NCCL_INTERVAL):
        error = nccl_error()
        if error is not None:
            print(f"error: {message(error)}", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread hangs in a call to CUDA


def nccl_error() -> str | None:
    """What has failed in a group of this process that uses NCCL; None where nothing has."""
    if not torch.cuda.is_initialized() or not torch.distributed.is_initialized():
        return None
    for group in list(c10d._world.pg_map):
        try:
            backend: Any = group._get_backend(torch.device("cuda"))
        except RuntimeError:  # a group of gloo's alone
            continue
        if isinstance(backend, c10d.ProcessGroupNCCL) and backend.get_error() != ErrorType.SUCCESS:
            return f"NCCL, {group.group_desc}: {backend.get_error().name}"
    return None


def describe_os_error(error: OSError, context: str) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{context} ({where}{error.strerror or first_line(error)})"
