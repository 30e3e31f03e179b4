"""Floating-point operations that training asks for, and how many of them a GPU can do."""

from __future__ import annotations

from dataclasses import dataclass

from mha2mla_megatron.architecture import Architecture

PEAK_TFLOPS = {
    "MIG": None,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "B200": 2250,
}
"""Words of a GPU's name -> TFLOP/s of its data sheet, bf16 without sparsity; of several that fit the first one counts.
A slice of a GPU has none."""


def training_flops(architecture: Architecture, sequence_length: int) -> float:
    """Floating-point operations of forward and backward pass for one token of a sample, that the model itself asks for.

    6 for each weight of a matrix that the token is multiplied with (2 forward, 4 backward), and three times those of
    attention's two products, over half of the S x S pairs of tokens: a causal mask. Recomputing counts for nothing.
    """
    # rope_pairs is no matrix, and neither is an embedding that is looked up.
    weights = sum(
        shape[0] * shape[1]
        for name, shape in architecture.tensor_shapes().items()
        if name.endswith(".weight") and len(shape) == 2 and "norm" not in name and "embed" not in name
    )
    if architecture.tie_word_embeddings:
        weights += architecture.vocab_size * architecture.hidden_size  # the embedding, as the output layer
    if (experts := architecture.experts) is not None:
        idle = experts.num_experts - experts.num_experts_per_tok
        weights -= len(experts.layers) * idle * 3 * architecture.hidden_size * experts.intermediate_size
    d, products = architecture.head_dim, 0.0
    for layer in range(architecture.num_layers):
        products += _mean_seen(architecture.window(layer), sequence_length) * (architecture.qk_head_dim(layer) + d)
    return 6 * weights + 3 * 2 * products * architecture.num_attention_heads


def _mean_seen(window: int | None, sequence_length: int) -> float:
    """Tokens that a query sees in the mean: half of them all, or fewer where a window is shorter."""
    width = min(window or sequence_length, sequence_length)
    return width - width * width / (2 * sequence_length)


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None where they are not known."""
    words = set(name.replace("-", " ").split())
    return next((peak for known, peak in PEAK_TFLOPS.items() if words.issuperset(known.split())), None)


@dataclass(frozen=True)
class Utilisation:
    """Which part a run uses of what its GPUs can do."""

    flops: float
    """Of one step, over all GPUs."""

    peak: float | None
    """FLOP/s of all GPUs together; None where it is not known."""

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step that took so long."""
        return None if self.peak is None else self.flops / (seconds * self.peak)
