"""Which tensors learn at another rate than the rest, or not at all: the setting optimizer.lr_scale."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.errors import UserError

PARTS = {
    "attention": ("*.self_attention.*.weight", "*.self_attention.*.bias"),
    "latents": ("*.linear_kv_down.*", "*.linear_k_up.*", "*.linear_v_up.*"),
    "mlp": ("*.mlp.*.weight", "*.mlp.*.bias"),
    "norms": ("*layernorm.weight", "*.layer_norm_weight"),
}
"""Words that stand for several patterns: projections (and norms) of queries, keys and values; what makes latents and
reads them; the MLP without its norm; all norms."""


def lr_factors(architecture: Architecture, lr_scale: Mapping[str, float]) -> dict[str, float]:
    """Megatron name -> what the learning rate of this tensor is multiplied by, for every parameter of the whole model.

    lr_scale: pattern (`*`, `?`, `[...]` as in a shell) or word of `PARTS` -> factor; of those that match a name the
    last one counts, where none does it is 1.

    Raises UserError for a pattern that matches nothing, where nothing is left to train, and for a trained bias of a
    frozen weight, which Megatron's layers give no gradient.
    """
    # Whole numbers, no parameter.
    factors = {name: 1.0 for name in megatron_shapes(architecture) if not name.endswith("rope_pairs")}
    for pattern, factor in lr_scale.items():
        found = [name for name in factors if any(fnmatch.fnmatchcase(name, p) for p in PARTS.get(pattern, (pattern,)))]
        if not found:
            others = re.compile(r"\.(layers|local_experts)\.[1-9]")
            names = [name for name in factors if not others.search(name)]
            raise UserError(
                f"optimizer.lr_scale: '{pattern}' matches no tensor of this model; valid: {', '.join(PARTS)}, or a "
                f"pattern (with * and ?) of names such as {', '.join(names)}"
            )
        factors |= dict.fromkeys(found, factor)
    if not any(factors.values()):
        raise UserError("optimizer.lr_scale: every tensor is frozen (factor 0); at least one must be trained")
    for name, factor in factors.items():
        if name.endswith(".bias") and factor and not factors[f"{name.removesuffix('bias')}weight"]:
            raise UserError(
                f"optimizer.lr_scale: {name} is trained and its weight is frozen; valid: both frozen, or both trained"
            )
    return factors
