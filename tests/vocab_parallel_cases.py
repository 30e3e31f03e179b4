"""Random shapes for the kernels of our losses against torch's own losses in float64.

    python -m tests.vocab_parallel_cases COUNT SEED

On a GPU in float32 and bf16; with TRITON_INTERPRET=1 on the CPU in float32. Prints how many there were, or fails.
"""

from __future__ import annotations

import random
import sys

import torch
import torch.nn.functional as F

from mha2mla_megatron.training.vocab_parallel_losses import losses_of_sums
from mha2mla_megatron.training.vocab_parallel_triton import logits_gradient, sum_columns

LOSS_LIMIT = 2e-5
"""Absolute: of logarithms up to 12 and logits up to 100, sums of up to 50 000 terms in float32."""

GRADIENT_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2**-8}
"""Of each element, relative to what the row's largest could be: float32's exponentials of up to 100, or a step of
bf16."""


def run_case(rng: random.Random, generator: torch.Generator, device: str) -> None:
    dtype = rng.choice([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])
    n = rng.choice((1, 2, 7, 33))
    v = rng.choice((1, 2, 17, 100, 4096, 4097, *(() if device == "cpu" else (32000, 49152, 49153))))
    size, temperature = rng.choice((0.1, 1.0, 20.0)), rng.choice((0.5, 1.0, 3.0))
    wide = torch.randn((2, n, v + 3), generator=generator) * size
    student, teacher = wide.to(device, dtype)[..., :v]  # rows that do not begin where the last one ended
    if (chance := rng.random()) < 0.4:
        teacher = student if chance < 0.2 else None
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    upstream = torch.randn((3, n), generator=generator).to(device)

    highest, sums = sum_columns(student, teacher, labels, temperature)
    exact_sums = highest.double(), sums.double()  # so that the limit is that of the kernels' own error
    found = torch.stack(losses_of_sums(*exact_sums, temperature, teacher is not None))
    gradient = logits_gradient(student, teacher, labels, highest, sums, upstream, temperature)

    exact = student.double().requires_grad_()
    same = exact.detach() if teacher is None else teacher.double()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (exact, same))
    kl = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    expected = torch.stack((F.cross_entropy(exact, labels, reduction="none"), kl, exact.logsumexp(-1)))
    (expected * upstream).sum().backward()
    case = f"{dtype} n={n} v={v} size={size} temperature={temperature}"
    error = (found - expected).abs().max().item()
    assert error <= LOSS_LIMIT * max(1.0, temperature**2 * size / temperature), f"{case}: losses differ by {error}"
    assert exact.grad is not None
    scale = (upstream[0].abs() + temperature * upstream[1].abs() + upstream[2].abs()).double()[:, None]
    error = ((gradient.double() - exact.grad).abs() / scale).max().item()
    assert error <= GRADIENT_LIMIT[dtype], f"{case}: gradients differ by {error} of the largest possible"
    outside = sum_columns(student, teacher, labels - v, temperature)[1][4]  # a label of another process's part
    assert outside.eq(0).all(), case


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(count):
        run_case(rng, generator, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"{count} cases")
