"""Random shapes of the fused path from input to queries, keys and values, against a few lines in float64.

    python -m tests.fused_attention_cases COUNT SEED

On a GPU in float32 and bf16, else in float32 (with TRITON_INTERPRET=1). Prints how many there were, or fails. A fork or
an own process, since Triton reads that variable as it is imported.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import torch

from mha2mla_megatron.model.latent_qkv import FROM_INPUT, QKVPlan, latent_qkv, rebuild_key, rebuild_value
from mha2mla_megatron.model.rotary_kernel import HeadShape

FLOAT32_LIMIT = 2e-6
"""||error|| / ||exact||: a few roundings of 6e-8 in each of two or three products, and sums of up to 100 terms."""

NOISE_FACTOR = 1.5
"""In bf16: how much more than the same lines lose in bf16 with an exact rotation. Those round after each operation."""

ONE_ROUNDING = 2**-8
"""To bf16, relative, at worst. What the lines lose can be less by luck where a result has few numbers."""


class OneProcess:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass(frozen=True)
class Case:
    method: str
    group_size: int
    groups: int
    head_dim: int
    rope_dim: int
    nope_dim: int
    """head_dim - rope_dim, or more."""
    latent: int
    key_latent: int
    """Columns that keys read; of split and joint they may be others."""
    hidden: int
    length: int
    batch: int
    shared_rope: bool
    bias: bool
    buffers: str
    """Where weight gradients go: none (autograd), apart, or together (main_grad, side by side in one buffer)."""

    @property
    def shape(self) -> HeadShape:
        rope_heads = 1 if self.shared_rope else self.groups
        return HeadShape(self.groups * self.group_size, self.groups, rope_heads, self.rope_dim, self.nope_dim)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        d, g, nope = self.head_dim, self.groups, self.nope_dim
        key = self.method in ("joint", "split", "key") and nope > 0
        value = self.method in ("joint", "split", "value")
        latents = self.latent if self.method == "joint" else key * self.key_latent + value * self.latent
        sizes = {
            "q": (self.shape.query_heads * (self.rope_dim + nope), self.hidden),
            "k_rope": (self.shape.rope_heads * self.rope_dim, self.hidden),
            "k_nope": (0 if key else g * nope, self.hidden),
            "v": (0 if value else g * d, self.hidden),
            "kv_down": (latents, self.hidden),
            "k_up": (g * nope if key else 0, self.key_latent),
            "v_up": (g * d if value else 0, self.latent),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            if size[0]:
                shapes[f"{name}.weight"] = size
                if self.bias and name in ("q", "k_rope", "v", "v_up"):
                    shapes[f"{name}.bias"] = size[:1]
        return shapes


def random_case(rng: random.Random) -> Case:
    head_dim = rng.choice([4, 10, 16, 64, 80, 128])
    rope_dim = rng.choice([0, 2, head_dim // 4 * 2, head_dim])
    method, latent = rng.choice(["joint", "split", "key", "value", "none"]), rng.choice([1, 8, 24])
    return Case(
        method=method,
        group_size=rng.choice([1, 1, 2, 3]),
        groups=rng.choice([1, 2, 3, 5]),
        head_dim=head_dim,
        rope_dim=rope_dim,
        nope_dim=rng.choice([head_dim - rope_dim, head_dim - rope_dim, head_dim - rope_dim // 2, head_dim]),
        latent=latent,
        key_latent={"split": rng.choice([1, 8, 24]), "joint": rng.choice([latent, (latent + 1) // 2])}.get(
            method, latent
        ),
        hidden=rng.choice([16, 40]),
        length=rng.choice([1, 2, 7, 33]),
        batch=rng.choice([1, 2, 3]),
        shared_rope=rng.random() < 0.4,
        bias=rng.random() < 0.3,
        buffers=rng.choice(["none", "apart", "together"]),
    )


def expected(
    case: Case, x: torch.Tensor, w: dict[str, torch.Tensor], angles: torch.Tensor, pairs: torch.Tensor
) -> list[torch.Tensor]:
    """Query, key and value of the definition, one projection after another."""

    def heads(name: str, source: torch.Tensor, width: int) -> torch.Tensor:
        bias = w.get(f"{name}.bias")
        return torch.nn.functional.linear(source, w[f"{name}.weight"], bias).unflatten(-1, (-1, width))

    d, r, nope = case.head_dim, case.rope_dim, case.nope_dim
    c_k = c_v = None
    if "kv_down.weight" in w:
        c_k = c_v = x @ w["kv_down.weight"].t()
        if case.method == "joint":
            c_k = c_k[..., : case.key_latent]
        if case.method == "split" and "k_up.weight" in w:
            c_k, c_v = c_k.split([case.key_latent, case.latent], dim=-1)
    query = heads("q", x, r + nope)
    parts = [heads("k_rope", x, r).repeat_interleave(case.groups // case.shape.rope_heads, dim=2)] if r else []
    if "k_up.weight" in w:
        parts.append(heads("k_up", c_k, nope))
    elif nope:
        parts.append(heads("k_nope", x, nope))
    value = heads("v", x, d) if "v.weight" in w else heads("v_up", c_v, d)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        angle = angles[:, None, pairs].repeat_interleave(part.shape[2] // len(pairs), dim=2)
        first, second, rest = part.split([r // 2, r // 2, nope], dim=-1)
        cos, sin = angle.cos().to(part.dtype), angle.sin().to(part.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    return [rotated(query), rotated(torch.cat(parts, dim=-1)), value]


def errors(case: Case, seed: int, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """Name of each result and gradient -> its relative error, and that of the same lines in this type."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    x = draw(case.length, case.hidden, case.batch).transpose(1, 2)
    w = {name: draw(*shape) * 0.25 for name, shape in case.parameter_shapes().items()}
    angles = torch.rand(case.length, case.head_dim, generator=generator) * 300
    half = case.head_dim // 2
    heads = range(case.shape.rope_heads)
    pairs = torch.stack([torch.randperm(half, generator=generator)[: case.rope_dim // 2] for _ in heads])
    if case.shared_rope:
        pairs = torch.randint(half, pairs.shape, generator=generator)
    dims = case.shape.head_dim
    sizes = [(case.shape.query_heads, dims), (case.groups, dims), (case.groups, case.head_dim)]
    seeds = [draw(case.length, case.batch, *size) for size in sizes]

    def by_definition(kind: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: t.detach().to(device, kind, copy=True).requires_grad_() for name, t in {"x": x, **w}.items()}
        rest = {name: tensor for name, tensor in leaves.items() if name != "x"}
        # Angles in float64 where all is, and else as the model has them.
        turned = angles.to(device, torch.promote_types(kind, torch.float32))
        found = expected(case, leaves["x"], rest, turned, pairs.to(device))
        gradients = torch.autograd.grad(found, list(leaves.values()), [s.to(device, kind) for s in seeds])
        return dict(
            zip(["query", "key", "value", *(f"d {name}" for name in leaves)], [*found, *gradients], strict=True)
        )

    def fused() -> dict[str, torch.Tensor]:
        own_x = x.detach().to(device, dtype).requires_grad_()
        names = [f"{part}.{kind}" for part in (*FROM_INPUT, "kv_down", "k_up", "v_up") for kind in ("weight", "bias")]
        names = [name for name in names if name in w]
        parameters = [torch.nn.Parameter(w[name].detach().to(device, dtype)) for name in names]
        if case.buffers == "together":
            _side_by_side(dict(zip(names, parameters, strict=True)))
        if case.buffers != "none":
            for parameter in parameters:
                if not hasattr(parameter, "main_grad"):
                    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        joint = case.method == "joint"
        own = case.head_dim, case.shared_rope
        plan = QKVPlan(case.shape, *own, tuple(names), joint, case.key_latent, OneProcess(), False)
        *found, latents = latent_qkv(plan, own_x, angles.to(device), pairs.to(device), parameters)
        if "k_up.weight" in w:
            key = rebuild_key(
                plan, latents, found[1].detach()[:, :, : case.shape.rope_heads, : case.rope_dim], parameters
            )
            assert torch.equal(key, found[1]), "another key"
        if "v_up.weight" in w:
            assert torch.equal(rebuild_value(plan, latents, parameters), found[2].flatten(2).flatten(0, 1)), "value"
        torch.autograd.backward(found, [seed.to(device, dtype) for seed in seeds])
        result = dict(zip(["query", "key", "value"], found, strict=True))
        result["d x"] = own_x.grad
        for name, parameter in zip(names, parameters, strict=True):
            in_buffer = getattr(parameter, "grad_added_to_main_grad", False)
            assert in_buffer == (case.buffers != "none" and name.endswith("weight")), name
            result[f"d {name}"] = parameter.main_grad if in_buffer else parameter.grad  # type: ignore[attr-defined]
        return result

    exact, plain = by_definition(torch.float64), by_definition(dtype)
    found = fused()
    assert found.keys() == exact.keys()
    return {name: tuple(_error(one[name], exact[name]) for one in (found, plain)) for name in exact}  # type: ignore[return-value]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def _side_by_side(parameters: dict[str, torch.nn.Parameter]) -> None:
    """What Megatron's buffers do: weights and their main_grad in the order of the product that they are part of."""
    weights = [parameters[f"{name}.weight"] for name in FROM_INPUT if f"{name}.weight" in parameters]
    values = torch.cat([weight.detach().flatten() for weight in weights])
    sums = torch.zeros_like(values, dtype=torch.float32)
    start = 0
    for weight in weights:
        part = slice(start, start + weight.numel())
        weight.data = values[part].view_as(weight)
        weight.main_grad = sums[part].view_as(weight)  # type: ignore[attr-defined]
        start = part.stop


def main(count: int, seed: int) -> None:
    rng = random.Random(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    for number in range(count):
        case = random_case(rng)
        for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
            for name, (error, noise) in errors(case, seed + number, dtype, device).items():
                limit = FLOAT32_LIMIT if dtype == torch.float32 else NOISE_FACTOR * noise + ONE_ROUNDING
                assert error < limit, f"{case}, {dtype}, {name}: {error:.2e}, limit {limit:.2e}"
    print(f"{count} cases")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
