"""The two passes of `vocab_parallel_losses.py` over the logits, each one kernel. They mean the same there."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8
"""Columns that a program works on at once, and its warps."""


def sum_columns(
    student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = student.shape
    highest = torch.empty(2, rows, dtype=torch.float32, device=student.device)
    sums = torch.empty(5, rows, dtype=torch.float32, device=student.device)
    kernel: Any = _sum_columns
    kernel[(rows,)](
        student, teacher, labels, highest, sums, rows, 1 / temperature, student.stride(0), _stride(teacher),
        columns=columns, block=_block(columns), num_warps=WARPS,
    )  # fmt: skip
    return highest, sums


def logits_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    highest: torch.Tensor,
    sums: torch.Tensor,
    upstream: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    rows, columns = student.shape
    gradient = torch.empty(rows, columns, dtype=student.dtype, device=student.device)
    kernel: Any = _logits_gradient
    kernel[(rows, triton.cdiv(columns, _block(columns)))](
        student, teacher, labels, highest, sums, upstream, gradient, rows, temperature, 1 / temperature,
        student.stride(0), _stride(teacher), columns=columns, block=_block(columns), num_warps=WARPS,
    )  # fmt: skip
    return gradient


def _stride(teacher: torch.Tensor | None) -> int:
    return 0 if teacher is None else teacher.stride(0)


def _block(columns: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(columns)))


@triton.jit
def _sum_columns(
    student,
    teacher,
    labels,
    highest,
    sums,
    rows,
    inverse_temperature,
    student_stride,
    teacher_stride,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """One row. Maxima grow from block to block, and the sums so far are moved to them."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    offsets = tl.arange(0, block)
    highest_s = -float("inf")
    highest_t = -float("inf")
    if teacher is None:
        highest_t = 0.0
    total, total_q, total_p, difference = 0.0, 0.0, 0.0, 0.0
    for start in range(0, columns, block):
        inside = start + offsets < columns
        s = tl.load(student + start + offsets, mask=inside, other=-float("inf")).to(tl.float32)
        new_s = tl.maximum(highest_s, tl.max(s))
        # In the first block the old sums are 0, and what they are moved by would be infinite.
        moved_s = tl.where(start == 0, 0.0, highest_s - new_s)
        s -= new_s
        if teacher is not None:
            at = teacher + row * teacher_stride + start + offsets
            t = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
            new_t = tl.maximum(highest_t, tl.max(t))
            moved_t = tl.where(start == 0, 0.0, highest_t - new_t)
            t -= new_t
            p = tl.exp(t * inverse_temperature)
            apart = tl.where(inside, t - s, 0.0) * inverse_temperature
            shrunk_p = tl.exp(moved_t * inverse_temperature)
            difference = (difference + total_p * (moved_t - moved_s) * inverse_temperature) * shrunk_p
            difference += tl.sum(p * apart)
            total_p = total_p * shrunk_p + tl.sum(p)
            total_q = total_q * tl.exp(moved_s * inverse_temperature) + tl.sum(tl.exp(s * inverse_temperature))
            highest_t = new_t
        total = total * tl.exp(moved_s) + tl.sum(tl.exp(s))
        highest_s = new_s
    label = tl.load(labels + row)
    mine = (label >= 0) & (label < columns)
    at_label = tl.load(student + label, mask=mine, other=0.0).to(tl.float32)
    tl.store(highest + row, highest_s)
    tl.store(highest + rows + row, highest_t)
    tl.store(sums + row, total)
    tl.store(sums + rows + row, total_q)
    tl.store(sums + 2 * rows + row, total_p)
    tl.store(sums + 3 * rows + row, difference)
    tl.store(sums + 4 * rows + row, at_label)


@triton.jit
def _logits_gradient(
    student,
    teacher,
    labels,
    highest,
    sums,
    upstream,
    gradient,
    rows,
    temperature,
    inverse_temperature,
    student_stride,
    teacher_stride,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """One row's block of columns."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * block + tl.arange(0, block)
    inside = offsets < columns
    s = tl.load(student + row * student_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    s -= tl.load(highest + row)
    own = tl.where(offsets == tl.load(labels + row), 1.0, 0.0)
    of_normaliser = tl.load(upstream + 2 * rows + row)
    result = (tl.exp(s) / tl.load(sums + row) - own) * (tl.load(upstream + row) + of_normaliser) + own * of_normaliser
    if teacher is not None:
        t = tl.load(teacher + row * teacher_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        t -= tl.load(highest + rows + row)
        q = tl.exp(s * inverse_temperature) / tl.load(sums + rows + row)
        p = tl.exp(t * inverse_temperature) / tl.load(sums + 2 * rows + row)
        result += (q - p) * (temperature * tl.load(upstream + rows + row))
    tl.store(gradient + row * columns + offsets, result.to(gradient.dtype.element_ty), mask=inside)
