"""The processes of one command that torchrun started, which share its work; or the one that there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.together import names_lost_processes, on_every_rank


@dataclass(frozen=True)
class Ranks:
    """rank: this process's number; world: how many there are. Two and more need a process group."""

    rank: int = 0
    world: int = 1

    def every[T](self, action: Callable[[], T], context: str | None = None) -> list[T]:
        """Run `action` on every rank and wait for all; returns what it returned on each.

        action: must not call for the other ranks itself. context: as for `on_every_rank`.

        Raises, on all, the UserError of the first rank that failed, and LostProcess where one has died.
        """
        if self.world == 1:
            return [action()]
        with names_lost_processes("another process has died", "the same command goes on from there"):
            return on_every_rank(action, context)

    def first[T](self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 while the others wait; all return what it returned, or raise what it raised."""
        found = self.every(lambda: action() if self.rank == 0 else None)[0]
        return found  # pyright: ignore[reportReturnType]

    def share[T](self, sizes: Mapping[T, int]) -> list[T]:
        """This rank's part of the work: each item, in order, goes to the rank that has least so far."""
        loads, mine = [0] * self.world, []
        for item, size in sizes.items():
            lightest = loads.index(min(loads))
            loads[lightest] += size
            if lightest == self.rank:
                mine.append(item)
        return mine


ALONE = Ranks()


def launched_ranks() -> Ranks:
    """What torchrun told this process; `ALONE` for a plain `python`."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def require_one_process(tool: str) -> None:
    """Raise UserError under torchrun."""
    if launched_ranks().world > 1:
        raise UserError(f"{tool} runs in one process")


def join_launched_ranks(backend: str, timeout: timedelta) -> None:
    """Form torch's group of the launched ranks.

    torchrun (2.11) keeps one store over its restarts, where a rank would look for the others as they were before. So
    each start has names of its own there; but not over several nodes, whose counts of restarts may differ.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if start is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    own = torch.distributed.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=world)


@contextmanager
def process_group(backend: str = "gloo") -> Iterator[Ranks]:
    """The launched ranks, which can call for each other within the block.

    No wait is limited, as ranks wait for the slowest one's work; a process that dies ends the others.
    """
    ranks = launched_ranks()
    if ranks.world == 1 or torch.distributed.is_initialized():
        yield ranks
        return
    join_launched_ranks(backend, timedelta(days=30))
    try:
        yield ranks
    finally:
        torch.distributed.destroy_process_group()
