"""Random shapes for the packed cache's kernels against float64 arithmetic on its bytes.

    python -m tests.packed_kernel_cases COUNT SEED
    python -m tests.packed_kernel_cases model

On a GPU large shapes; with TRITON_INTERPRET=1 small ones, on the CPU, in a process of its own as decode_kernel_cases.
`model`: a whole model over the cache, with the kernels and without.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch

from tests.decode_kernel_cases import patch_interpreter, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    patch_interpreter()

from mha2mla_megatron.hf.decode_packed_mha2mla import PackedTiles, flash_decode_packed  # noqa: E402
from mha2mla_megatron.hf.packed_tokens_mha2mla import PackedTokens  # noqa: E402
from mha2mla_megatron.hf.quantise_triton_mha2mla import append_token, can_append  # noqa: E402

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""Largest error relative to the largest value. In 16 bits a dequantised number is rounded to float16, too, and a query
to it: two roundings more than the kernel over rows."""


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    rope_columns: int
    width: int
    keys: tuple[int, int]
    """First column and one past the last that are scored."""
    values: tuple[int, int]
    tokens: int
    """With the new one."""
    capacity: int
    nbits: int
    rope_nbits: int
    group_size: int
    residual_length: int
    dtype: torch.dtype
    mask: str
    """none, random, or padding (on the left, and an empty end)."""
    tiles: PackedTiles | None = None


def random_case(rng: random.Random) -> Case:
    """Widths that are no power of two, one head, one token and one group of heads among them."""
    groups, r = rng.choice((1, 2, 3, 8)), rng.choice((0, 2, 6, 8, 16, 50, 128))
    most = 200 if INTERPRETED else 4096
    c = rng.choice((16, 17, 24, 64, 96, 100, 180, *(() if INTERPRETED else (256, 512, 768, 1000, 1536, 2048, 4096))))
    nope = rng.choice((8, 24, 40))  # a part that is not factored
    keys, values, width = rng.choice(
        (((0, c), (0, c), c), ((0, c), (0, c), c), ((0, c), (c, 2 * c), 2 * c), ((0, c), (c, c + nope), c + nope),
         ((c, c + nope), (0, c), c + nope))
    )  # fmt: skip
    capacity = rng.choice((1, 40, 99, 130, 200)) if INTERPRETED else rng.randint(1, 4000)
    dtype = rng.choice([torch.float32, torch.float16] if INTERPRETED else list(TOLERANCES))  # no bfloat16 there
    tiles = None
    block_c = min(max(16, 1 << (c - 1).bit_length()), 256)
    if rng.random() < 0.4:
        tiles = PackedTiles(
            16, rng.choice((64, 128)), rng.choice((32, block_c)), rng.choice((4, 8)), rng.choice((1, 2, 3)),
            rng.choice((1, 2, 5)), rng.choice((64, 128)), rng.choice((64, 128)), 4, 2,
        )  # fmt: skip
    return Case(
        batch=rng.choice((1, 2, 3)),
        heads=groups * rng.choice((1, 1, 3, 4)),
        rope_columns=min(groups * r, most),
        width=width,
        keys=keys,
        values=values,
        tokens=rng.choice((1, capacity, rng.randint(1, capacity), rng.randint(1, capacity))),
        capacity=capacity,
        nbits=rng.choice((2, 4, 4, 8)),
        rope_nbits=rng.choice((2, 4, 4, 8, 16)),
        group_size=rng.choice((4, 16, 32, 32, 64, 128)),
        residual_length=rng.choice((0, 5, 64)),
        dtype=dtype,
        mask=rng.choice(("none", "random", "padding")),
        tiles=tiles,
    )


