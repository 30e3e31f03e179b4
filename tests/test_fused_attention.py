"""The fused path of the converted attention against its definition; how it trains is in tests/test_layouts.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.implementation import choose_implementation
from tests.conftest import ROOT


def run_cases(count: int, seed: int, **environment: str) -> str:
    command = [sys.executable, "-m", "tests.fused_attention_cases", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.stdout or done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreted_kernel() -> None:
    pytest.importorskip("triton")
    assert run_cases(40, 0, TRITON_INTERPRET="1") == "40 cases\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_kernel() -> None:
    assert run_cases(200, 1) == "200 cases\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="local_fused needs a GPU; valid here: local"):
        choose_implementation("local_fused")
