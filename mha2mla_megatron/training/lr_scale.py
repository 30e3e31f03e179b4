"""Which tensors learn at another rate than the rest, or not at all: the setting optimizer.lr_scale."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping

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


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that a pattern (`*`, `?`, `[...]` as in a shell), or a word of `PARTS`, stands for."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in PARTS.get(pattern, (pattern,)))]


def lr_factors(
    architecture: Architecture, lr_scale: Mapping[str, float], adapters: Collection[str] = ()
) -> dict[str, float]:
    """Megatron name -> what the learning rate of this tensor is multiplied by, for every parameter of the whole model.

    lr_scale: pattern or word of `PARTS` -> factor; of those that match a name the last one counts, where none does it
    is 1. adapters: names of low-rank updates; where there are some the model's own tensors are frozen, and patterns are
    for these alone.

    Raises UserError for a pattern that matches nothing, where nothing is left to train, and for a trained bias of a
    frozen weight, which Megatron's layers give no gradient.
    """
    # Whole numbers, no parameter.
    own = [name for name in megatron_shapes(architecture) if not name.endswith("rope_pairs")]
    factors = dict.fromkeys(adapters or own, 1.0)
    for pattern, factor in lr_scale.items():
        found = matching(pattern, factors)
        if not found:
            others = re.compile(r"\.(layers|local_experts)\.[1-9]")
            names = [name for name in factors if not others.search(name)]
            what, words = "tensor of this model", f"{', '.join(PARTS)}, or "
            if adapters:
                what, words = "tensor that lora trains", ""
            raise UserError(
                f"optimizer.lr_scale: '{pattern}' matches no {what}; valid: {words}a pattern (with * and ?) of names "
                f"such as {', '.join(names)}"
            )
        factors |= dict.fromkeys(found, factor)
    if not any(factors.values()):
        raise UserError("optimizer.lr_scale: every tensor is frozen (factor 0); at least one must be trained")
    if adapters:
        return {**dict.fromkeys(own, 0.0), **factors}
    for name, factor in factors.items():
        if name.endswith(".bias") and factor and not factors[f"{name.removesuffix('bias')}weight"]:
            raise UserError(
                f"optimizer.lr_scale: {name} is trained and its weight is frozen; valid: both frozen, or both trained"
            )
    return factors
