"""One kernel between the projections and attention: it rotates queries and keys and puts the keys together.

Shape letters: S sequence, B batch, T = S B rows, H query heads, G key/value heads, R heads of rotated keys (G, or 1
that all share), r rotary dims kept per head, n other dims, d = r + n.

In plain torch this is a table of angles for each head, six elementwise operations over queries and over keys and
one concatenation; here everything is read once and written once, and the rotation is in float32.

Layers of one model may differ in r and in all strides, and compiling takes a second: these are arguments, given as
multiples of constants, which say how many elements may be moved at once.
"""

from __future__ import annotations

import math
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
    rope_heads: int
    """Of rotated keys: as many as there are key heads, or 1 that all share."""

    rope_dim: int
    nope_dim: int

    @property
    def head_dim(self) -> int:
        """Of queries and keys: r + n."""
        return self.rope_dim + self.nope_dim


def rotate_and_join(
    queries: torch.Tensor,
    k_rope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    angles: torch.Tensor,
    pairs: torch.Tensor,
    shape: HeadShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [T, H, d] and key [T, G, d], ready for attention, of one floating type.

    queries: [T, H d]. k_rope: [T, R r], None where r = 0. k_nope: [T, G n], None where n = 0. Of these each row is
    contiguous. angles: float32 [S, columns], with T a multiple of S and the batch inside. pairs: int64 [R, r/2], which
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
    arguments. That of a rotated key which heads share is summed over them in float32, in their order."""
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
    half, strides = shape.rope_dim // 2, (queries.stride(0), rope.stride(0), nope.stride(0))
    half_vector = math.gcd(2, half, shape.head_dim, *strides)  # larger ones change nothing: a thread has few pairs
    nope_vector = math.gcd(8, shape.nope_dim, shape.head_dim, *strides)
    widest = max(half_vector, nope_vector)
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
        half // half_vector,
        shape.nope_dim // nope_vector,
        shape.head_dim // widest,
        *(stride // widest for stride in strides),
        half_vector=half_vector,
        nope_vector=nope_vector,
        angle_stride=angles.stride(0),
        query_heads=shape.query_heads,
        key_heads=shape.key_heads,
        rope_heads=shape.rope_heads,
        rotates=half > 0,
        half_block=max(8, triton.next_power_of_2(half)),
        nope_block=max(8, triton.next_power_of_2(shape.nope_dim)),
        block=block,
        backward=backward,
    )


@triton.jit(do_not_specialize=["half", "nope", "d", "queries_stride", "rope_stride", "nope_stride"])
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
    half,
    nope,
    d,
    queries_stride,
    rope_stride,
    nope_stride,
    half_vector: tl.constexpr,
    nope_vector: tl.constexpr,
    angle_stride: tl.constexpr,
    query_heads: tl.constexpr,
    key_heads: tl.constexpr,
    rope_heads: tl.constexpr,
    rotates: tl.constexpr,
    half_block: tl.constexpr,
    nope_block: tl.constexpr,
    block: tl.constexpr,
    backward: tl.constexpr,
):
    """One head of a block of rows, between its parts and its place in query or key."""
    widest: tl.constexpr = max(half_vector, nope_vector)
    half, nope, d = half * half_vector, nope * nope_vector, d * widest
    queries_stride, rope_stride, nope_stride = queries_stride * widest, rope_stride * widest, nope_stride * widest
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
    head = tl.program_id(1)
    is_query = head < query_heads
    group = tl.where(is_query, head // (query_heads // key_heads), head - query_heads)
    sharing: tl.constexpr = key_heads // rope_heads
    rope_head = group // sharing
    if is_query:
        whole = query + row * (query_heads * d) + head * d
        rope_part = queries + row * queries_stride + head * d
        nope_part = rope_part + (d - nope)
    else:
        whole = key + row * (key_heads * d) + group * d
        rope_part = k_rope + row * rope_stride + rope_head * 2 * half
        nope_part = k_nope + row * nope_stride + group * nope
    inside = row < rows

    if rotates:
        dim = tl.arange(0, half_block)[None, :]
        valid = inside & (dim < half)
        if backward:  # of heads that share a rotated key the first one makes its gradient
            valid = valid & (is_query | (group % sharing == 0))
        pair = tl.load(pairs + rope_head * half + dim, mask=dim < half, other=0)
        angle = tl.load(angles + (row // batch) * angle_stride + pair, mask=valid, other=0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        if backward:
            sin = -sin
            first = tl.load(whole + dim, mask=valid, other=0.0).to(tl.float32)
            second = tl.load(whole + half + dim, mask=valid, other=0.0).to(tl.float32)
            if not is_query:
                for other in range(1, sharing):
                    first += tl.load(whole + other * d + dim, mask=valid, other=0.0).to(tl.float32)
                    second += tl.load(whole + other * d + half + dim, mask=valid, other=0.0).to(tl.float32)
            to = rope_part
        else:
            first = tl.load(rope_part + dim, mask=valid, other=0.0).to(tl.float32)
            second = tl.load(rope_part + half + dim, mask=valid, other=0.0).to(tl.float32)
            to = whole
        tl.store(to + dim, first * cos - second * sin, mask=valid)
        tl.store(to + half + dim, second * cos + first * sin, mask=valid)

    dim = tl.arange(0, nope_block)[None, :]
    valid = inside & (dim < nope)
    whole += d - nope
    if backward:
        tl.store(nope_part + dim, tl.load(whole + dim, mask=valid), mask=valid)
    else:
        tl.store(whole + dim, tl.load(nope_part + dim, mask=valid), mask=valid)
