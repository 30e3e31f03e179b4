"""One of several processes of a world that each run a tool, as under torchrun."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import torch.distributed

from mha2mla_megatron.data.teacher_cache import CachedSource
from tests.conftest import run_tool


def run(tool: str, argv: list[str], unread: int | None = None) -> None:
    """unread: the process that must read no teacher's predictions.

    Raises AssertionError with what the tool said where it fails.
    """
    with patch.object(CachedSource, "of_sample", None) if unread == torch.distributed.get_rank() else nullcontext():
        run_tool(tool, *argv)
