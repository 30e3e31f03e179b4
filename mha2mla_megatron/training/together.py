"""Errors that one process meets and all must end with: a process that raises alone leaves the others waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mha2mla_megatron.errors import LostProcess, UserError, first_line


def on_every_rank(action: Callable[[], None], context: str) -> None:
    """Run `action` on every process and wait for all; they all raise the UserError of the first one that failed.

    context: put before the reason of an OSError, which does not say what it was in the way of.
    """
    reason = None
    try:
        action()
    except UserError as error:
        reason = str(error)
    except OSError as error:
        reason = describe_os_error(error, context)
    reasons: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    for found in reasons:
        if found is not None:
            raise UserError(found)


def on_first_rank(action: Callable[[], None], context: str) -> None:
    """Run `action` on rank 0 while the others wait; they all raise what it raises."""
    on_every_rank(action if torch.distributed.get_rank() == 0 else lambda: None, context)


@contextmanager
def names_lost_processes(timeout_minutes: float) -> Iterator[None]:
    """Turn what torch.distributed raises where another process has died, or kept this one waiting, into one line."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "not known yet"
        raise LostProcess(
            f"rank {rank}: another process has died, or was waited for longer than parallel.timeout_minutes "
            f"{timeout_minutes:g} ({first_line(error)}); the same command goes on from the newest complete step"
        ) from None


def describe_os_error(error: OSError, context: str) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{context} ({where}{error.strerror or first_line(error)})"
