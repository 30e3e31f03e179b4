"""Random shapes for the decode kernel against attention in float64.

    python -m tests.decode_kernel_cases COUNT SEED
    python -m tests.decode_kernel_cases model        small models of every method, in the interpreter

On a GPU large shapes; with TRITON_INTERPRET=1 small ones, on the CPU. A process of its own, because the interpreter has
to be asked for before Triton is imported, and because on a GPU several of them compile at once.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error relative to the largest value: a few roundings of the output and of the probabilities."""


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    new_tokens: int
    rows: int
    rope_columns: int
    keys: tuple[int, int]
    """First and one past the last of the key columns; the same for values."""
    values: tuple[int, int]
    dtype: torch.dtype
    mask: str
    """none, random (some tokens see nothing), or static (left padding, and an empty end)."""
    gap: int
    """Unused columns after every cached row: the kernel takes rows that are not contiguous."""


def random_case(rng: random.Random, largest: int, dtypes: list[torch.dtype]) -> Case:
    """Shapes up to `largest` columns, with lengths of 1, one group and odd widths among them."""
    groups = rng.choice((1, 2, 3, 8, 32) if largest > 1000 else (1, 2, 3))
    r = rng.choice((0, 2, 6, 8, 16, 50, 128))
    widths = (16, 24, 64, 96, 100, 256, 512, 768, 1000, 1024, 1536, 2048, 2050, 3000, 4096)
    k, v = (rng.choice(widths) % largest or 17 for _ in range(2))
    joint, split, no_keys = ((0, v), (0, v)), ((0, k), (k, k + v)), ((0, 0), (0, v))
    keys, values = rng.choice((joint, joint, split, split, ((0, min(k, v)), (0, v)), no_keys))
    return Case(
        batch=rng.choice((1, 2, 5)),
        heads=groups * rng.choice((1, 1, 3, 4)),
        new_tokens=rng.choice((1, 1, 2, 5)),
        rows=rng.choice((1, 2, 15, 16, 33, 64, 100, 257, 300)) if largest < 1000 else rng.randint(1, 3000),
        rope_columns=min(groups * r, largest),
        keys=keys,
        values=values,
        dtype=rng.choice(dtypes),
        mask=rng.choice(("none", "random", "static")),
        gap=rng.choice((0, 0, 3)),
    )


def make_inputs(case: Case, device: str = "cpu") -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of flash_decode, and the result in float64."""
    b, s, t, g = case.batch, case.new_tokens, case.rows, case.rope_columns
    keys, values, w = slice(*case.keys), slice(*case.values), max(case.keys[1], case.values[1])
    k = keys.stop - keys.start

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(case.dtype)

    inputs: dict[str, Any] = {
        "q_rope": normal(b, case.heads, s, g),
        "q_key": normal(b, case.heads, s, k),
        "k_rope": normal(b, t, g + case.gap)[..., :g],
        "unrotated": normal(b, t, w + case.gap)[..., :w],
        "keys": keys,
        "values": values,
        "mask": None,
        "scaling": max(1, g + k) ** -0.5,
    }
    position = torch.arange(t, device=device)
    if case.mask == "random":
        inputs["mask"] = torch.rand(b, 1, s, t, device=device) > 0.5
        inputs["mask"][0, :, 0] = False
    elif case.mask == "static":
        start = torch.randint(0, t, (b, 1, 1, 1), device=device)
        last = torch.randint(0, t, (1,), device=device) + torch.arange(s, device=device)[None, None, :, None]
        inputs["mask"] = (position >= start) & (position <= torch.maximum(start, last))
    query = torch.cat((inputs["q_rope"], inputs["q_key"]), -1).double()
    key = torch.cat((inputs["k_rope"], inputs["unrotated"][..., keys]), -1).double()
    scores = torch.einsum("bhsk,btk->bhst", query, key) * inputs["scaling"]
    if inputs["mask"] is not None:
        scores = scores.masked_fill(~inputs["mask"], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)  # a token that sees nothing gets zeros
    return inputs, torch.einsum("bhst,btc->bhsc", weights, inputs["unrotated"][..., values].double())


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


EDGES = [
    Case(1, 1, 1, 1, 0, (0, 16), (0, 16), torch.float32, "none", 0),
    Case(2, 4, 1, 40, 1040, (0, 24), (0, 24), torch.float16, "static", 0),  # many rotated columns
    Case(1, 2, 3, 40, 8, (0, 1100), (0, 1100), torch.float32, "random", 3),  # several tiles of values, scored before
    Case(2, 3, 1, 50, 6, (0, 33), (33, 63), torch.float32, "static", 3),  # split: odd columns
    Case(1, 3, 1, 50, 6, (0, 20), (0, 43), torch.float16, "static", 3),  # keys of a part of a joint latent
    Case(1, 2, 2, 20, 24, (0, 0), (0, 40), torch.float16, "random", 0),  # every dim rotated: no other key columns
    Case(1, 2, 1, 20, 0, (0, 0), (0, 16), torch.float32, "none", 0),  # no keys at all: plain means
]


def patch_interpreter() -> None:
    """NumPy 2.4 no longer turns an array of one element into a loop bound."""
    import triton.runtime.interpreter as interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index


def compare(count: int, seed: int, interpreted: bool) -> None:
    """Compare `count` cases. The interpreter multiplies the bits of bfloat16, so there that type is left out."""
    if interpreted:
        patch_interpreter()
    from mha2mla_megatron.hf.decode_triton_mha2mla import flash_decode

    rng = random.Random(seed)
    torch.manual_seed(seed)
    largest, dtypes = (200, [torch.float32, torch.float16]) if interpreted else (5000, list(TOLERANCES))
    for case in EDGES + [random_case(rng, largest, dtypes) for _ in range(count - len(EDGES))]:
        inputs, exact = make_inputs(case, "cpu" if interpreted else "cuda")
        error = relative_error(flash_decode(**inputs), exact)
        if not error < TOLERANCES[case.dtype]:
            raise SystemExit(f"error {error:.2e} in {case}")
    print(f"{count} cases")


def compare_models() -> None:
    """Logits with the kernel, in place of a GPU in the interpreter, against the expanded form."""
    patch_interpreter()
    from mha2mla_megatron.hf import decode_mha2mla
    from tests.test_latent_cache import RANKS, TOKENS, decoded, make_model

    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    calls, flash_decode = [], decode_mha2mla.flash_decode

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return flash_decode(*args)

    decode_mha2mla.flash_decode, decode_mha2mla.has_triton = counted, lambda x: True
    for method in RANKS:
        model = make_model(method, [0, 16, 6])
        expected = decoded(model, "expanded", None, mask)
        before = len(calls)
        error = (decoded(model, "absorbed", None, mask) - expected)[mask.bool()].abs().max().item()
        if not (error < 1e-4 and len(calls) - before == 15):  # three layers, five pieces
            raise SystemExit(f"{method}: logits differ by {error:.2e} after {len(calls) - before} calls of the kernel")
    print(f"{len(RANKS)} models")


if __name__ == "__main__":
    compare_models() if sys.argv[1] == "model" else compare(
        int(sys.argv[1]), int(sys.argv[2]), interpreted=os.environ.get("TRITON_INTERPRET") == "1"
    )
