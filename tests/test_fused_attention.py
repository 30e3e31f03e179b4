"""The fused path of the converted attention against its definition; how it trains is in tests/test_layouts.py."""

from __future__ import annotations

import pytest
import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.model.implementation import choose_implementation
from tests.conftest import run_cases_in_eight_processes, start_cases
from tests.kernel_variants import counted_variants


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreted_kernel() -> None:
    pytest.importorskip("triton")
    out, err = start_cases("fused_attention_cases", 40, 0, TRITON_INTERPRET="1").communicate()
    assert out == "40 cases\n", out + err


@pytest.mark.parametrize(("rope_heads", "wide", "expected"), [(3, False, 36), (1, False, 36), (1, True, 20)])
def test_layers_share_kernels(monkeypatch: pytest.MonkeyPatch, rope_heads: int, wide: bool, expected: int) -> None:
    """33 layers with 0 to d rotated dims: a kernel for each power of two, from 8 on, that holds half of these and each
    that holds the others, for what can be moved at once (all even, by four, or where the others are always d by eight),
    and for each direction."""
    pytest.importorskip("triton")
    from mha2mla_megatron.model.rotary_kernel import HeadShape, rotate_and_join, rotate_and_split

    heads, groups, d, rows = 9, 3, 64, 8
    with counted_variants(monkeypatch) as variants:
        for r in range(0, d + 1, 2):
            n = d if wide else d - r
            shape = HeadShape(heads, groups, rope_heads, r, n)
            widths = [heads * (r + n), rope_heads * r, 96]
            queries, k_rope, _ = torch.zeros(rows, sum(widths)).split(widths, dim=1)
            rest = (torch.zeros(4, d), torch.zeros(rope_heads, r // 2, dtype=torch.int64), shape)
            k_nope = torch.zeros(rows, groups * n)
            query, key = rotate_and_join(queries, k_rope, k_nope, *rest)
            rotate_and_split(query, key, queries, k_rope, k_nope, *rest)
    assert len(variants["_move_heads"]) == expected


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
