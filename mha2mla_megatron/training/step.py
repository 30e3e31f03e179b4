"""One optimizer step: the model in Megatron's wrappers, its forward and backward schedule, its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import tee
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.model.implementation import choose_implementation, unfused
from mha2mla_megatron.model.low_rank_update import LowRankUpdate, add_low_rank_updates
from mha2mla_megatron.model.provider import build_on_device, transformer_config
from mha2mla_megatron.training.checks import check_kernels
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.distillation import Teacher
from mha2mla_megatron.training.lora import lora_shapes
from mha2mla_megatron.training.lr_scale import lr_factors
from mha2mla_megatron.training.optimizer import only_where
from mha2mla_megatron.training.param_groups import mark_parameters
from mha2mla_megatron.training.token_losses import ATTENTION_LOSS, part_names, token_losses

if TYPE_CHECKING:
    from mha2mla_megatron.training.step_graph import StepGraph

BATCH = ("tokens", "labels", "loss_mask", "position_ids")
"""What a step reads of each micro batch, [b, s] all of them."""

PREDICTIONS = ("teacher_ids", "teacher_log_probs")
"""And where there is a cached teacher, on the last pipeline stage: [b, s, k] and [b, s, k + 1]."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave: mean loss over `tokens` predicted tokens of all ranks, gradient norm before clipping.

    updated: whether the weights changed, on every rank or on none: not where loss or norm are NaN or infinite, or the
    norm is a spike.
    bad_micro_batches: those of this rank whose loss is. parts: means over the same tokens of what makes up the loss.
    sources: (mean loss, tokens) of each source of a blend; a mean over no tokens is NaN. peak_memory: bytes of tensors
    on this rank's GPU at the worst moment since the start; None without one.
    """

    loss: float
    tokens: int
    grad_norm: float
    updated: bool
    bad_micro_batches: tuple[int, ...]
    parts: dict[str, float] = field(default_factory=dict)
    sources: list[tuple[float, int]] = field(default_factory=list)
    peak_memory: int | None = None


def training_dtype(settings: FinetuneSettings, device: torch.device) -> torch.dtype:
    name = settings.dtype if settings.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, name)


def build_training_model(
    architecture: Architecture, settings: FinetuneSettings, dtype: torch.dtype, device: torch.device
) -> list[DistributedDataParallel]:
    """This rank's chunks of the model, in bf16 with float32 gradients or wholly in float32, ready for training.

    There is one chunk, or several with virtual pipeline stages. Raises UserError for a `recompute` or `fp8` that the
    model's layers cannot have.
    """
    implementation = choose_implementation(settings.implementation)
    check_kernels(settings, architecture, implementation, str(dtype).removeprefix("torch."))
    config = transformer_config(
        architecture,
        settings.parallel,
        dtype,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Says to Transformer Engine's loss that it must not look at its numbers.
        cuda_graph_impl="full_iteration" if settings.cuda_graph else "none",
        **_recompute(settings.recompute),
        **_fp8(settings.fp8),
        **_deterministic(settings.deterministic),
    )
    parallel, count = settings.parallel, settings.parallel.virtual_pipeline_model_parallel_size
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=count > 1,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # it raises on one rank alone; the optimizer sees the norm over all of them
    )
    adapters = lora_shapes(architecture, settings.lora)
    factors = lr_factors(architecture, settings.optimizer.lr_scale, adapters)
    if adapters:
        implementation = unfused(implementation)
    chunks = []
    for index in range(count):
        stage = index if count > 1 else None
        model = build_on_device(architecture, config, implementation, device, stage)
        add_low_rank_updates(model, adapters, settings.lora.factor, settings.seed)
        mark_parameters(model, factors)
        # Of the later chunks each is one bucket: they communicate while other chunks compute anyway.
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=index > 0))
        _accumulate_in_place(chunks[-1])
        if settings.recompute == "latent":
            _rebuild_keys_and_values(chunks[-1])

    def hooks(name: str) -> Any:
        return [getattr(chunk, name) for chunk in chunks] if count > 1 else getattr(chunks[0], name)

    # Gradients are summed over ranks as they appear: only those of the last micro batch may start that.
    config.no_sync_func = hooks("no_sync")
    # Where the stages of a pipeline start that at the same time, none of them waits for another's slower links.
    if parallel.overlap_grad_reduce:
        config.grad_sync_func = hooks("start_grad_sync")
    if parallel.overlap_param_gather and count > 1:
        config.param_sync_func = hooks("start_param_sync")
    return chunks


def _accumulate_in_place(chunk: DistributedDataParallel) -> None:
    """Let Transformer Engine's layers add weight gradients to Megatron's float32 buffers as they compute them.

    The setting for it, `gradient_accumulation_fusion`, is for all layers, of which Megatron-core's own need apex. An
    updated weight has no such buffer: its gradient goes on to the update.
    """
    module: Any
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation") and not isinstance(module, LowRankUpdate):
            module.fuse_wgrad_accumulation = True


def _rebuild_keys_and_values(chunk: DistributedDataParallel) -> None:
    """What recompute=latent asks of each layer."""
    module: Any
    for module in chunk.modules():
        if hasattr(module, "rebuild_keys_and_values"):
            module.rebuild_keys_and_values()


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """See that every rank has all updated weights, which `overlap_param_gather` leaves to the next forward pass."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Iterator[dict[str, torch.Tensor]],
    settings: FinetuneSettings,
    device: torch.device,
    distillation: Teacher | None = None,
    graph: StepGraph | None = None,
    is_usual: Callable[[float], bool] = lambda _: True,
) -> StepResult:
    """Forward, backward and update over one global batch; no update where loss or gradients are not finite, or
    `is_usual` says no to the gradient norm before clipping. All ranks must get the same answer from it."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    count = settings.global_batch_size // (settings.micro_batch_size * parallel_state.get_data_parallel_world_size())
    if graph is None:
        losses = run_micro_batches(chunks, batches, count, settings, device, distillation)
    else:
        losses = graph.run(chunks, batches, count, settings, device, distillation)
    sources = len(settings.data.sources)
    layers = [] if distillation is None else _sums_of_layers(distillation, sources)
    means = StepMeans([*losses, *layers], device, sources, part_names(settings))
    # Ranks agree on the loss, which is summed over them; those of one tensor-parallel group compute the same one. It is
    # looked at as late as the gradient norm: until then the host is ahead of the GPU.
    only_where(optimizer, lambda norm: math.isfinite(means.of()["loss"]) and is_usual(norm))
    updated, grad_norm, _ = optimizer.step()  # type: ignore[misc]  # upstream leaves the result untyped
    parts, tokens = means.of(), means.tokens
    loss = parts.pop("loss")
    by_source = _take_sources(parts, tokens, sources)
    bad: tuple[int, ...] = ()
    if not math.isfinite(loss):
        bad = tuple(i for i, part in enumerate(losses) if not math.isfinite(float(part["loss"])))
    return StepResult(loss, tokens, float(grad_norm), bool(updated), bad, parts, by_source, _peak_memory(device))


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def run_micro_batches(
    chunks: Sequence[DistributedDataParallel],
    batches: Iterator[dict[str, torch.Tensor]],
    count: int,
    settings: FinetuneSettings,
    device: torch.device,
    distillation: Teacher | None = None,
    forward_only: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Megatron's schedule over `count` micro batches of this rank; the sums of each, for `StepMeans`.

    In training the loss has all its parts but what layers add to it, and the losses of each source of a blend are
    summed apart, too; without gradients it is that of the text.
    """
    step = partial(forward_step, device=device)
    if not forward_only:
        step = partial(step, distillation=distillation, settings=settings)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(tee(batches, len(chunks))),  # every chunk sees every micro batch
        model=list(chunks if distillation is None else distillation.chunks),
        num_microbatches=count,
        seq_length=settings.data.sequence_length,
        micro_batch_size=settings.micro_batch_size,
        forward_only=forward_only,
    )


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]],
    model: torch.nn.Module,
    device: torch.device,
    distillation: Teacher | None = None,
    settings: FinetuneSettings | None = None,
) -> Any:
    """Megatron's forward step: the model's output and the function that makes a loss of it.

    settings: those of the loss; None is the text's alone. model: with a distillation one of its chunks.
    """
    sources = 0 if settings is None else len(settings.data.sources)
    found = next(batches)  # and what else the dataset says of a sample
    batch = {name: found[name].to(device, non_blocking=True) for name in (*BATCH, *PREDICTIONS) if name in found}
    mask = None if "document" not in found else document_mask(found["document"].to(device, non_blocking=True))
    source = found["source"].to(device, non_blocking=True) if sources else None
    # The rotary tables are split the same way, by Megatron's rotary embedding.
    sharing: Any = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=sharing)

    def summed(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total, count, sums = masked_loss(batch["loss_mask"], losses)
        if source is not None:
            sums |= _sums_by_source(batch["loss_mask"], losses, source, sources)
        return total, count, sums

    if settings is None or not part_names(settings):
        return model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]), summed
    weight = 0.0 if distillation is None else distillation.weight
    if distillation is not None and distillation.matching is not None:
        distillation.matching.begin(batch["loss_mask"], source)
    output, teacher = model(batch["tokens"], batch["position_ids"], mask), None
    if distillation is not None:
        output, teacher = distillation.split_output(output, batch)

    def loss_of_logits(student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        parts = token_losses(batch["labels"], student, teacher, weight, settings)
        total, count, sums = summed(parts.pop("loss"))
        return total, count, sums | {k: (v.detach() * batch["loss_mask"]).sum() for k, v in parts.items()}

    return output, loss_of_logits


def document_mask(document: torch.Tensor) -> torch.Tensor:
    """True where a token must not look: ahead, or into another document. [b, s] -> bool [b, 1, s, s]."""
    length = document.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=document.device).triu(1)
    return (ahead | (document[:, :, None] != document[:, None, :]))[:, None]


