"""One kernel between the projections and attention: it rotates queries and keys and puts the keys together.

Shape letters: S sequence, B batch, T = S B rows, H query heads, G key/value heads, d head dim, r rotary dims kept per
head. In plain torch this is a table of angles for each head, six elementwise operations over queries and over keys and
one concatenation; here everything is read once and written once, and the rotation is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class HeadShape:
    """Heads of this process, and how each is made: its first r dims rotate, half-split."""

    query_heads: int
    key_heads: int
    head_dim: int
    rope_dim: int

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.rope_dim


def rotate_and_join(
    queries: torch.Tensor,
    k_rope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    angles: torch.Tensor,
    pairs: torch.Tensor,
    shape: HeadShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [T, H, d] and key [T, G, d], ready for attention, of one floating type.

    queries: [T, H d]. k_rope: [T, G r], None where r = 0. k_nope: [T, G (d - r)], None where r = d. Of these each row
    is contiguous. angles: float32 [S, d], with T a multiple of S and the batch inside. pairs: int64 [G, r/2], which
    angle each pair of dims (i, i + r/2) of a key head, and of its query heads, turns by.
    """
    rows = len(queries)
    query = queries.new_empty(rows, shape.query_heads, shape.head_dim)
    key = queries.new_empty(rows, shape.key_heads, shape.head_dim)
    _launch(queries, k_rope, k_nope, query, key, angles, pairs, shape, backward=False)
    return query, key


def rotate_and_split(
    query: torch.Tensor,
    key: torch.Tensor,
    queries: torch.Tensor,
    k_rope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    angles: torch.Tensor,
    pairs: torch.Tensor,
    shape: HeadShape,
) -> None:
    """The gradient of `rotate_and_join`: from those of query and key (contiguous) into those of its first three
    arguments."""
    _launch(queries, k_rope, k_nope, query, key, angles, pairs, shape, backward=True)


def _launch(
    queries: torch.Tensor,
    k_rope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    angles: torch.Tensor,
    pairs: torch.Tensor,
    shape: HeadShape,
    backward: bool,
) -> None:
    rows = len(queries)
    # Not touched where there is none.
    rope, nope = (queries if part is None else part for part in (k_rope, k_nope))
    block = max(1, 4096 // triton.next_power_of_2(shape.head_dim))
    grid = (triton.cdiv(rows, block), shape.query_heads + shape.key_heads)
    move: Any = _move_heads
    move[grid](
        queries,
        rope,
        nope,
        query,
        key,
        angles,
        pairs,
        rows,
        rows // len(angles),
        # Known as the kernel is compiled, so that whole vectors are moved where they are aligned.
        queries_stride=queries.stride(0),
        rope_stride=rope.stride(0),
        nope_stride=nope.stride(0),
        angle_stride=angles.stride(0),
        query_heads=shape.query_heads,
        key_heads=shape.key_heads,
        r=shape.rope_dim,
        d=shape.head_dim,
        half_block=max(1, triton.next_power_of_2(shape.rope_dim // 2)),
        nope_block=max(1, triton.next_power_of_2(shape.nope_dim)),
        block=block,
        backward=backward,
    )


@triton.jit
def _move_heads(
    queries,
    k_rope,
    k_nope,
    query,
    key,
    angles,
    pairs,
    rows,
    batch,
    queries_stride: tl.constexpr,
    rope_stride: tl.constexpr,
    nope_stride: tl.constexpr,
    angle_stride: tl.constexpr,
    query_heads: tl.constexpr,
    key_heads: tl.constexpr,
    r: tl.constexpr,
    d: tl.constexpr,
    half_block: tl.constexpr,
    nope_block: tl.constexpr,
    block: tl.constexpr,
    backward: tl.constexpr,
):
    """One head of a block of rows, between its parts and its place in query or key."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
    head = tl.program_id(1)
    is_query = head < query_heads
    group = tl.where(is_query, head // (query_heads // key_heads), head - query_heads)
    if is_query:
        whole = query + row * (query_heads * d) + head * d
        rope_part = queries + row * queries_stride + head * d
        nope_part = rope_part + r
    else:
        whole = key + row * (key_heads * d) + group * d
        rope_part = k_rope + row * rope_stride + group * r
        nope_part = k_nope + row * nope_stride + group * (d - r)
    inside = row < rows

    if r > 0:
        half: tl.constexpr = r // 2
        dim = tl.arange(0, half_block)[None, :]
        valid = inside & (dim < half)
        pair = tl.load(pairs + group * half + dim, mask=dim < half, other=0)
        angle = tl.load(angles + (row // batch) * angle_stride + pair, mask=valid, other=0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        if backward:
            sin = -sin
            first = tl.load(whole + dim, mask=valid, other=0.0).to(tl.float32)
            second = tl.load(whole + half + dim, mask=valid, other=0.0).to(tl.float32)
            to = rope_part
        else:
            first = tl.load(rope_part + dim, mask=valid, other=0.0).to(tl.float32)
            second = tl.load(rope_part + half + dim, mask=valid, other=0.0).to(tl.float32)
            to = whole
        tl.store(to + dim, first * cos - second * sin, mask=valid)
        tl.store(to + half + dim, second * cos + first * sin, mask=valid)

    if d > r:
        dim = tl.arange(0, nope_block)[None, :]
        valid = inside & (dim < d - r)
        if backward:
            tl.store(nope_part + dim, tl.load(whole + r + dim, mask=valid), mask=valid)
        else:
            tl.store(whole + r + dim, tl.load(nope_part + dim, mask=valid), mask=valid)
