"""Errors that one process meets and all must end with: a process that raises alone leaves the others waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def names_lost_processes(reason: str, then: str) -> Iterator[None]:
    """Turn what torch.distributed raises where another process has died, or kept this one waiting, into one line.

    reason: what may have happened; then: what the user can do.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "not known yet"
        raise LostProcess(f"rank {rank}: {reason} ({first_line(error)}); {then}") from None


def describe_os_error(error: OSError, context: str) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{context} ({where}{error.strerror or first_line(error)})"
