"""Memory for one tensor after the other.

glibc returns a tensor's memory to the system when it is freed, and the next tensor's comes from there page by page,
zeroed, which takes longer than to copy the tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3)."""
LARGEST = 2**31 - 1


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """In this block, and after it for what the process frees then, freed memory is taken again. Elsewhere than with
    glibc nothing is changed."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        library.mallopt(option, LARGEST)
    try:
        yield
    finally:
        library.malloc_trim(0)