def masked_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses [b, s] under the mask and their number, which Megatron divides by over all ranks."""
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    return total, count, {"tokens": count, "loss": total.detach()}


class StepMeans:
    """Means over all predicted tokens of what the micro batches summed, known to every rank; float64.

    They are summed over ranks as this is made, and waited for as they are read.
    """

    def __init__(
        self,
        sums: list[dict[str, torch.Tensor]],
        device: torch.device,
        sources: int = 0,
        parts: Sequence[str] = (),
    ) -> None:
        """sums: of each micro batch, none but on the last pipeline stage, and what this stage's layers add to some.
        sources: how many the blend has. parts: names of what makes up the loss."""
        self.names = ["tokens", "loss", *_source_names(sources), *parts]
        self.total = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        nothing = self.total.new_zeros(())
        for found in sums:
            self.total += torch.stack([found[name].double() if name in found else nothing for name in self.names])
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(self.total, group=everyone)
        torch.distributed.all_reduce(self.total, group=parallel_state.get_pipeline_model_parallel_group())

    @cached_property
    def _values(self) -> list[float]:
        return self.total.tolist()

    @property
    def tokens(self) -> int:
        return int(self._values[0])

    def of(self) -> dict[str, float]:
        """Each of the parts, the loss among them; NaN where no token was predicted, which data.eod_mask_loss can do."""
        tokens, *sums = self._values
        return {name: value / tokens if tokens else math.nan for name, value in zip(self.names[1:], sums, strict=True)}


def _source_names(sources: int) -> list[str]:
    """Names of the sums of each source's losses, then of its tokens."""
    return [f"{what} of source {i}" for what in ("loss", "tokens") for i in range(sources)]


