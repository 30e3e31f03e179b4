"""Flash decoding over a joint latent cache in Triton: the cache is read from memory once for all heads of a tile.

In the absorbed form every head attends over the same rows, [rotated keys of all groups | latent]: keys are the whole
row, values its latent. A query is zero in the rotated columns of other groups; those columns are loaded anyway, for
the heads of those groups, and multiplied for all.

Shape letters: b batch, m query rows per sequence (heads x new tokens), t cached rows, g rotated columns (G r), c latent
width.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
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
    """Latent columns whose average a program computes; it scores the others in a slower loop."""
    block_g: int
    """Rotated columns kept in registers like the latent's; 0: scored in the slower loop."""
    warps: int
    stages: int
    splits: int
    """Programs that share the cached rows of a sequence."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


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
    batch: int, m: int, t: int, g: int, c: int, element_size: int, multiprocessors: int, shared_memory: int
) -> Tiles:
    """The tiles for these shapes on a GPU with this many multiprocessors, each with these bytes of shared memory."""
    warps = 4 if c <= 256 else 8
    block_c = min(2048 if element_size == 2 else 512, max(16 * warps, _power_of_2(c)))
    block_g = max(16 * warps, _power_of_2(g)) if 0 < g <= 512 * 2 // element_size else 0
    # A thread holds its share of the context (float32) and of the query in at most 255 registers.
    context_rows = 128 * 32 * warps // block_c
    block_m = min(max(16, _power_of_2(m)), max(16, context_rows if element_size == 2 else 16), 64)

    def fits(block_n: int, stages: int) -> bool:
        return block_m * block_n <= 1024 and shared_memory >= _shared_bytes(
            Tiles(block_m, block_n, block_c, block_g, warps, stages, 1), g, c, element_size
        )

    # Three stages load the next rows while these are used. Where not even 16 rows fit, the cache is read more often (by
    # more programs with fewer query rows), or columns are read in loops.
    cuts = ((64, 3), (32, 3), (16, 3), (16, 2), (16, 1))
    while not any(fits(*cut) for cut in cuts) and (block_g > 0 or block_c > 16 * warps):
        if block_m > 16:
            block_m //= 2
        elif block_g >= block_c:
            block_g = 0
        else:
            block_c //= 2
    block_n, stages = next((cut for cut in cuts if fits(*cut)), cuts[-1])
    programs = batch * -(-m // block_m) * -(-c // block_c)
    # Every multiprocessor gets a program; more splits than that have 1024 rows each, so that partial results, float32
    # and c wide for every query row, stay small beside the rows.
    splits = max(-(-multiprocessors // programs), min(-(-4 * multiprocessors // programs), t // 1024))
    return Tiles(block_m, block_n, block_c, block_g, warps, stages, min(splits, -(-t // 64)))


def _shared_bytes(tiles: Tiles, g: int, c: int, element_size: int) -> int:
    """An upper bound of the shared memory that Triton 3.6 gives the kernel: the query, a buffer of rows for every stage
    but one (float32: for every one), and the scores between warps; more where columns are read in loops."""
    row_buffers = max(1, tiles.stages - 1) if element_size == 2 else max(2, tiles.stages)
    buffers = tiles.block_m + row_buffers * tiles.block_n
    scores = 4 * tiles.warps * tiles.block_m * tiles.block_n
    loops = tiles.block_c < c or tiles.block_g < g
    columns = (tiles.block_c + tiles.block_g) * element_size
    return buffers * columns + scores * (2 if loops or tiles.stages == 1 else 1) + (16384 if loops else 0)


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
    q_latent: torch.Tensor,
    k_rope: torch.Tensor,
    latent: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Attention over cached rows [k_rope | latent] whose values are the latent.

    q_rope [b, H, s, g], q_latent [b, H, s, c], k_rope [b, t, g] and latent [b, t, c] of one type: bfloat16, float16 or
    float32 (as sums of three tf32 products). mask: None (every token sees every row) or bool [1 or b, 1, s, t].
    Returns the averaged latents [b, H, s, c] in that type, 0 where a token sees no row; scores and sums are float32.
    """
    batch, heads, length, c = q_latent.shape
    m, t, g = heads * length, latent.shape[1], k_rope.shape[-1]
    q_rope, q_latent = q_rope.reshape(batch, m, g).contiguous(), q_latent.reshape(batch, m, c).contiguous()
    k_rope, latent = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_rope, latent))
    if tiles is None:
        tiles = choose_tiles(batch, m, t, g, c, latent.element_size(), *device_limits(latent.device.index))
    c_tiles, c_block = -(-c // tiles.block_c), min(1024, _power_of_2(c))
    partial = torch.empty(batch, tiles.splits, m, c, dtype=torch.float32, device=latent.device)
    logsumexp = torch.empty(batch, tiles.splits, m, dtype=torch.float32, device=latent.device)
    out = torch.empty(batch, heads, length, c, dtype=latent.dtype, device=latent.device)
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    # Triton launches on the current device, which is not always the tensors' (a compiled graph sees to that itself).
    guard = torch.cuda.device(latent.device) if latent.is_cuda and not torch.compiler.is_compiling() else nullcontext()
    with guard:
        _attend_rows[(c_tiles * -(-m // tiles.block_m), tiles.splits, batch)](
            q_rope, q_latent, k_rope, latent,
            latent if mask is None else mask, latent if mask is None else visible_bounds(mask, batch),
            partial, logsumexp,
            k_rope.stride(0), k_rope.stride(1), latent.stride(0), latent.stride(1),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if mask is None else mask.stride(2),
            m, length, t, scaling * LOG2_E,
            G=g, C=c, C_TILES=c_tiles, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_C=tiles.block_c,
            BLOCK_G=tiles.block_g, BLOCK_K=64, PARTS=tiles.warps, HAS_MASK=mask is not None,
            PRECISION=PRECISIONS[latent.dtype], STAGES=tiles.stages, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        _combine_splits[(batch * m, -(-c // c_block))](partial, logsumexp, out, m, tiles.splits, C=c, BLOCK_C=c_block)
    return out


@_jit
def _attend_rows(
    q_rope, q_latent, k_rope, latent, mask, bounds, context, logsumexp,
    k_rope_batch, k_rope_row, latent_batch, latent_row, mask_batch, mask_query, m, queries, t, scale,
    G: tl.constexpr, C: tl.constexpr, C_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Context over one split of one sequence's rows, for BLOCK_M query rows and BLOCK_C latent columns.

    A tile's columns are PARTS parts, one per warp, as the batch dim of a 3-D dot: each warp keeps its part of the query
    and of the context in its registers, and only [BLOCK_M, BLOCK_N] scores are summed across warps. (A 2-D dot with so
    few query rows would have all warps repeat the same work.)
    """
    tile, split, batch = tl.program_id(0) % C_TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows_m = (tl.program_id(0) // C_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = rows_m < m
    begin, end = 0, t
    if HAS_MASK:
        begin, end = tl.load(bounds + 2 * batch), tl.load(bounds + 2 * batch + 1)
    # Splits are whole blocks, of the rows that a sequence has and not of those that the cache could hold.
    length = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    begin += split * length
    end = tl.minimum(end, begin + length)

    q_rope += batch * m * G
    q_latent += batch * m * C
    k_rope += batch * k_rope_batch
    latent += batch * latent_batch
    part, m3, n3 = tl.arange(0, PARTS)[:, None, None], rows_m[None, :, None], tl.arange(0, BLOCK_N)[None, :, None]
    column = tile * BLOCK_C + part * (BLOCK_C // PARTS) + tl.arange(0, BLOCK_C // PARTS)[None, None, :]
    q = tl.load(q_latent + m3 * C + column, mask=(m3 < m) & (column < C), other=0.0)
    if BLOCK_G > 0:
        rope_column = part * (BLOCK_G // PARTS) + tl.arange(0, BLOCK_G // PARTS)[None, None, :]
        q_turned = tl.load(q_rope + m3 * G + rope_column, mask=(m3 < m) & (rope_column < G), other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([PARTS, BLOCK_M, BLOCK_C // PARTS], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        row3 = n + n3
        values = tl.load(latent + row3 * latent_row + column, mask=(row3 < end) & (column < C), other=0.0)
        parts = tl.dot(q, tl.permute(values, (0, 2, 1)), input_precision=PRECISION)
        if BLOCK_G > 0:
            keys = tl.load(k_rope + row3 * k_rope_row + rope_column, mask=(row3 < end) & (rope_column < G), other=0.0)
            parts = tl.dot(q_turned, tl.permute(keys, (0, 2, 1)), parts, input_precision=PRECISION)
        scores = tl.sum(parts, axis=0)
        rows_n = n + tl.arange(0, BLOCK_N)
        if G > 0 and BLOCK_G == 0:
            scores = _add_scores(
                scores, q_rope, k_rope, k_rope_row, rows_m, valid_m, rows_n, end, 0, 0, G, BLOCK_K, PRECISION
            )
        if C_TILES > 1:
            skip = tile * BLOCK_C
            scores = _add_scores(
                scores, q_latent, latent, latent_row, rows_m, valid_m, rows_n, end, skip, skip + BLOCK_C, C, BLOCK_K,
                PRECISION,
            )  # fmt: skip
        visible = valid_m[:, None] & (rows_n < end)[None, :]
        if HAS_MASK and queries == 1:
            seen_n = tl.load(mask + batch * mask_batch + rows_n, mask=rows_n < end, other=0).to(tl.int1)
            visible = valid_m[:, None] & seen_n[None, :]
        elif HAS_MASK:
            at = mask + batch * mask_batch + (rows_m % queries)[:, None] * mask_query + rows_n[None, :]
            visible = tl.load(at, mask=visible, other=0).to(tl.int1)
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible row so far
        weights = tl.exp2(scores - safe_top[:, None])
        decay = tl.exp2(top - safe_top)
        total = total * decay + tl.sum(weights, axis=1)
        weights = tl.broadcast_to(weights.to(values.dtype)[None, :, :], (PARTS, BLOCK_M, BLOCK_N))
        acc = tl.dot(weights, values, acc * decay[None, :, None], input_precision=PRECISION)
        top = new_top

    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[None, :, None]
    row = (batch * tl.num_programs(1) + split) * m
    tl.store(context + (row + m3) * C + column, acc, mask=(m3 < m) & (column < C))
    if tile == 0:
        tl.store(
            logsumexp + row + rows_m,
            tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf")),
            mask=valid_m,
        )


@_jit
def _add_scores(
    scores, query, key, key_row, rows_m, valid_m, rows_n, end, skip_begin, skip_end,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [BLOCK_M, BLOCK_N] plus those of columns outside [skip_begin, skip_end), read in a loop."""
    for k in range(0, COLUMNS, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        wanted = (column < COLUMNS) & ((column < skip_begin) | (column >= skip_end))
        q = tl.load(
            query + rows_m[:, None] * COLUMNS + column[None, :], mask=valid_m[:, None] & wanted[None, :], other=0.0
        )
        keys = tl.load(
            key + rows_n[None, :] * key_row + column[:, None], mask=(rows_n < end)[None, :] & wanted[:, None], other=0.0
        )
        scores = tl.dot(q, keys, scores, input_precision=PRECISION)
    return scores


@_jit
def _combine_splits(partial, logsumexp, out, m, splits, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The splits' contexts, each weighted by its share of the softmax."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (row // m) * splits * m + row % m
    top, total, acc = float("-inf"), 0.0, tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        at = first + split * m
        score = tl.load(logsumexp + at)
        new_top = tl.maximum(top, score)
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp2(score - safe_top), tl.exp2(top - safe_top)
        acc = acc * decay + weight * tl.load(partial + at * C + column, mask=column < C, other=0.0)
        total = total * decay + weight
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * C + column, acc.to(out.dtype.element_ty), mask=column < C)
