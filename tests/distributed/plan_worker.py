"""One of several processes that measure what a training step of a model at a layout really takes and sends."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.model.parallel import initialize_parallel
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.distillation import Distillation
from mha2mla_megatron.training.optimizer import build_optimizer
from mha2mla_megatron.training.step import build_training_model, train_step
from mha2mla_megatron.training.weight_average import WeightAverage
from tests.saved_activations import SavedActivations, random_batch

RING = {
    "allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_tensor_coalesced_": 1, "alltoall_base_": 1,
}  # fmt: skip
"""Collective -> how often a ring takes (n - 1)/n of the whole tensor from each rank."""

SINGLE_NUMBERS = 40
"""Bytes up to which a message is one of those that the plan leaves out: the loss and its parts, the gradient norm."""


class Messages(TorchDispatchMode):
    """Bytes that this process sends, were each collective a ring: {"group operation": bytes} in `sent`; operations that
    RING does not know in `other`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.groups = {
            parallel_state.get_embedding_group(check_initialized=False): "embedding",
            parallel_state.get_data_parallel_group(): "data",
            parallel_state.get_data_parallel_group(with_context_parallel=True): "data",
            parallel_state.get_pipeline_model_parallel_group(): "pipeline",
            parallel_state.get_tensor_model_parallel_group(): "tensor",
            parallel_state.get_expert_tensor_and_model_parallel_group(): "tensor",
            parallel_state.get_context_parallel_group(): "context",
        }
        self.groups = {group.group_name: name for group, name in self.groups.items() if group is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        group = torch.distributed.ProcessGroup.unbox(boxed)
        size = max((tensor.nbytes for tensor in tensors), default=0)
        if size <= SINGLE_NUMBERS or group.size() == 1 or name == "recv_":
            return
        if name == "send":
            self.sent["pipeline send"] += size
        elif name in RING:
            ring = RING[name] * size * (group.size() - 1) // group.size()
            self.sent[f"{self.groups[group.group_name]} {name}"] += ring
        else:
            self.other[name] += size


def measure(config: dict[str, Any], words: list[str], teacher: dict[str, Any] | None) -> dict[str, Any]:
    settings = load_settings(FinetuneSettings, words)
    architecture = parse_architecture(config, "case")
    device = initialize_parallel(settings.parallel)
    dtype = getattr(torch, settings.dtype)
    chunks = build_training_model(architecture, settings, dtype, device)
    optimizer, _ = build_optimizer(chunks, settings, dtype)
    for chunk in chunks:
        chunk.train()
    distillation, held = None, list[torch.nn.Module](chunks)
    if teacher is not None:
        distillation = Distillation(parse_architecture(teacher, "teacher"), chunks, settings, dtype, device)
        held += distillation.teacher
    batch = random_batch(settings.micro_batch_size, settings.data.sequence_length, architecture.vocab_size)
    saved = SavedActivations(*held)
    with Messages() as messages, saved.recorded():
        train_step(chunks, optimizer, iter([batch] * 100), settings, device, distillation)
    inner = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    parameters = [p for group in inner.optimizer.param_groups for p in group["params"]]
    moments = [t for p in parameters for t in inner.optimizer.state[p].values() if getattr(t, "ndim", 0) > 0]
    masters = parameters if dtype == torch.bfloat16 else []
    decay = settings.optimizer.ema_decay
    averages = WeightAverage(optimizer, decay).tensors if decay > 0 else []
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "shapes": sorted(tuple(p.shape) for chunk in chunks for p in chunk.parameters()),
        "teacher": sum(p.nbytes for model in held[len(chunks) :] for p in model.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "buckets": sum(len(b.buckets) for b in buffers),
        "optimizer": sum(t.nbytes for t in [*moments, *masters, *averages]),
        "saved": saved.peak,
        "sent": dict(messages.sent),
        "other": dict(messages.other),
    }


def run(case: dict[str, Any], folder: Path) -> None:
    """Measure a case, {"name", "config", "teacher", "settings"}, into folder/NAME.RANK.json. A teacher is a config too,
    or None."""
    found = measure(case["config"], case["settings"], case["teacher"])
    (folder / f"{case['name']}.{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    gc.collect()
