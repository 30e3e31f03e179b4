"""Which matrices get a trained low-rank update: the setting lora."""

from __future__ import annotations

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.adapters import adapter_shapes
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training.config import LoraSettings
from mha2mla_megatron.training.lr_scale import PARTS, matching


def lora_shapes(architecture: Architecture, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Megatron name -> shape of every A and B of the whole model, none of experts; empty where lora.rank is not given.

    Raises UserError for a pattern that matches no matrix of the layers, and for a rank that is more than one of those
    that match can have.
    """
    if lora.rank is None:
        return {}
    matrices = {
        name: shape
        for name, shape in megatron_shapes(architecture).items()
        if ".linear_" in name and ".experts." not in name and name.endswith(".weight")
    }
    chosen: dict[str, tuple[int, ...]] = {}
    for pattern in lora.targets:
        found = matching(pattern, matrices)
        if not found:
            names = [name for name in matrices if ".layers.0." in name]
            raise UserError(
                f"lora.targets: '{pattern}' matches no matrix of the layers; valid: {', '.join(PARTS)}, or a pattern "
                f"(with * and ?) of names such as {', '.join(names)}"
            )
        chosen |= {name: matrices[name] for name in found}
    if not chosen:
        raise UserError("lora.targets: is empty; give one pattern at least")
    for name, (rows, columns) in chosen.items():
        if lora.rank > min(rows, columns):
            raise UserError(
                f"lora.rank: {lora.rank} is more than {name} has, which is {rows} x {columns}; valid: 1 to "
                f"{min(rows, columns)}, or lora.targets without it"
            )
    return adapter_shapes(chosen, lora.rank)
