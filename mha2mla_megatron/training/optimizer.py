"""Megatron's distributed AdamW and its warmup-stable-decay schedule, from our settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.own_shards import parts_of, save_own_shards
from mha2mla_megatron.training.param_groups import group_overrides


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: FinetuneSettings, dtype: torch.dtype
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The distributed optimizer over the model's chunks, and its schedule counted in optimizer steps."""
    wanted = settings.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=wanted.lr,
        min_lr=wanted.min_lr,
        weight_decay=wanted.weight_decay,
        adam_beta1=wanted.adam_beta1,
        adam_beta2=wanted.adam_beta2,
        adam_eps=wanted.adam_eps,
        clip_grad=wanted.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=settings.parallel.overlap_param_gather,
    )
    overrides = group_overrides(config, set(wanted.lr_scale.values()))
    optimizer = get_megatron_optimizer(config, chunks, overrides)  # type: ignore[arg-type]
    for part in parts_of(optimizer):
        save_own_shards(part)
    _leave_out_what_is_not_finite(optimizer)
    for inner in _torch_adams(optimizer):
        _make_resumable(inner)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style="WSD",
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=settings.steps,
        wd_incr_style="constant",
        wsd_decay_steps=settings.decay_steps,
        lr_wsd_decay_style=wanted.decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


def only_where(optimizer: MegatronOptimizer, allowed: Callable[[float], bool]) -> None:
    """Ask `allowed` before each update from now on, when gradients are ready; it is given their norm before clipping.

    All ranks must get the same answer.
    """
    optimizer.update_allowed = allowed  # type: ignore[attr-defined]


def _leave_out_what_is_not_finite(optimizer: MegatronOptimizer) -> None:
    """Let `step` change nothing, and say so, where the gradient norm over all ranks is NaN or infinite.

    Megatron does that with a loss scaler alone, which is for float16; without one such gradients go into the moments,
    from where they never leave.
    """
    only_where(optimizer, lambda _: True)
    measure, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norm = math.nan

    def get_grad_norm() -> float:
        nonlocal norm
        norm = float(measure())
        return norm

    def step_with_ready_grads() -> bool:
        allowed: Callable[[float], bool] = optimizer.update_allowed  # type: ignore[attr-defined]
        return math.isfinite(norm) and allowed(norm) and update()

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = step_with_ready_grads


def _torch_adams(optimizer: MegatronOptimizer) -> Iterable[torch.optim.Optimizer]:
    """The torch optimizers inside, where Megatron uses torch's (neither Transformer Engine nor apex is there)."""
    for part in parts_of(optimizer):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            yield inner


def _make_resumable(adam: torch.optim.Optimizer) -> None:
    """Let Megatron's distributed optimizer save and load torch's Adam (megatron-core 0.19).

    It asserts that every parameter has a `step` even before the first one, fails on a `step` that is a tensor when it
    restores moments, and restores one tensor shared by all parameters, which then runs away. So: moments exist from the
    start, `step` is a NumPy number while it is loaded, and becomes each parameter's own tensor before the next step. A
    process that trains nothing, such as a frozen pipeline stage, counts its steps on an empty tensor.
    """
    if not any(group["params"] for group in adam.param_groups):
        empty = torch.empty(0, device=torch.cuda.current_device(), requires_grad=True)
        empty.grad = torch.empty_like(empty)
        adam.param_groups[0]["params"].append(empty)
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            state["step"] = numpy.float32(0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)

    def to_numbers(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            state["step"] = numpy.float32(float(state["step"]))

    def to_tensors(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            if not isinstance(state["step"], torch.Tensor):
                state["step"] = torch.tensor(float(state["step"]))

    adam.register_load_state_dict_post_hook(to_numbers)
    adam.register_step_pre_hook(to_tensors)