def _sums_by_source(
    loss_mask: torch.Tensor, losses: torch.Tensor, source: torch.Tensor, sources: int
) -> dict[str, torch.Tensor]:
    """Sums over the samples of each source; loss_mask, losses [b, s], source [b]."""
    each = torch.stack(((losses.detach().float() * loss_mask).sum(-1), loss_mask.sum(-1)))  # [2, b]
    sums = torch.zeros(2, sources, device=each.device).index_add_(1, source, each)
    return dict(zip(_source_names(sources), sums.flatten(), strict=True))


def _sums_of_layers(distillation: Teacher, sources: int) -> list[dict[str, torch.Tensor]]:
    """What the step's layers, and not its logits, add to the sums of the micro batches."""
    if distillation.matching is None:
        return []
    matched = distillation.matching.take_sums()
    losses = distillation.weight * distillation.matching.factor * matched
    by_source = dict(zip(_source_names(sources)[:sources], losses, strict=True)) if sources else {}
    return [{ATTENTION_LOSS: matched.sum(), "loss": losses.sum(), **by_source}]


def _take_sources(parts: dict[str, float], tokens: int, sources: int) -> list[tuple[float, int]]:
    """(mean loss, tokens) of each source, from its sums over the tokens of all, which leave `parts`."""
    values = [parts.pop(name) for name in _source_names(sources)]
    return [
        (loss / share, round(share * tokens)) if tokens and share else (math.nan, 0)
        for loss, share in zip(values[:sources], values[sources:], strict=True)
    ]


def _recompute(kind: str) -> dict[str, Any]:
    return {
        "none": {},
        "latent": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[kind]


def _deterministic(wanted: bool) -> dict[str, Any]:
    """Megatron's own trainer refuses the fused cross entropy in this mode as one that is not deterministic."""
    return {"deterministic_mode": True, "cross_entropy_loss_fusion": False} if wanted else {}


def _fp8(kind: str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    return {"fp8": "hybrid", "fp8_recipe": {"delayed": "delayed", "current": "tensorwise"}[kind]}
