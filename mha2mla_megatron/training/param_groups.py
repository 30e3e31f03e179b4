"""optimizer.lr_scale in Megatron's terms: tensors without gradients, and parameter groups with rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from mha2mla_megatron.model.provider import parameters_of


def mark_parameters(model: Any, factors: Mapping[str, float]) -> None:
    """Freeze this process's parameters of factor 0, and give the others their factor for `group_overrides`.

    To be called before gradient buffers are made: frozen parameters get no place in them, and none in the optimizer.
    """
    for name, parameter in parameters_of(model):
        parameter.lr_factor = factors[name]
        parameter.requires_grad_(parameter.lr_factor > 0)
    start = getattr(model, "module", model)
    frozen = start.pre_process and not any(parameter.requires_grad for parameter in start.embedding.parameters())
    if frozen and start.config.recompute_granularity == "full":
        # Autograd does not see the parameters of a recomputed layer: where its input needs no gradient, they get none.
        start.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())


def group_overrides(config: OptimizerConfig, factors: set[float]) -> dict[ParamKey, Any]:
    """Megatron's own groups (no weight decay of vectors), and for each factor one whose whole schedule it scales."""
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(config)  # type: ignore[assignment]
    assert config.lr is not None and config.min_lr is not None
    for factor in sorted(factors - {0.0, 1.0}):
        has_it = ParamPredicate(f"lr_factor {factor}", lambda p, factor=factor: getattr(p, "lr_factor", 1.0) == factor)
        overrides[ParamKey(predicate=has_it)] = {"max_lr": factor * config.lr, "min_lr": factor * config.min_lr}
    return overrides


def take_own_groups(saved: dict[str, Any], optimizer: MegatronOptimizer, updates: int) -> None:
    """Put this run's groups in the place of those of a saved optimizer, after so many updates.

    Megatron looks the saved ones up by their rates, so that another rate than before would not be found; and a process
    that trains nothing does not know its number of updates.
    """
    own: Any = optimizer.state_dict()
    groups = own["optimizer"]["param_groups"]
    saved["optimizer"]["param_groups"] = [{**group, "step": updates} for group in groups]
