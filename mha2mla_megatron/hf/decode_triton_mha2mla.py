"""Flash decoding over a latent cache in Triton: the cache is read from memory once for all heads of a tile.

In the absorbed form every head attends over the same rows, [rotated keys of all groups | unrotated part]: the rotated
and the key columns score, the value columns are averaged. Keys and values share their columns (joint) or have their
own (split, and what is not factored). A query is zero in the rotated columns of other groups; those columns are loaded
anyway, for the heads of those groups, and multiplied for all.

Matrix instructions want 64 rows or more of their first operand, and a decode step has few query rows. So cached rows
and their columns, of which there are many, are the long sides of all products: scores^T = keys queries^T and
context^T = values^T weights^T.

Two kernels. `_score_rows`, a plain product that streams columns, writes float32 scores, with the mask in them.
`_average_rows` is flash decoding over the values. Columns of their own are read once: keys by the first kernel, values
by the second. Shared ones are scored and averaged by the second from one tile in shared memory; where they are too wide
for that, the first kernel scores them too, and they are read twice.

Layers of one model may differ in all widths, and a cache grows, so widths, strides and lengths are arguments, not
constants, and what is compiled for one layer serves the others: a kernel takes half a second to compile, and constants
would make it 30 layers times the kernels. What the compiler has to know is how many columns a load may move at once:
widths and strides come as multiples of that constant. Multiples of 128, of which a model has few, are constants still:
a width that fills its tiles saves masks and registers.

(Rotated columns scored in the second kernel would save the scores' way through memory, a tenth of a row, but two chains
of matrix instructions in its loop read wrong addresses with Triton 3.6.)

Shape letters: b batch, m query rows per sequence (heads x new tokens), t cached rows, g rotated columns (G r), w width
of the unrotated part, k and v widths of its key and value columns.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for the CPU
    triton = tl = None

LOG2_E = 1.4426950408889634
PRECISIONS = {torch.bfloat16: "ieee", torch.float16: "ieee", torch.float32: "tf32x3"}
"""Types of the cache, and how Triton multiplies them: 16-bit products are exact in float32."""


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut."""

    block_m: int
    """Query rows of a program."""
    block_n: int
    """Cached rows of one step."""
    block_c: int
    """Value columns whose average a program computes."""
    scores_values: bool
    """Whether the averaging kernel scores the columns that it averages; the kernel before it does otherwise."""
    warps: int
    stages: int
    splits: int
    """Programs that share the cached rows of a sequence."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _jit_for_any(*sizes: str) -> Any:
    """`_jit`, compiled once for all values of the integers of these names."""
    return lambda function: function if triton is None else triton.jit(function, do_not_specialize=sizes)


def _vector(most: int, *sizes: int) -> int:
    """Columns that a load may move at once: a power of two, at most `most`, that divides these widths and strides."""
    return math.gcd(most, *sizes)


def _constant(size: int) -> int:
    """The width, if the kernels are to have it as a constant, or 0."""
    return size if size % 128 == 0 else 0


def _row_layout(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [b, t, w] with contiguous rows at equal distances; rows from one sequence to the next, and elements from one
    row to the next."""
    if x.stride(2) != 1 or x.stride(1) < 1 or x.stride(0) % x.stride(1):
        x = x.contiguous()
    row = max(1, x.stride(1))  # 0 in some tensors without numbers
    return x, x.stride(0) // row, row


def has_triton(x: torch.Tensor) -> bool:
    """Whether the kernel can read x: a 16- or 32-bit float on an NVIDIA GPU, Ampere or newer, with Triton installed."""
    return (
        triton is not None
        and x.is_cuda
        and torch.version.hip is None
        and x.dtype in PRECISIONS
        and _is_ampere_or_newer(x.device.index)
    )


