"""How many kernels Triton would compile for an NVIDIA GPU, counted on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

GPU = ("cuda", 90, 32)
"""Of an H100; the count is the same for others."""


@contextmanager
def counted_variants(patch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """Name of a kernel -> what it would be compiled for, of all launches inside. Nothing is compiled or run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, found = make_backend(GPUTarget(*GPU)), dict[str, set[str]]()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **words: Any) -> None:
        del grid, warmup
        _, variant, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **words)
        found.setdefault(kernel.fn.__name__, set()).add(str((variant, options)))

    with patch.context() as inner:
        inner.setattr(JITFunction, "run", run)
        yield found
