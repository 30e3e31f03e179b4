"""One token into a static quantised cache, in one Triton launch that a CUDA graph can hold.

In most steps a token is written to the ring and nothing else happens. Whether a group of tokens is full, to be
quantised first, is read on the device: a program of other steps returns at once, where torch operations of fixed
shapes would quantise a group in every step. The rule is that of `quantise_mha2mla.fit_grid`.

Shape letters: g tokens of a group, w channels.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from .decode_triton_mha2mla import _jit, _jit_for_any, _power_of_2, _vector, has_triton, tl
from .quantise_mha2mla import REFITS, START_RANGES

if TYPE_CHECKING:
    from .packed_tokens_mha2mla import PackedTokens

ROUND = 1.5 * 2**23
"""Adding and subtracting it rounds a small float32 to a whole number, halves to even, as torch does."""


def can_append(tokens: PackedTokens, new: torch.Tensor) -> bool:
    """Whether the kernel takes this token: CUDA with Triton, groups of a power of two, and channels at all."""
    return has_triton(new) and new.shape[-1] > 0 and tokens.group_size == _power_of_2(tokens.group_size) <= 256


def append_token(tokens: PackedTokens, new: torch.Tensor, count: torch.Tensor) -> None:
    """Store new [b, 1, w] behind `count` others, int64 scalar on the device."""
    batch, _, width = new.shape
    new = new.contiguous()
    block, vector = min(max(16, 4096 // tokens.group_size), _power_of_2(width)), _vector(16, width)
    guard = torch.cuda.device(new.device) if new.is_cuda and not torch.compiler.is_compiling() else nullcontext()
    with guard:
        _append_token[(-(-width // block), batch)](
            new, count, tokens.codes, tokens.scale, tokens.zero, tokens.window, tokens.blocks, width // vector,
            VECTOR=vector, NBITS=tokens.nbits, GROUP=tokens.group_size, RESIDUAL=tokens.residual_length,
            WINDOW=tokens.window.shape[1], HAS_BLOCKS=tokens.blocks > 0, WHOLE=START_RANGES[0], PART=START_RANGES[1],
            REFITS=REFITS, ROUND=ROUND, BLOCK=block, num_warps=4,
        )  # fmt: skip


@_jit_for_any("blocks", "width")
def _append_token(
    new, count, codes, scale, zero, window, blocks, width,
    VECTOR: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, PART: tl.constexpr, REFITS: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    width = width * VECTOR
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    window += batch * WINDOW * width
    tokens = tl.load(count).to(tl.int32)
    if HAS_BLOCKS:
        full = tokens - RESIDUAL
        if (full >= GROUP) & (full % GROUP == 0):
            block = full // GROUP - 1
            at = batch * blocks + block
            if NBITS == 16:
                row = tl.arange(0, GROUP)
                x = _group(window, block * GROUP + row, column, inside, width, WINDOW)
                at_code = codes + (at * GROUP + row)[:, None] * width + column[None, :]
                tl.store(at_code, _to_half(x).to(tl.float16), mask=inside[None, :])
            else:
                step, lowest = _fit_grid(
                    _group(window, block * GROUP + tl.arange(0, GROUP), column, inside, width, WINDOW),
                    NBITS, GROUP, WHOLE, PART, REFITS, ROUND,
                )  # fmt: skip
                tl.store(scale + at * width + column, step.to(tl.float16), mask=inside)
                tl.store(zero + at * width + column, lowest.to(tl.float16), mask=inside)
                PACK: tl.constexpr = 8 // NBITS
                row = tl.arange(0, GROUP // PACK)
                packed = tl.zeros([GROUP // PACK, BLOCK], tl.int32)
                for i in tl.static_range(PACK):
                    x = _group(window, block * GROUP + row * PACK + i, column, inside, width, WINDOW)
                    packed |= _codes(x, step[None, :], lowest[None, :], NBITS, ROUND).to(tl.int32) << (i * NBITS)
                at_code = codes + (at * (GROUP // PACK) + row)[:, None] * width + column[None, :]
                tl.store(at_code, packed.to(tl.uint8), mask=inside[None, :])
            tl.debug_barrier()  # the new token's slot may be one of those just read
    token = tl.load(new + batch * width + column, mask=inside, other=0.0).to(tl.float32)
    if window.dtype.element_ty == tl.float16:
        token = _to_half(token)
    tl.store(window + (tokens % WINDOW) * width + column, token.to(window.dtype.element_ty), mask=inside)


@_jit
def _group(window, position, column, inside, width, WINDOW: tl.constexpr):
    at = window + (position % WINDOW)[:, None] * width + column[None, :]
    return tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)


@_jit
def _to_half(x):
    """Rounded to float16 and limited to its range, as float32."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@_jit
def _codes(x, step, lowest, NBITS: tl.constexpr, ROUND: tl.constexpr):
    share = tl.where(step == 0, 0.0, (x - lowest) / tl.where(step == 0, 1.0, step))
    return tl.minimum(tl.maximum(share, 0.0), 2.0**NBITS - 1) + ROUND - ROUND


@_jit
def _fit_grid(
    x, NBITS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, PART: tl.constexpr, REFITS: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """(scale, zero) [w], float16 numbers in float32, of a group x [g, w]."""
    LEVELS: tl.constexpr = 2**NBITS - 1
    low, high = tl.min(x, axis=0), tl.max(x, axis=0)
    step, lowest = _to_half((high - low) / LEVELS), _to_half(low)
    if NBITS < 8:
        mean = tl.sum(x, axis=0) / GROUP
        error = x - lowest[None, :] - step[None, :] * _codes(x, step[None, :], lowest[None, :], NBITS, ROUND)
        smallest = tl.sum(error * error, axis=0)
        for start in tl.static_range(2):
            part = WHOLE if start == 0 else PART
            zero = (low + high) / 2 - (high - low) * (part / 2)
            scale = (high - low) * (part / LEVELS)
            for _ in tl.static_range(REFITS):
                codes = _codes(x, scale[None, :], zero[None, :], NBITS, ROUND)
                middle = tl.sum(codes, axis=0) / GROUP
                centred = codes - middle[None, :]
                spread = tl.maximum(tl.sum(centred * centred, axis=0), 0.5)
                scale = tl.sum(centred * (x - mean[None, :]), axis=0) / spread
                zero = mean - scale * middle
            scale, zero = _to_half(scale), _to_half(zero)
            error = x - zero[None, :] - scale[None, :] * _codes(x, scale[None, :], zero[None, :], NBITS, ROUND)
            squared = tl.sum(error * error, axis=0)
            better = squared < smallest
            step, lowest = tl.where(better, scale, step), tl.where(better, zero, lowest)
            smallest = tl.minimum(squared, smallest)
    return step, lowest