@torch.compiler.assume_constant_result
def _is_ampere_or_newer(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def choose_tiles(
    batch: int, m: int, t: int, v: int, shared: bool, element_size: int, multiprocessors: int, shared_memory: int
) -> Tiles:
    """The tiles for these shapes on a GPU with this many multiprocessors, each with these bytes of shared memory.

    shared: whether the value columns are the key columns too.
    """
    widest, rows = _power_of_2(max(16, v)), _power_of_2(max(16, m))
    cuts = [
        # A thread keeps at most 128 registers of the context, float32.
        Tiles(block_m, 64, block_c, scores_values, 4 if block_c * block_m <= 128 * 128 else 8, stages, 1)
        for block_m in (64, 32, 16)
        for scores_values, block_c in ((True, widest), (False, min(widest, 256)), (False, 64))
        # Of rows that are averaged alone a fourth stage does not pay (H200: 0.83 of a copy's rate, with three 0.86).
        for stages in ((4, 3, 2) if scores_values else (3, 2))
        if block_m <= rows and block_c * block_m <= 128 * 256 and (shared or not scores_values)
    ]
    cuts.append(Tiles(16, 64, 16, False, 4, 1, 1))
    tiles = next(cut for cut in cuts if cut == cuts[-1] or _shared_bytes(cut, element_size) <= shared_memory)
    programs = batch * -(-m // tiles.block_m) * -(-v // tiles.block_c)
    # Registers hold two programs of 4 warps; so many run at once.
    resident = multiprocessors * max(1, min(8 // tiles.warps, shared_memory // _shared_bytes(tiles, element_size)))

    def cost(splits: int) -> float:
        """Time of all programs in rows: full rounds of resident ones, each with its rows and what it starts with."""
        return -(-programs * splits // resident) * (-(-t // splits) + 128)

    most = max(1, min(-(-t // 64), 128))
    return replace(tiles, splits=min(range(1, most + 1), key=cost))


def _shared_bytes(tiles: Tiles, element_size: int) -> int:
    """Shared memory that Triton 3.6 gives the averaging kernel for Hopper: stages of cached rows, the query, weights,
    and scores on their way in or between two layouts."""
    query = tiles.block_m * tiles.block_c if tiles.scores_values else 0
    scores = tiles.block_m * tiles.block_n
    rows = tiles.stages * tiles.block_n * tiles.block_c
    return (rows + query + scores) * element_size + 4 * scores * max(1, tiles.stages - 1)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@torch.compiler.assume_constant_result
def device_limits(device: int | None) -> tuple[int, int]:
    """Multiprocessors of a GPU and the shared memory of each; an H100's where there is none (Triton's interpreter)."""
    if not torch.cuda.is_available():
        return 132, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def visible_bounds(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """First and one past the last visible row of each sequence, int32 [b, 2], from a bool mask [1 or b, 1, s, t].

    Stays on the device, so that a CUDA graph skips the empty end of a static cache and left padding at every replay.
    """
    visible, t = mask.any(dim=2).squeeze(1), mask.shape[-1]
    position = torch.arange(t, device=mask.device, dtype=torch.int32)
    stop = torch.where(visible, position + 1, 0).amax(dim=-1)
    start = torch.where(visible, position, t).amin(dim=-1)
    return torch.stack((torch.minimum(start, stop), stop), dim=-1).to(torch.int32).expand(batch, 2).contiguous()


def flash_decode(
    q_rope: torch.Tensor,
    q_key: torch.Tensor,
    k_rope: torch.Tensor,
    unrotated: torch.Tensor,
    keys: slice,
    values: slice,
    mask: torch.Tensor | None,
    scaling: float,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Attention over cached rows [k_rope | unrotated].

    q_rope [b, H, s, g], q_key [b, H, s, k], k_rope [b, t, g] and unrotated [b, t, w] of one type: bfloat16, float16 or
    float32 (as sums of three tf32 products). keys, values: columns of the unrotated part, the same ones or others; keys
    may be none. mask: None (every token sees every row) or bool [1 or b, 1, s, t].
    Returns the averaged value columns [b, H, s, v] in that type, 0 where a token sees no row; scores and sums are
    float32. Works in 4 b H s t bytes for the scores, and 4 b H s v for each split.
    """
    batch, heads, length, k = q_key.shape
    m, t, g, v = heads * length, unrotated.shape[1], k_rope.shape[-1], values.stop - values.start
    q_rope, q_key = q_rope.reshape(batch, m, g).contiguous(), q_key.reshape(batch, m, k).contiguous()
    k_rope, rope_rows, rope_row = _row_layout(k_rope)
    unrotated, rows, row = _row_layout(unrotated)
    device, element_size = unrotated.device, unrotated.element_size()
    if tiles is None:
        tiles = choose_tiles(batch, m, t, v, keys == values, element_size, *device_limits(device.index))
    v_tiles, v_block = -(-v // tiles.block_c), min(1024, _power_of_2(v))
    block_m, precision = min(64, _power_of_2(max(16, m))), PRECISIONS[unrotated.dtype]
    rope_vector, vector = _vector(8, g, rope_row), _vector(8, k, v, row)
    scores = torch.empty(batch, t, m, dtype=torch.float32, device=device)
    partial = torch.empty(batch, tiles.splits, m, v, dtype=torch.float32, device=device)
    logsumexp = torch.empty(batch, tiles.splits, m, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, length, v, dtype=unrotated.dtype, device=device)
    bounds = unrotated  # not read where there is no mask
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        bounds = visible_bounds(mask, batch)
    mask_strides = (0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if mask is None else mask.stride(2))
    # Triton launches on the current device, which is not always the tensors' (a compiled graph sees to that itself).
    guard = torch.cuda.device(device) if unrotated.is_cuda and not torch.compiler.is_compiling() else nullcontext()
    with guard:
        _score_rows[(-(-t // 128), -(-m // block_m), batch)](
            q_rope, q_key, k_rope, unrotated[..., keys], unrotated if mask is None else mask, bounds, scores,
            rope_rows, rope_row // rope_vector, rows, row // vector, *mask_strides, m, length, t, g // rope_vector,
            k // vector, ROPE_VECTOR=rope_vector, VECTOR=vector, G=_constant(g), K=_constant(k), HAS_ROPE=g > 0,
            HAS_KEYS=k > 0 and not tiles.scores_values, HAS_MASK=mask is not None, ONE_QUERY=length == 1,
            PRECISION=precision, BLOCK_M=block_m, BLOCK_N=128, BLOCK_K=128 // element_size, STAGES=4, num_warps=4,
            num_stages=4,
        )  # fmt: skip
        _average_rows[(v_tiles * -(-m // tiles.block_m), tiles.splits, batch)](
            q_key, unrotated[..., values], bounds, scores, partial, logsumexp, rows, row // vector, m, t, v // vector,
            scaling * LOG2_E, VECTOR=vector, V=_constant(v), HAS_BOUNDS=mask is not None,
            SCORES_VALUES=tiles.scores_values, PRECISION=precision, BLOCK_C=tiles.block_c, BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        _combine_splits[(batch * m, -(-v // v_block))](
            partial, logsumexp, out, m, tiles.splits, v // vector, VECTOR=vector, BLOCK_C=v_block
        )
    return out


@_jit_for_any("rope_rows", "rope_row", "rows", "row", "mask_batch", "mask_query", "queries", "t", "g", "k")
def _score_rows(
    q_rope, q_key, k_rope, keys, mask, bounds, scores, rope_rows, rope_row, rows, row, mask_batch, mask_query,
    m, queries, t, g, k,
    ROPE_VECTOR: tl.constexpr, VECTOR: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, ONE_QUERY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores [b, t, m] of BLOCK_N rows over g rotated columns and k others, -inf where a query does not see the row;
    not yet scaled."""
    g, k = G if G > 0 else g * ROPE_VECTOR, K if K > 0 else k * VECTOR
    rope_row, row = rope_row * ROPE_VECTOR, row * VECTOR
    batch, n = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_N
    begin, end = 0, t
    if HAS_MASK:
        begin, end = tl.load(bounds + 2 * batch), tl.load(bounds + 2 * batch + 1)
    if (n < end) & (n + BLOCK_N > begin):
        rows_n = n + tl.arange(0, BLOCK_N)
        rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if HAS_ROPE:
            acc = _add_product(
                acc, q_rope + batch * m * g, k_rope + batch * rope_rows * rope_row, rope_row, rows_n, rows_m, end, m, g,
                BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
        if HAS_KEYS:
            acc = _add_product(
                acc, q_key + batch * m * k, keys + batch * rows * row, row, rows_n, rows_m, end, m, k, BLOCK_K,
                PRECISION, STAGES,
            )  # fmt: skip
        inside = (rows_n < end)[:, None] & (rows_m < m)[None, :]
        if HAS_MASK and ONE_QUERY:
            seen = tl.load(mask + batch * mask_batch + rows_n, mask=rows_n < end, other=0).to(tl.int1)
            acc = tl.where(seen[:, None], acc, float("-inf"))
        elif HAS_MASK:
            at = mask + batch * mask_batch + (rows_m % queries)[None, :] * mask_query + rows_n[:, None]
            acc = tl.where(tl.load(at, mask=inside, other=0).to(tl.int1), acc, float("-inf"))
        tl.store(scores + batch * t * m + rows_n[:, None] * m + rows_m[None, :], acc, mask=inside)


@_jit
def _add_product(
    acc, query, key, key_row, rows_n, rows_m, end, m, columns,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus key rows times query rows, over all columns."""
    for k in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        column = k + tl.arange(0, BLOCK_K)
        keys = _load_rows(key, key_row, rows_n, end, column, columns)
        queries = _load_rows(query, columns, rows_m, m, column, columns)
        acc = tl.dot(keys, tl.trans(queries), acc, input_precision=PRECISION)
    return acc


@_jit
def _load_rows(pointer, stride, rows, end, column, columns):
    mask = (rows < end)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@_jit_for_any("rows", "row", "t", "v")
def _average_rows(
    q_values, values, bounds, scores, context, logsumexp, rows, row, m, t, v, scale,
    VECTOR: tl.constexpr, V: tl.constexpr, HAS_BOUNDS: tl.constexpr, SCORES_VALUES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Context over one split of one sequence's rows, for BLOCK_M query rows and BLOCK_C of v value columns."""
    v, row = V if V > 0 else v * VECTOR, row * VECTOR
    v_tiles = tl.cdiv(v, BLOCK_C)
    tile, split, batch = tl.program_id(0) % v_tiles, tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows_m = (tl.program_id(0) // v_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = (rows_m < m)[None, :]
    begin, end = 0, t
    if HAS_BOUNDS:
        begin, end = tl.load(bounds + 2 * batch), tl.load(bounds + 2 * batch + 1)
    scale = tl.cast(scale, tl.float32)  # torch.compile passes 64 bits
    # Splits are whole blocks, of the rows that a sequence has and not of those that the cache could hold.
    length = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin += split * length
    end = tl.minimum(end, begin + length)

    scores += batch * t * m
    values += batch * rows * row
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if SCORES_VALUES:
        q = tl.trans(_load_rows(q_values + batch * m * v, v, rows_m, m, column, v))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows_n = n + tl.arange(0, BLOCK_N)
        cached = _load_rows(values, row, rows_n, end, column, v)
        at = scores + rows_n[:, None] * m + rows_m[None, :]
        part = tl.load(at, mask=(rows_n < end)[:, None] & valid_m, other=float("-inf"))
        if SCORES_VALUES:
            part = tl.dot(cached, q, part, input_precision=PRECISION)
        acc, top, total = _fold_rows(cached, part * scale, acc, top, total, PRECISION)
    first = (batch * tl.num_programs(1) + split) * m
    _store_split(context, logsumexp, acc, top, total, first, rows_m, column, m, tile == 0, v)


@_jit
def _fold_rows(values, part, acc, top, total, PRECISION: tl.constexpr):
    """One step of the online softmax: acc [BLOCK_C, BLOCK_M], its largest score and its sum of weights, [BLOCK_M], with
    values [BLOCK_N, BLOCK_C] of scores part [BLOCK_N, BLOCK_M], in units of log 2, added."""
    new_top = tl.maximum(top, tl.max(part, axis=0))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible row so far
    weights = tl.exp2(part - safe_top[None, :])
    decay = tl.exp2(top - safe_top)
    total = total * decay + tl.sum(weights, axis=0)
    acc = tl.dot(tl.trans(values), weights.to(values.dtype), acc * decay[None, :], input_precision=PRECISION)
    return acc, new_top, total


@_jit
def _store_split(context, logsumexp, acc, top, total, first, rows_m, column, m, first_tile, c):
    """A split's context of c columns and, from the first tile of columns, the log of its sum of weights."""
    seen, valid_m = total > 0, rows_m < m
    acc = acc / tl.where(seen, total, 1.0)[None, :]
    at = context + (first + rows_m[None, :]) * c + column[:, None]
    tl.store(at, acc, mask=valid_m[None, :] & (column < c)[:, None])
    if first_tile:
        weight = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(logsumexp + first + rows_m, weight, mask=valid_m)


@_jit_for_any("m", "splits", "c")
def _combine_splits(partial, logsumexp, out, m, splits, c, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """The splits' contexts of c columns, each weighted by its share of the softmax."""
    c = c * VECTOR
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (row // m) * splits * m + row % m
    top, total, acc = float("-inf"), 0.0, tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        at = first + split * m
        score = tl.load(logsumexp + at)
        new_top = tl.maximum(top, score)
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp2(score - safe_top), tl.exp2(top - safe_top)
        acc = acc * decay + weight * tl.load(partial + at * c + column, mask=column < c, other=0.0)
        total = total * decay + weight
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * c + column, acc.to(out.dtype.element_ty), mask=column < c)
