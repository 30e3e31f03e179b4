"""Names and layouts of one model in Hugging Face and in Megatron: one literal table, read in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mha2mla_megatron.architecture import Architecture

Pack = Callable[[Sequence[torch.Tensor], Architecture], torch.Tensor]
Unpack = Callable[[torch.Tensor, Architecture], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Layout:
    """How the rows of several Hugging Face tensors form one Megatron tensor."""

    pack: Pack
    unpack: Unpack


@dataclass(frozen=True)
class ParamMap:
    """One Megatron tensor and the Hugging Face tensors that it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


def _pack_qkv(tensors: Sequence[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Megatron's linear_qkv: for each kv head its group's query rows, its key rows, its value rows."""
    groups = architecture.num_key_value_heads
    parts = [t.reshape(groups, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _unpack_qkv(tensor: torch.Tensor, architecture: Architecture) -> Sequence[torch.Tensor]:
    _, heads, groups, d = architecture.heads
    parts = tensor.view(groups, -1, *tensor.shape[1:]).split((heads // groups * d, d, d), dim=1)
    return [part.flatten(0, 1) for part in parts]


SAME = Layout(lambda tensors, _: tensors[0], lambda tensor, _: [tensor])
STACKED = Layout(lambda tensors, _: torch.cat(list(tensors)), lambda tensor, _: tensor.chunk(2))
QKV = Layout(_pack_qkv, _unpack_qkv)

# `*` stands for weight or bias, {} for an expert. A row whose tensors a model does not have is not its row.
MODEL_ROWS = (
    ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), SAME),
    ("decoder.final_layernorm.weight", ("model.norm.weight",), SAME),
    ("output_layer.weight", ("lm_head.weight",), SAME),
)
LAYER_ROWS = (
    ("self_attention.linear_proj.*", ("self_attn.o_proj.*",), SAME),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), SAME),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), SAME),
    ("mlp.linear_fc1.*", ("mlp.gate_proj.*", "mlp.up_proj.*"), STACKED),
    ("mlp.linear_fc2.*", ("mlp.down_proj.*",), SAME),
    ("mlp.router.weight", ("block_sparse_moe.gate.weight",), SAME),
    (
        "mlp.experts.local_experts.{}.linear_fc1.weight",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        STACKED,
    ),
    ("mlp.experts.local_experts.{}.linear_fc2.weight", ("block_sparse_moe.experts.{}.w2.weight",), SAME),
    ("mlp.router.weight", ("mlp.gate.weight",), SAME),
    (
        "mlp.experts.local_experts.{}.linear_fc1.weight",
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        STACKED,
    ),
    ("mlp.experts.local_experts.{}.linear_fc2.weight", ("mlp.experts.{}.down_proj.weight",), SAME),
)
DENSE_ROWS = (("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), SAME),)
EXPERT_ROWS = (("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), SAME),)
ORIGINAL_ROWS = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), SAME),
    ("self_attention.linear_qkv.*", ("self_attn.q_proj.*", "self_attn.k_proj.*", "self_attn.v_proj.*"), QKV),
)
CONVERTED_ROWS = (
    ("input_layernorm.weight", ("input_layernorm.weight",), SAME),
    ("self_attention.linear_q.*", ("self_attn.q_proj.*",), SAME),
    ("self_attention.linear_k_rope.*", ("self_attn.k_rope_proj.*",), SAME),
    ("self_attention.linear_kv_down.*", ("self_attn.kv_down_proj.*",), SAME),
    ("self_attention.linear_k_up.*", ("self_attn.k_up_proj.*",), SAME),
    ("self_attention.linear_v_up.*", ("self_attn.v_up_proj.*",), SAME),
    ("self_attention.linear_k_nope.*", ("self_attn.k_nope_proj.*",), SAME),
    ("self_attention.linear_v.*", ("self_attn.v_proj.*",), SAME),
    ("self_attention.rope_pairs", ("self_attn.rope_pairs",), SAME),
)


def parameter_map(architecture: Architecture) -> list[ParamMap]:
    """The table for one model, in the order of its Hugging Face tensors; covers every one of them exactly once."""
    layer_rows = LAYER_ROWS + (ORIGINAL_ROWS if architecture.mla is None else CONVERTED_ROWS)
    candidates = [ParamMap(*row) for row in MODEL_ROWS]
    for layer in range(architecture.num_layers):
        experts = architecture.experts_of(layer)
        norm_rows = DENSE_ROWS if experts is None else EXPERT_ROWS
        for megatron, hf, layout in layer_rows + norm_rows:
            kinds = ("weight", "bias") if megatron.endswith("*") else ("",)
            numbers = range(experts.num_experts if experts is not None else 0) if "{}" in megatron else (0,)
            for kind, number in itertools.product(kinds, numbers):
                ours, *theirs = (name.replace("*", kind).format(number) for name in (megatron, *hf))
                names = tuple(f"model.layers.{layer}.{name}" for name in theirs)
                candidates.append(ParamMap(f"decoder.layers.{layer}.{ours}", names, layout))
    order = {name: i for i, name in enumerate(architecture.tensor_shapes())}
    rows = [row for row in candidates if all(name in order for name in row.hf)]
    covered = [name for row in rows for name in row.hf]
    assert sorted(covered) == sorted(order), f"table does not cover {set(order) ^ set(covered)}"
    return sorted(rows, key=lambda row: order[row.hf[0]])


def megatron_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Megatron name -> global shape of every tensor of the model."""
    shapes = architecture.tensor_shapes()
    return {
        row.megatron: (sum(shapes[name][0] for name in row.hf), *shapes[row.hf[0]][1:])
        for row in parameter_map(architecture)
    }
