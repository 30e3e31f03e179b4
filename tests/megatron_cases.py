"""Tiny models for the Megatron tests: 4 layers, h 32, H 4, G 2, d 16, vocabulary 64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
"""With so short an original context the scaling touches half of the frequencies."""

SHORT_NAMES = {
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size", "stages": "pipeline_model_parallel_layout",
    "sp": "sequence_parallel", "reduce": "overlap_grad_reduce", "gather": "overlap_param_gather",
    "comm": "cp_comm_type",
}  # fmt: skip
"""Fields of ParallelConfig, as the tables of layouts call them."""

ROPE_DIMS, LATENT_WIDTHS = [0, 4, 16, 10], [12, 8, 16, 12]
"""r and c of each layer, from nothing rotated to everything; over and over where there are more than 4."""

KEY_WIDTHS = {"split": [8, 16, 0, 4], "joint": [6, 8, 0, 12]}
"""Of what keys are made in each: a latent of their own, a part of it or all; nothing where everything is rotated."""


SHARED_KEYS: dict[str, Any] = dict(
    shared=True, qk_nope_head_dim=12, strategy="activation", scores="statistics.safetensors"
)
"""Of PartialRopeConfig: one rotated key for all heads, which only statistics give, beside at least 12 dims of each."""


def original_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a Llama."""
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=100.0,
    )  # fmt: skip
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **changes}


def converted_config(method: str, shared: bool = False, **changes: Any) -> dict[str, Any]:
    """The config.json of a converted model whose layers all differ in r and c. shared: all heads of a layer have one
    rotated key, and at least 12 dims of their own, so that queries and keys of some layers are wider than values."""
    times = changes.get("num_hidden_layers", 4) // 4
    key_widths = KEY_WIDTHS.get(method)
    rope = PartialRopeConfig(qk_rope_head_dim=ROPE_DIMS * times)
    if shared:
        rope = dataclasses.replace(rope, **SHARED_KEYS)
        key_widths = key_widths and [width or 5 for width in key_widths]
    low_rank = LowRankConfig(
        method=method,
        kv_lora_rank=None if method == "none" else LATENT_WIDTHS * times,
        k_lora_rank=key_widths and key_widths * times,
    )
    mla = MHA2MLAConfig(rope, low_rank)
    return {**original_config(**changes), "model_type": "mha2mla_llama", "mha2mla": dataclasses.asdict(mla)}


def random_tensor(name: str, shape: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """A value for the tensor of this name: wide enough that attention is far from uniform; pairs differ per head. The
    pairs of one head, which all may share, repeat themselves."""
    if name.endswith("rope_pairs"):
        if shape[0] == 1:
            pairs = torch.randperm(head_dim // 2)[: (shape[1] + 1) // 2]
            return torch.cat((pairs, pairs))[None, : shape[1]]
        return torch.stack([torch.randperm(head_dim // 2)[: shape[1]] for _ in range(shape[0])])
    return torch.randn(shape) * 0.2 + (1.0 if "norm" in name else 0.0)


def randomize(model: Any) -> None:
    """Random values for every parameter and buffer of a Megatron model that one process holds whole."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(random_tensor(name, tuple(tensor.shape), model.config.kv_channels))


def save_global_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write whole tensors as a `torch_dist` checkpoint with Megatron's own writer; the process is a world of one."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    initialize_parallel(ParallelConfig())
    state = {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=0) for name, tensor in tensors.items()}
    dist_checkpointing.save(state, str(folder))
