"""The folder where Megatron keeps which documents each sample is made of."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy

from mha2mla_megatron.files import make_writable
from mha2mla_megatron.together import on_first_rank

LOCK = ".lock"


@contextmanager
def own_indices(folder: Path) -> Iterator[None]:
    """Keep the folder to this job while the block lasts, in which its datasets are built, on all ranks.

    Megatron writes the files in place and takes those that it finds: two jobs that begin together would read what the
    other has not finished. Files that a killed process left short are removed. Raises UserError where the folder cannot
    be written.
    """
    with ExitStack() as held:
        on_first_rank(lambda: held.enter_context(_locked(folder)), f"data.cache: {folder}: cannot be written")
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    make_writable(folder)
    with (folder / LOCK).open("wb") as stream:
        _wait_for(stream, folder)
        for file in folder.glob("*.npy"):
            try:
                numpy.load(file, mmap_mode="r")
            except (ValueError, EOFError):
                file.unlink()
        yield


def _wait_for(stream: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(
            f"data.cache: {folder}: another run is indexing samples there; waiting for it", file=sys.stderr, flush=True
        )
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
