"""A picture of how a cache budget was spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_allocation(report: dict[str, Any], head_dim: int, file: Path) -> None:
    """Pairs kept by layer and frequency (as the share of heads that keep them; of shared rotated keys how many of a
    frequency) and c by layer, written as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = report["layers"]
    kept = np.zeros((head_dim // 2, len(layers)))
    for column, layer in enumerate(layers):
        for head in layer["rope_pairs"]:
            kept[head, column] += 1 / len(layer["rope_pairs"])
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(max(6, 0.22 * len(layers)), 6), height_ratios=(2, 1), layout="constrained"
    )
    shared = report["mha2mla"]["partial_rope"]["shared"]
    image = above.imshow(kept, aspect="auto", cmap="Blues", vmin=0, vmax=max(1, kept.max()), interpolation="nearest")
    above.set_ylabel("rotary pair (0 turns fastest)")
    figure.colorbar(image, ax=above, label="rotated keys" if shared else "share of key/value heads that keep it")
    numbers = range(len(layers))
    below.bar(numbers, [layer["latent_width"] for layer in layers], label="latents")
    rotated = [layer["qk_rope_head_dim"] * len(layer["rope_pairs"]) for layer in layers]
    below.bar(
        numbers,
        rotated,
        bottom=[layer["latent_width"] for layer in layers],
        label="rotated keys",
        color="tab:orange",
    )
    below.set_xlabel("layer")
    below.set_ylabel("cached elements")
    below.margins(y=0.3)
    below.legend(loc="upper right", ncols=2)
    saved = report["cache_elements_per_token"]["saved"]
    figure.suptitle(f"cache -{saved:.2%}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
