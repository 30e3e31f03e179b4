"""Flash decoding over a packed latent cache in Triton: bytes of 8, 4 or 2-bit codes are read from memory, not rows.

Cached rows and latent columns are the long sides of all products, as in `decode_triton_mha2mla`. A first kernel scores,
a second one averages, a third adds the splits up. (One kernel for both reads the latents once, but has two chains of
matrix instructions in a loop: wrong numbers and illegal addresses with Triton 3.6, and slower where it was right.)

A tile of bytes becomes a tile of rows in registers: a byte holds consecutive tokens of one column, so its codes stay in
the thread that loaded it; each is turned into a 16-bit float by bit operations and scaled once. Rows and columns are
dealt in the order in which matrix instructions want them, so that no row passes through shared memory; the query is put
into the same order beforehand. (The scales cannot be folded into the query or the average for less: they change with
every group of tokens.) The scoring kernel leaves the largest score of each tile, so the averaging kernel knows the
maximum of its tokens from the start: no reductions and no rescaling in its loop.

The window of the newest tokens, unpacked, belongs to the last split.

What differs between a model's layers is no constant of a kernel, as in `decode_triton_mha2mla`.

Everything is float16 in a 16-bit model: the grids are float16, and it holds 3 bits more than bfloat16. Queries are
divided by 64 on the way, so that a query of bfloat16's range is not the first to overflow. A float32 model's rows are
float32.

Shape letters: b batch, m query rows per sequence (one new token: heads), n groups of tokens, g rotated columns (G r),
w columns of the unrotated part, k and v those that are scored and averaged.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .decode_triton_mha2mla import (
    LOG2_E,
    PRECISIONS,
    _combine_splits,
    _constant,
    _jit,
    _jit_for_any,
    _load_rows,
    _power_of_2,
    _store_split,
    _vector,
    device_limits,
    tl,
    triton,
)
from .packed_tokens_mha2mla import PackedTokens

QUERY_SHARE = 1 / 64
"""float16 queries are multiplied by this, their scores by its inverse."""


def _unpack(shift: int, mask: int) -> Any:
    """PTX: the codes of one place in four bytes, each with the upper byte of 1024 in float16 beside it."""
    lines = (
        ".reg .b32 codes",
        f"shr.u32 codes, $2, {shift}",
        f"and.b32 codes, codes, {mask}",
        "prmt.b32 $0, codes, 0x64646464, 0x4140",
        "prmt.b32 $1, codes, 0x64646464, 0x4342",
    )
    # In one line: torch.compile copies kernels and their constants into a string of its own.
    text = f"{{ {' '.join(f'{line};' for line in lines)} }}"
    return None if tl is None else tl.constexpr(text)


# Kernels see no other globals than single constants.
UNPACK_8 = _unpack(0, 0xFFFFFFFF)
UNPACK_4_0, UNPACK_4_1 = (_unpack(shift, 0x0F0F0F0F) for shift in (0, 4))
UNPACK_2_0, UNPACK_2_1, UNPACK_2_2, UNPACK_2_3 = (_unpack(shift, 0x03030303) for shift in (0, 2, 4, 6))


@dataclass(frozen=True)
class PackedTiles:
    """How one launch is cut.

    block_n and score_k, the inner sides of the two products, have to be 64 or more: with Triton 3.6 the older matrix
    instructions sum wrong elements of smaller ones if an operand was unpacked (triton-lang/triton#10645, #11691).
    """

    block_m: int
    """Query rows of a program."""
    block_n: int
    """Cached tokens of one step."""
    block_c: int
    """Value columns whose average a program computes."""
    warps: int
    stages: int
    splits: int
    """Programs that share the tokens of a sequence."""
    score_n: int
    """Tokens of a program of the scoring kernel."""
    score_k: int
    """Columns of one of its steps."""
    score_warps: int
    score_stages: int


def choose_packed_tiles(batch: int, m: int, t: int, v: int, element_size: int, multiprocessors: int) -> PackedTiles:
    """The tiles for t packed tokens and v value columns."""
    block_m, block_c = min(32, _power_of_2(max(16, m))), min(_power_of_2(max(16, v)), 512 // element_size)
    tiles = PackedTiles(block_m, 64, block_c, 4, 3, 1, 256 // element_size, 64, 4, 4)
    programs = batch * -(-m // block_m) * -(-v // block_c)
    resident = 2 * multiprocessors

    def cost(splits: int) -> float:
        """Time of all programs in tokens: full rounds of resident ones, each with its tokens and a start."""
        return -(-programs * splits // resident) * (-(-t // splits) + 128)

    return replace(tiles, splits=min(range(1, max(1, min(-(-t // 64), 128)) + 1), key=cost))


def flash_decode_packed(
    q_rope: torch.Tensor,
    q_key: torch.Tensor,
    rope: PackedTokens,
    unrotated: PackedTokens,
    keys: slice,
    values: slice,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    tiles: PackedTiles | None = None,
) -> torch.Tensor:
    """Attention of one new token over packed tokens, the new one among them.

    q_rope [b, H, 1, g], q_key [b, H, 1, k]; rope [b, ., g] and unrotated [b, ., w] as `append` left them; keys, values:
    columns of the unrotated part; length: int64 scalar on the device, tokens in the cache; mask: None (every token is
    seen) or bool [1 or b, 1, 1, tokens that the cache can hold].
    Returns the averaged value columns [b, H, 1, v] in q_key's type, 0 where no token is seen; scores and sums are
    float32. Works in 4 b H (t + window) bytes for scores, and 4 b H v for each split.
    """
    batch, m, _, k = q_key.shape
    g, v, dtype = rope.width, values.stop - values.start, unrotated.window.dtype
    q_rope, q_key = q_rope.reshape(batch, m, g).contiguous(), q_key.reshape(batch, m, k).contiguous()
    packed, window = unrotated.blocks * unrotated.group_size, unrotated.window.shape[1]
    if tiles is None:
        limits = device_limits(q_key.device.index)
        tiles = choose_packed_tiles(batch, m, packed, v, dtype.itemsize, limits[0])
    c_tiles, c_block = -(-v // tiles.block_c), min(1024, _power_of_2(v))
    device = q_key.device
    partial = torch.empty(batch, tiles.splits, m, v, dtype=torch.float32, device=device)
    logsumexp = torch.empty(batch, tiles.splits, m, dtype=torch.float32, device=device)
    out = torch.empty(batch, m, 1, v, dtype=q_key.dtype, device=device)
    scores = torch.empty(batch, packed + window, m, dtype=torch.float32, device=device)
    score_tiles = -(-packed // tiles.score_n) + -(-window // tiles.score_n)
    tops = torch.empty(batch, score_tiles, m, dtype=torch.float32, device=device)
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    dealt = [
        torch.empty(batch, m, -(-x.shape[2] // tiles.score_k) * tiles.score_k, dtype=dtype, device=device)
        for x in (q_rope, q_key)
    ]
    latents = unrotated.codes, unrotated.scale, unrotated.zero, unrotated.window
    mask_batch = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    share = 1.0 if dtype == torch.float32 else QUERY_SHARE
    rope_vector = _vector(16, g)
    vector = _vector(16, unrotated.width, keys.start, k, values.start, v)
    width = unrotated.width // vector
    common = dict(
        VECTOR=vector, WIDTH=_constant(unrotated.width), NBITS=unrotated.nbits, GROUP=unrotated.group_size,
        RESIDUAL=unrotated.residual_length, WINDOW=window, PRECISION=PRECISIONS[dtype], ASM=_COMPILED,
    )  # fmt: skip
    guard = torch.cuda.device(device) if q_key.is_cuda and not torch.compiler.is_compiling() else nullcontext()
    with guard:
        for query, target in zip((q_rope, q_key), dealt, strict=True):
            if query.shape[2]:
                _deal_query[(batch * m, target.shape[2] // tiles.score_k)](
                    query, target, query.shape[2], BLOCK_K=tiles.score_k, SHARE=share, num_warps=1
                )
        block_m = min(64, _power_of_2(max(16, m)))
        _score_packed[(score_tiles, -(-m // block_m), batch)](
            q_rope, q_key, *dealt, q_key if mask is None else mask, length, scores, tops,
            rope.codes, rope.scale, rope.zero, rope.window, *latents, mask_batch, m, unrotated.blocks, g // rope_vector,
            k // vector, keys.start // vector, width, ROPE_VECTOR=rope_vector, G=_constant(g), K=_constant(k),
            K_FIRST=_constant(keys.start), HAS_ROPE=g > 0, ROPE_NBITS=rope.nbits, HAS_MASK=mask is not None,
            SHARE=share, BLOCK_M=block_m, BLOCK_N=tiles.score_n, BLOCK_K=tiles.score_k, STAGES=tiles.score_stages,
            num_warps=tiles.score_warps, num_stages=tiles.score_stages, **common,
        )  # fmt: skip
        _average_packed[(c_tiles * -(-m // tiles.block_m), tiles.splits, batch)](
            length, scores, tops, partial, logsumexp, *latents, m, unrotated.blocks, v // vector,
            values.start // vector, width, scaling * LOG2_E / share, V=_constant(v), V_FIRST=_constant(values.start),
            BLOCK_C=tiles.block_c, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, SCORE_N=tiles.score_n,
            STAGES=tiles.stages, WARPS=tiles.warps, num_warps=tiles.warps, num_stages=tiles.stages, **common,
        )  # fmt: skip
        combine_vector = _vector(8, v)
        _combine_splits[(batch * m, -(-v // c_block))](
            partial, logsumexp, out, m, tiles.splits, v // combine_vector, VECTOR=combine_vector, BLOCK_C=c_block
        )
    return out


@_jit_for_any("mask_batch", "blocks", "g", "k", "k_first", "width")
def _score_packed(
    q_rope, q_key, dealt_rope, dealt_key, mask, length, scores, tops, rope_codes, rope_scale, rope_zero, rope_window,
    codes, scale, zero, window, mask_batch, m, blocks, g, k, k_first, width,
    ROPE_VECTOR: tl.constexpr, VECTOR: tl.constexpr, G: tl.constexpr, K: tl.constexpr, K_FIRST: tl.constexpr,
    WIDTH: tl.constexpr, HAS_ROPE: tl.constexpr, NBITS: tl.constexpr, ROPE_NBITS: tl.constexpr, GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores [b, n GROUP + WINDOW, m] of the packed tokens, then of the window's slots, over g rotated columns and k
    key columns; -inf where a token is hidden or a slot empty; not yet scaled. The largest
    ones [b, programs, m] of every tile with tokens."""
    g, k = G if G > 0 else g * ROPE_VECTOR, K if K > 0 else k * VECTOR
    k_first, width = K_FIRST if K_FIRST > 0 else k_first * VECTOR, WIDTH if WIDTH > 0 else width * VECTOR
    batch, packed_rows = tl.program_id(2).to(tl.int64), blocks * GROUP
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask += batch * mask_batch
    scores += batch * (packed_rows + WINDOW) * m
    tokens = tl.load(length).to(tl.int32)
    end = _packed_tokens(tokens, RESIDUAL, GROUP)
    tiles = tl.cdiv(packed_rows, BLOCK_N)
    tops += (batch * tl.num_programs(0) + tl.program_id(0)) * m + rows_m
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if tl.program_id(0) < tiles:
        n = tl.program_id(0) * BLOCK_N
        if n < end:
            if HAS_ROPE:
                acc = _add_packed_product(
                    acc, dealt_rope, rope_codes, rope_scale, rope_zero, batch, blocks, n, end,
                    rows_m, m, g, 0, g, ROPE_NBITS, GROUP, BLOCK_N, BLOCK_K, PRECISION, STAGES, ASM,
                )  # fmt: skip
            acc = _add_packed_product(
                acc, dealt_key, codes, scale, zero, batch, blocks, n, end,
                rows_m, m, k, k_first, width, NBITS, GROUP, BLOCK_N, BLOCK_K, PRECISION, STAGES, ASM,
            )  # fmt: skip
            rows_n = n + _dealt_tokens(BLOCK_N)
            seen = rows_n < end
            if HAS_MASK:
                seen &= tl.load(mask + rows_n, mask=seen, other=0).to(tl.int1)
            acc = tl.where(seen[:, None], acc, float("-inf"))
            tl.store(tops, tl.max(acc, axis=0), mask=rows_m < m)
            inside = (rows_n < end)[:, None] & (rows_m < m)[None, :]
            tl.store(scores + rows_n[:, None] * m + rows_m[None, :], acc, mask=inside)
    else:
        slots = (tl.program_id(0) - tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_ROPE:
            acc = _add_window_product(
                acc, q_rope + batch * m * g, rope_window + batch * WINDOW * g, slots, rows_m, m, g, 0, g,
                WINDOW, SHARE, BLOCK_K, PRECISION,
            )  # fmt: skip
        acc = _add_window_product(
            acc, q_key + batch * m * k, window + batch * WINDOW * width, slots, rows_m, m, k, k_first, width,
            WINDOW, SHARE, BLOCK_K, PRECISION,
        )  # fmt: skip
        seen = _seen_slots(slots, tokens, end, mask, WINDOW, HAS_MASK)
        acc = tl.where(seen[:, None], acc, float("-inf"))
        tl.store(tops, tl.max(acc, axis=0), mask=rows_m < m)
        inside = (slots < WINDOW)[:, None] & (rows_m < m)[None, :]
        tl.store(scores + (packed_rows + slots)[:, None] * m + rows_m[None, :], acc, mask=inside)


@_jit_for_any("blocks", "v", "v_first", "width")
def _average_packed(
    length, scores, tops, context, logsumexp, codes, scale, zero, window, m, blocks, v, v_first, width, factor,
    VECTOR: tl.constexpr, V: tl.constexpr, V_FIRST: tl.constexpr, WIDTH: tl.constexpr, NBITS: tl.constexpr,
    GROUP: tl.constexpr, RESIDUAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCORE_N: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Context over one split of one sequence's tokens, for BLOCK_M query rows and BLOCK_C of v value columns."""
    v, v_first = V if V > 0 else v * VECTOR, V_FIRST if V_FIRST > 0 else v_first * VECTOR
    width = WIDTH if WIDTH > 0 else width * VECTOR
    v_tiles = tl.cdiv(v, BLOCK_C)
    tile, split, batch = tl.program_id(0) % v_tiles, tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows_m = (tl.program_id(0) // v_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = (rows_m < m)[None, :]
    factor = tl.cast(factor, tl.float32)  # torch.compile passes 64 bits
    packed_rows = blocks * GROUP
    scores += batch * (packed_rows + WINDOW) * m
    packed = _packed_tokens(tl.load(length).to(tl.int32), RESIDUAL, GROUP)
    share = tl.cdiv(tl.cdiv(packed, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(packed, begin + share)

    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    is_last = split == tl.num_programs(1) - 1
    before, in_window = tl.cdiv(packed_rows, SCORE_N), tl.cdiv(WINDOW, SCORE_N)
    tops += batch * (before + in_window) * m
    top = _largest(tops, begin // SCORE_N, tl.where(begin < end, tl.cdiv(end, SCORE_N), 0), rows_m, m)
    if is_last:
        top = tl.maximum(top, _largest(tops, before, before + in_window, rows_m, m))
    top = tl.where(top == float("-inf"), 0.0, top * factor)  # no visible token
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows_n = n + tl.arange(0, BLOCK_N)
        values = _load_packed(
            codes, scale, zero, batch, blocks, n, end, v_first + column, column < v, width, NBITS, GROUP, BLOCK_N,
            window.dtype.element_ty, ASM,
        )  # fmt: skip
        at = scores + rows_n[:, None] * m + rows_m[None, :]
        part = tl.load(at, mask=(rows_n < end)[:, None] & valid_m, other=float("-inf"))
        weights = tl.exp2(part * factor - top[None, :])
        total += weights
        acc = tl.dot(tl.trans(_deal(values, WARPS)), weights.to(values.dtype), acc, input_precision=PRECISION)

    # The window, in the last split's program alone.
    for slot in tl.range(0, tl.where(is_last, WINDOW, 0), BLOCK_N, num_stages=1):
        slots = slot + tl.arange(0, BLOCK_N)
        values = _load_slots(window + batch * WINDOW * width, slots, v_first + column, column < v, width, WINDOW)
        at = scores + (packed_rows + slots)[:, None] * m + rows_m[None, :]
        part = tl.load(at, mask=(slots < WINDOW)[:, None] & valid_m, other=float("-inf"))
        weights = tl.exp2(part * factor - top[None, :])
        total += weights
        acc = tl.dot(tl.trans(_deal(values, WARPS)), weights.to(values.dtype), acc, input_precision=PRECISION)

    acc = _collect(acc, WARPS)
    first = (batch * tl.num_programs(1) + split) * m
    _store_split(context, logsumexp, acc, top, tl.sum(total, axis=0), first, rows_m, column, m, tile == 0, v)


@_jit
def _largest(tops, first, stop, rows_m, m):
    """The largest score of each query row in some tiles of the kernel before."""
    top = tl.full([16, rows_m.shape[0]], float("-inf"), tl.float32)
    for tile in range(first, stop, 16):
        tiles = tile + tl.arange(0, 16)
        inside = (tiles < stop)[:, None] & (rows_m < m)[None, :]
        at = tops + tiles[:, None] * m + rows_m[None, :]
        top = tl.maximum(top, tl.load(at, mask=inside, other=float("-inf")))
    return tl.max(top, axis=0)


@_jit
def _deal(x, WARPS: tl.constexpr):
    """x [rows, columns] with the columns in another order: a matrix instruction hands columns to threads like cards,
    eight in turn, then the next warp; dealt in this order, a thread's columns are neighbours in memory."""
    SHARE: tl.constexpr = x.shape[1] // (8 * WARPS)
    if SHARE >= 2:
        hands = tl.reshape(x, (x.shape[0], WARPS, 8, SHARE // 2, 2))
        x = tl.reshape(tl.permute(hands, (0, 3, 1, 4, 2)), (x.shape[0], x.shape[1]))
    return x


@_jit
def _collect(x, WARPS: tl.constexpr):
    """x [columns, .] back in the order of memory."""
    SHARE: tl.constexpr = x.shape[0] // (8 * WARPS)
    if SHARE >= 2:
        hands = tl.reshape(x, (SHARE // 2, WARPS, 2, 8, x.shape[1]))
        x = tl.reshape(tl.permute(hands, (1, 3, 0, 2, 4)), (x.shape[0], x.shape[1]))
    return x


@_jit
def _packed_tokens(tokens, RESIDUAL: tl.constexpr, GROUP: tl.constexpr):
    """How many of the tokens before the newest are packed."""
    return tl.maximum((tokens - 1 - RESIDUAL) // GROUP, 0) * GROUP


@_jit
def _seen_slots(slots, tokens, packed, mask, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which slots of the window, a ring, hold a token that is not packed and not hidden."""
    position = tokens - 1 - (tokens - 1 - slots + WINDOW) % WINDOW
    seen = (slots < WINDOW) & (position >= packed)
    if HAS_MASK:
        seen &= tl.load(mask + position, mask=seen, other=0).to(tl.int1)
    return seen


@_jit
def _load_query(query, rows_m, m, column, columns, SHARE: tl.constexpr, DTYPE: tl.constexpr):
    return (_load_rows(query, columns, rows_m, m, column, columns).to(tl.float32) * SHARE).to(DTYPE)


@_jit
def _load_slots(window, slots, column, inside, width, WINDOW: tl.constexpr):
    return tl.load(
        window + slots[:, None] * width + column[None, :], mask=(slots < WINDOW)[:, None] & inside[None, :], other=0.0
    )


@_jit
def _load_packed(
    codes, scale, zero, batch, blocks, first, end, column, inside, width,
    NBITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Tokens first to first + BLOCK_N of some columns as floats [BLOCK_N, columns]; 0 from `end` on."""
    at = batch * blocks * GROUP + first
    if NBITS == 16:
        row = tl.arange(0, BLOCK_N)
        valid = (first + row < end)[:, None] & inside[None, :]
        x = tl.load(codes + (at + row)[:, None] * width + column[None, :], mask=valid, other=0.0).to(DTYPE)
    else:
        PACK: tl.constexpr = 8 // NBITS
        SUB: tl.constexpr = min(GROUP, BLOCK_N)  # tokens of this tile that share a grid
        row = tl.arange(0, BLOCK_N // PACK)
        valid = (first + row * PACK < end)[:, None] & inside[None, :]
        packed = tl.load(codes + (at // PACK + row)[:, None] * width + column[None, :], mask=valid, other=0)
        grid = tl.arange(0, BLOCK_N // SUB)
        valid = (first + grid * SUB < end)[:, None] & inside[None, :]
        grid_at = ((at + grid * SUB) // GROUP)[:, None] * width + column[None, :]
        step = tl.load(scale + grid_at, mask=valid, other=0.0).to(DTYPE)
        lowest = tl.load(zero + grid_at, mask=valid, other=0.0).to(DTYPE)
        levels = tl.reshape(_levels(packed, NBITS, DTYPE, ASM), (BLOCK_N // SUB, SUB, column.shape[0]))
        x = tl.reshape(levels * step[:, None, :] + lowest[:, None, :], (BLOCK_N, column.shape[0]))
    return x


@_jit
def _levels(packed, NBITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes [rows, columns] -> the codes in them as floats, [rows, (values in a byte,) columns]."""
    if NBITS == 8:
        levels = _codes(packed, 0, 255, UNPACK_8, DTYPE, ASM)
    elif NBITS == 4:
        levels = tl.permute(
            tl.join(_codes(packed, 0, 15, UNPACK_4_0, DTYPE, ASM), _codes(packed, 4, 15, UNPACK_4_1, DTYPE, ASM)),
            (0, 2, 1),
        )
    else:
        even = tl.join(_codes(packed, 0, 3, UNPACK_2_0, DTYPE, ASM), _codes(packed, 4, 3, UNPACK_2_2, DTYPE, ASM))
        odd = tl.join(_codes(packed, 2, 3, UNPACK_2_1, DTYPE, ASM), _codes(packed, 6, 3, UNPACK_2_3, DTYPE, ASM))
        levels = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
    return levels


@_jit
def _codes(
    packed, SHIFT: tl.constexpr, MASK: tl.constexpr, UNPACK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """The codes of one place in each byte as floats."""
    if DTYPE == tl.float16:  # noqa: SIM300
        # The bits of 1024 + x, less 1024: a conversion is several times slower.
        if ASM:
            x = tl.inline_asm_elementwise(UNPACK, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
        else:
            x = (((packed >> SHIFT) & MASK).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        x -= 1024.0
    else:
        x = ((packed >> SHIFT) & MASK).to(DTYPE)
    return x


@_jit
def _add_packed_product(
    acc, query, codes, scale, zero, batch, blocks, n, end, rows_m, m, columns, first, width,
    NBITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus packed tokens, in the order of `_dealt_tokens`, times query rows."""
    DTYPE: tl.constexpr = query.dtype.element_ty
    padded = tl.cdiv(columns, BLOCK_K) * BLOCK_K
    query += batch * m * padded
    for k in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        column = k + tl.arange(0, BLOCK_K)
        keys = _load_packed(
            codes, scale, zero, batch, blocks, n, end, first + column, column < columns, width, NBITS, GROUP, BLOCK_N,
            DTYPE, ASM,
        )  # fmt: skip
        queries = _load_rows(query, padded, rows_m, m, column, padded)
        acc = tl.dot(_deal_keys(keys), tl.trans(queries), acc, input_precision=PRECISION)
        # Never true, and gone in the end; but Triton, seeing acc used, waits for the product here. If it leaves that to
        # the next step, the assembler makes every instruction wait for the one before.
        acc = tl.where(k < 0, 0.0, acc)
    return acc


@_jit
def _deal_keys(x):
    """x [tokens, columns] in the order in which matrix instructions hand their first operand to threads: each has rows
    8 apart and pairs of columns 8 apart. Dealt so, it has the tokens of a byte, and neighbours in memory."""
    hands = tl.reshape(x, (x.shape[0] // 32, 8, 2, 2, 4, x.shape[1] // 8, 2))
    return tl.reshape(tl.permute(hands, (2, 0, 3, 1, 5, 4, 6)), (x.shape[0], x.shape[1]))


@_jit
def _dealt_tokens(BLOCK_N: tl.constexpr):
    """Which token each row of `_deal_keys` is."""
    row = tl.arange(0, BLOCK_N)
    return row % (BLOCK_N // 2) // 16 * 32 + row % 8 * 4 + row // (BLOCK_N // 2) * 2 + row // 8 % 2


@_jit_for_any("columns")
def _deal_query(query, dealt, columns, BLOCK_K: tl.constexpr, SHARE: tl.constexpr):
    """One row of a query times SHARE, BLOCK_K columns of it in the order of `_deal_keys`, zeros behind the last."""
    padded = tl.cdiv(columns, BLOCK_K) * BLOCK_K
    at = tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_K + at % 8 // 2 * (BLOCK_K // 4) + at // 8 * 2 + at % 2
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(query + row * columns + column, mask=column < columns, other=0.0).to(tl.float32) * SHARE
    tl.store(dealt + row * padded + tl.program_id(1) * BLOCK_K + at, x.to(dealt.dtype.element_ty))


@_jit
def _add_window_product(
    acc, query, window, slots, rows_m, m, columns, first, width,
    WINDOW: tl.constexpr, SHARE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus the window's slots times query rows, over all columns."""
    DTYPE: tl.constexpr = window.dtype.element_ty
    for k in tl.range(0, columns, BLOCK_K, num_stages=1):  # few rows: not worth memory
        column = k + tl.arange(0, BLOCK_K)
        keys = _load_slots(window, slots, first + column, column < columns, width, WINDOW)
        queries = _load_query(query, rows_m, m, column, columns, SHARE, DTYPE)
        acc = tl.dot(keys, tl.trans(queries), acc, input_precision=PRECISION)
    return acc


_COMPILED = triton is not None and isinstance(_score_packed, triton.JITFunction)
"""Not by Triton's interpreter, which knows no PTX. Found out here, since torch.compile cannot follow the question."""