def read_bytes(part: PackedTokens, tokens: int) -> torch.Tensor:
    """What attention sees of all tokens but the newest's own step, float64 [b, tokens, w], from the bytes."""
    packed = max(0, (tokens - 1 - part.residual_length) // part.group_size) * part.group_size
    rows = []
    for token in range(tokens):
        group, at = divmod(token, part.group_size)
        if token >= packed:
            rows.append(part.window[:, token % part.window.shape[1]].double())
        elif part.nbits == 16:
            rows.append(part.codes[:, group, at].double())
        else:
            per_byte = 8 // part.nbits
            code = part.codes[:, group, at // per_byte].int() >> (at % per_byte * part.nbits) & (2**part.nbits - 1)
            rows.append(part.zero[:, group, 0].double() + part.scale[:, group, 0].double() * code)
    return torch.stack(rows, dim=1)


def fill(case: Case, device: str) -> tuple[PackedTokens, PackedTokens, torch.Tensor]:
    """Rotated keys and unrotated part of a cache that was filled in two pieces, the last few tokens one by one."""
    single = min(case.tokens, 3)
    parts = []
    for width, nbits in ((case.rope_columns, case.rope_nbits), (case.width, case.nbits)):
        spread = torch.logspace(-1, 1, max(width, 1), device=device)[:width]
        rows = (torch.randn(case.batch, case.tokens, width, device=device) * spread + 0.3).to(case.dtype)
        part = PackedTokens(rows, case.capacity, nbits, case.group_size, case.residual_length)
        count, middle = torch.tensor(0, device=device), (case.tokens - single) // 2
        for start, stop in ((0, middle), (middle, case.tokens - single)):
            if stop > start:
                part.append(rows[:, start:stop], count)
                count = count + stop - start
        for token in range(case.tokens - single, case.tokens):
            append(part, rows[:, token : token + 1], count)
            count = count + 1
        parts.append(part)
    return parts[0], parts[1], count


def append(part: PackedTokens, row: torch.Tensor, count: torch.Tensor) -> None:
    """With the kernel in the interpreter, too; there, compared with torch."""
    if not INTERPRETED or part.width == 0:
        part.append(row, count)
        return
    other = PackedTokens(row, part.capacity, part.nbits, part.group_size, part.residual_length)
    for to, tensor in zip(other.tensors, part.tensors, strict=True):
        to.copy_(tensor)
    append_token(part, row, count)
    other.append(row, count)
    assert torch.equal(part.window, other.window)
    for mine, torchs in zip(part.tensors[:3], other.tensors[:3], strict=True):
        # Sums in another order move a grid by a rounding of float16, and now and then a code.
        off = (mine.float() - torchs.float()).abs() > 2e-3 * torchs.float().abs() + 1e-6
        assert off.float().mean() <= 0.02 if off.numel() else True


def check(case: Case, device: str) -> float:
    """The kernel's error, relative to the largest value."""
    rope, unrotated, count = fill(case, device)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(case.batch, case.heads, 1, columns, device=device).to(case.dtype)

    keys, values = slice(*case.keys), slice(*case.values)
    q_rope, q_key = normal(case.rope_columns), normal(keys.stop - keys.start)
    scaling = (case.rope_columns + keys.stop - keys.start) ** -0.5 / 3
    seen = torch.ones(case.batch, 1, 1, case.capacity, dtype=torch.bool, device=device)
    seen[..., case.tokens :] = False
    if case.mask == "random":
        seen &= torch.rand(seen.shape, device=device) > 0.5
        seen[0] = False  # a sequence that sees nothing
    elif case.mask == "padding":
        first = torch.randint(0, case.tokens, (case.batch, 1, 1, 1), device=device)
        seen &= torch.arange(case.capacity, device=device) >= first
    mask = None if case.mask == "none" else seen
    k_rope, rows = read_bytes(rope, case.tokens), read_bytes(unrotated, case.tokens)
    scores = q_rope[:, :, 0].double() @ k_rope.mT + q_key[:, :, 0].double() @ rows[..., keys].mT
    scores = (scores * scaling).masked_fill(~seen[:, 0, :, : case.tokens], -torch.inf)
    exact = scores.softmax(-1).nan_to_num(0) @ rows[..., values]
    out = flash_decode_packed(q_rope, q_key, rope, unrotated, keys, values, count, mask, scaling, tiles=case.tiles)
    return relative_error(out[:, :, 0], exact)


EDGES = [
    Case(1, 1, 0, 16, (0, 16), (0, 16), 1, 1, 4, 4, 32, 64, torch.float32, "none"),
    Case(1, 1, 2, 16, (0, 16), (0, 16), 1, 200, 2, 4, 32, 64, torch.float16, "padding"),
    Case(2, 4, 8, 40, (0, 40), (0, 40), 200, 200, 2, 16, 32, 0, torch.float16, "none"),
]


def compare(count: int, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for case in EDGES + [random_case(rng) for _ in range(count - len(EDGES))]:
        error = check(case, "cpu" if INTERPRETED else "cuda")
        if not error < TOLERANCES[case.dtype]:
            raise SystemExit(f"error {error:.2e} in {case}")
    print(f"{count} cases")


def compare_models() -> None:
    """Logits with the kernels, in place of a GPU in the interpreter, against the dynamic cache and torch."""
    from mha2mla_megatron.hf import decode_mha2mla, packed_tokens_mha2mla
    from tests.test_latent_cache import RANKS, TOKENS, decoded, make_model

    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0  # a whole group: what padding tokens hold depends on the cache's length, and sets the group's grid
    settings: dict[str, Any] = {"nbits": 4, "group_size": 4, "residual_length": 2}
    calls = []

    def packed(*args: Any) -> torch.Tensor:
        calls.append(args)
        return flash_decode_packed(*args)

    for method in RANKS:
        model = make_model(method, [0, 16, 6])
        expected = decoded(model, "absorbed", model.latent_cache(**settings), mask)
        kept = decode_mha2mla.has_triton, packed_tokens_mha2mla.can_append, decode_mha2mla.flash_decode_packed
        decode_mha2mla.has_triton = lambda x: x.shape[1] == 1  # several new tokens stay with torch
        packed_tokens_mha2mla.can_append = lambda tokens, new: tokens.width > 0
        decode_mha2mla.flash_decode_packed = packed
        logits = decoded(model, "absorbed", model.static_latent_cache(13, **settings), mask)
        decode_mha2mla.has_triton, packed_tokens_mha2mla.can_append, decode_mha2mla.flash_decode_packed = kept
        error = (logits - expected)[mask.bool()].abs().max().item()
        if not (error < 1e-4 and len(calls) == 9):  # three layers, three pieces of one token
            raise SystemExit(f"{method}: logits differ by {error:.2e} after {len(calls)} calls of the kernel")
        calls.clear()
    assert not can_append(PackedTokens(torch.zeros(1, 1, 4), 8, 4, 4, 0), torch.zeros(1, 1, 4))
    print(f"{len(RANKS)} models")


if __name__ == "__main__":
    compare_models() if sys.argv[1] == "model" else compare(int(sys.argv[1]), int(sys.argv[2]))
