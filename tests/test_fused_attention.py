"""The fused path of the converted attention against its definition; how it trains is in tests/test_layouts.py."""

from __future__ import annotations

import pytest
import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.implementation import choose_implementation
from tests.conftest import run_cases_in_eight_processes, start_cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreted_kernel() -> None:
    pytest.importorskip("triton")
    out, err = start_cases("fused_attention_cases", 40, 0, TRITON_INTERPRET="1").communicate()
    assert out == "40 cases\n", out + err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_kernel() -> None:
    """200 shapes."""
    run_cases_in_eight_processes("fused_attention_cases", 25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="local_fused needs a GPU; valid here: local"):
        choose_implementation("local_fused")
