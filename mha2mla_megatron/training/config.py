"""Settings of tools/finetune.py; the defaults are those of the paper's SmolLM recipe where it names one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mha2mla_megatron.checkpoint.adapters import ALPHA
from mha2mla_megatron.data.blend import blend_weights, source_names
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.model.implementation import IMPLEMENTATIONS
from mha2mla_megatron.model.parallel import ParallelConfig


@dataclass(frozen=True)
class DataSettings:
    """Token files made by tools/preprocess_data.py."""

    train: Any = None
    """Prefix of a .bin/.idx pair, or a mapping prefix -> weight: fractions that sum to 1, or whole numbers."""

    split: list[float] | None = None
    """Shares of training, validation and test in each source's documents, in their order, such as [98, 1, 1]. The
    second stands in for validation.data; the loss of the third is measured after the last step. None: all training."""

    sequence_length: int = 2048
    """Tokens a sample."""

    reset_attention_mask: bool = False
    """Let no token see an earlier document of its sample; with implementation=local."""

    reset_position_ids: bool = False
    """Count positions from each document's start. Only together with reset_attention_mask, which implies it: the
    rotation depends on distances alone, and Megatron's does not look at position ids."""

    eod_mask_loss: bool = False
    """Leave out the loss of the token after each end of document, which nothing before it predicts."""

    workers: int = 0
    """Processes that read ahead. 0: read in the training process."""

    cache: str | None = None
    """Folder for the sample indices. None: `cache` under save."""

    def __post_init__(self) -> None:
        _check_blend("data.train", self.train)
        if self.split is not None:
            shares = [share >= 0 for share in self.split]
            if len(shares) != 3 or not all(shares) or not self.split[0] > 0:
                raise UserError(
                    f"data.split: {self.split}; three shares of training (more than 0), validation and test are needed"
                )
            if not math.isfinite(sum(self.split)):
                raise UserError(f"data.split: {self.split} are not finite")
        if self.reset_position_ids and not self.reset_attention_mask:
            raise UserError(
                "data.reset_position_ids: rotary attention depends on distances alone, so it changes nothing by "
                "itself; give data.reset_attention_mask=true"
            )
        require_at_least("data.sequence_length", self.sequence_length, 1)
        require_at_least("data.workers", self.workers, 0)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of training, validation and test."""
        return (1.0, 0.0, 0.0) if self.split is None else tuple(self.split)

    @property
    def sources(self) -> list[str]:
        """Names of the sources of a blend, none where there is only one."""
        return source_names(self.train) if isinstance(self.train, dict) and len(self.train) > 1 else []


@dataclass(frozen=True)
class ValidationSettings:
    """Loss over a fixed set of held-out samples, without gradients."""

    data: Any = None
    """Prefix of a .bin/.idx pair, or a mapping prefix -> weight. None: data.split's part, if it has one."""

    interval: int = 500
    """Steps between validations; there is one after the last step always."""

    samples: int = 64
    """Samples of data.sequence_length tokens, the same ones each time."""

    def __post_init__(self) -> None:
        _check_blend("validation.data", self.data)
        require_at_least("validation.interval", self.interval, 1)
        require_at_least("validation.samples", self.samples, 1)


TEMPERATURES = 0.01, 100.0
"""Beyond these, T^2 KL in float32 is more and more its rounding errors: some T^2 times 1e-7."""


@dataclass(frozen=True)
class DistillationSettings:
    """A frozen model whose predictions the training follows beside the text."""

    teacher: str | None = None
    """Megatron checkpoint of a model with the same vocabulary, such as the original one. None: no distillation."""

    cache: str | None = None
    """Folder of tools/cache_teacher.py with a teacher's most probable tokens, instead of a teacher that runs along."""

    weight: float = 0.5
    """w in the loss (1 - w) LM + w (T^2 KL(teacher || student) + a M), from 0 to 1."""

    final_weight: float | None = None
    """w of the last step, which it is moved to in equal parts over the last decay_steps steps. None: w is constant."""

    decay_steps: int | None = None
    """How many steps it takes to move w to final_weight. None: those of the learning rate's decay."""

    temperature: float = 1.0
    """T, which divides both models' logits in the KL; from 0.01 to 100."""

    attention_weight: float = 0.0
    """a, of M, the mean over layers of ||o_s - o_t||^2 / ||o_t||^2, where o is what student's and teacher's attention
    adds to the residual stream. Both have as many layers, and the same hidden size. 0: M is not computed."""

    def __post_init__(self) -> None:
        for key in ("weight", "final_weight"):
            if (value := getattr(self, key)) is not None and not 0 <= value <= 1:
                raise UserError(f"distillation.{key}: {value} is not between 0 and 1")
        if self.decay_steps is not None:
            require_at_least("distillation.decay_steps", self.decay_steps, 1)
            if self.final_weight is None:
                raise UserError(f"distillation.decay_steps: {self.decay_steps} is given, final_weight is not")
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise UserError(f"distillation.temperature: {self.temperature} is not between {low} and {high}")
        if not 0 <= self.attention_weight < math.inf:
            raise UserError(f"distillation.attention_weight: {self.attention_weight} is not a number of at least 0")
        for key in ("weight", "final_weight", "temperature"):
            if not self.taught and getattr(self, key) != getattr(DistillationSettings, key):
                raise UserError(
                    f"distillation.{key}: {getattr(self, key)} is given, neither distillation.teacher nor "
                    "distillation.cache is"
                )
        if self.teacher is None and self.attention_weight > 0:
            raise UserError(
                f"distillation.attention_weight: {self.attention_weight} is given, distillation.teacher is not"
            )
        if self.teacher is not None and self.cache is not None:
            raise UserError(
                f"distillation.cache: {self.cache} is given, and distillation.teacher {self.teacher} too; valid: one "
                "of them"
            )

    @property
    def taught(self) -> bool:
        """Whether there is a teacher, of either kind."""
        return self.teacher is not None or self.cache is not None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule (the paper's recipe)."""

    lr: float = 1e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    warmup_steps: int | None = None
    """Linear warm-up from 0. None: a tenth of the steps."""

    decay_steps: int | None = None
    """Length of the decay at the end. None: a sixth of the steps."""

    decay_style: str = "minus_sqrt"
    """Shape of the decay: minus_sqrt (1 - sqrt), linear, cosine, exponential."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""

    clip_grad: float = 1.0
    """Largest global gradient norm. 0: gradients are not clipped."""

    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factors of some tensors' learning rates: pattern of Megatron names (`*`, `?`), or one of the words attention,
    latents, mlp, norms -> factor. Of those that match a tensor the last one counts. 0: frozen."""

    spike_factor: float | None = None
    """Leave out a step whose gradient norm, before clipping, is more than this many times the median of the last
    spike_window updates. None: none is."""

    spike_window: int = 100
    """Updates that the median is of; before there are so many no step is left out."""

    ema_decay: float = 0.0
    """Keep a moving average of the weights beside them, with this factor of what it was at each update. 0: none."""

    def __post_init__(self) -> None:
        styles = ("minus_sqrt", "linear", "cosine", "exponential")
        require_one_of("optimizer.decay_style", self.decay_style, styles)
        if not 0 <= self.lr < math.inf:
            raise UserError(f"optimizer.lr: {self.lr} is not a number of at least 0")
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optimizer.min_lr: {self.min_lr} is not between 0 and optimizer.lr {self.lr}")
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"optimizer.{key}: {getattr(self, key)}; valid: at least 0, and less than 1")
        if not 0 < self.adam_eps < math.inf:  # with 0 a weight whose gradients were all 0 would become NaN
            raise UserError(f"optimizer.adam_eps: {self.adam_eps} is not a positive number")
        for key in ("weight_decay", "clip_grad"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"optimizer.{key}: {getattr(self, key)} is not a number of at least 0")
        for pattern, factor in self.lr_scale.items():
            if not 0 <= factor < math.inf:
                raise UserError(f"optimizer.lr_scale: {factor} for '{pattern}'; valid: 0 (frozen) or a positive number")
        if self.spike_factor is not None and not 1 <= self.spike_factor < math.inf:
            raise UserError(f"optimizer.spike_factor: {self.spike_factor} is not a number of at least 1")
        require_at_least("optimizer.spike_window", self.spike_window, 1)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay: {self.ema_decay}; valid: 0 (no average), or more and less than 1")


SEEDS = 1 << 32
"""How many there are: those of NumPy's generator, which shuffles the samples."""

LORA_TARGETS = ("attention",)
"""What a conversion changes."""


@dataclass(frozen=True)
class LoraSettings:
    """Train low-rank updates of some matrices, W + alpha / rank B A, and nothing else (Hu et al., arXiv 2106.09685)."""

    rank: int | None = None
    """Rows of A and columns of B. None: no such updates, all weights are trained."""

    alpha: float | None = None
    """The update's factor is alpha / rank. None: rank, so that it is 1."""

    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """The layers' matrices that get one: patterns of Megatron names (`*`, `?`), or the words of optimizer.lr_scale."""

    def __post_init__(self) -> None:
        if self.rank is not None:
            require_at_least("lora.rank", self.rank, 1)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha: {self.alpha} is not a positive number")
        if self.rank is None and (self.alpha is not None or self.targets != list(LORA_TARGETS)):
            raise UserError("lora: alpha or targets are given, lora.rank is not")

    @property
    def factor(self) -> float:
        """alpha / rank; 1 without a rank."""
        return 1.0 if self.rank is None else self.saved[ALPHA] / self.rank

    @property
    def saved(self) -> dict[str, float]:
        """What a checkpoint says of the updates beside their tensors."""
        if self.rank is None:
            return {}
        return {ALPHA: float(self.rank if self.alpha is None else self.alpha)}


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything a run is made of."""

    load: str | None = None
    """Megatron checkpoint to start from (weights only), made by tools/convert_hf_to_megatron.py."""

    save: str | None = None
    """Checkpoint root of this run. Where it holds a complete step already, the run resumes from there."""

    steps: int = 1000
    """Optimizer steps in all, resumed ones included."""

    micro_batch_size: int = 1
    """Samples a forward pass on one data-parallel rank."""

    global_batch_size: int = 64
    """Samples an optimizer step over all ranks."""

    dtype: str = "auto"
    """float32, or bfloat16 with float32 master weights and gradients; auto: bfloat16 on a GPU, float32 on a CPU."""

    implementation: str = "auto"
    """What layers are built from: local (plain torch), transformer_engine, or auto (the latter where a GPU and the
    package are there). With transformer_engine, projections, rotation and their gradients of a converted model's
    attention are our fused path; transformer_engine_unfused takes one module after another, and local_fused is the
    fused path without Transformer Engine."""

    cuda_graph: bool = False
    """Start all kernels of the forward and backward passes of a step at once, from the fourth step on; for models so
    small that a GPU waits for its host."""

    recompute: str = "none"
    """Activations recomputed in the backward pass: none, latent (keys and values of a converted model's fused path,
    from what its cache would hold), selective (core attention), full (every layer)."""

    fp8: str | None = None
    """Matrix products of the layers in 8 bits by Transformer Engine, on a GPU that has them: delayed or current, the
    ways to find a tensor's scale. Attention, embedding and output layer stay in 16 bits, weights as they are."""

    save_interval: int = 500
    """Steps between checkpoints; the last step is saved always."""

    save_async: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory of what each process holds."""

    keep_last: int | None = None
    """How many of the newest checkpoints to keep; older ones go once a newer one is complete. None: all."""

    keep_best: bool = False
    """Save each step at which validation gives the lowest loss so far, and keep the last of them whatever keep_last."""

    on_nan: str = "stop"
    """What to do in a step whose loss or gradient norm is NaN or infinite: stop the run, or skip the step's update."""

    max_skips_in_a_row: int = 10
    """Stop where more steps than this follow each other without an update, left out as NaN or as a spike."""

    z_loss: float = 0.0
    """Factor of the squared logarithm of the softmax's normaliser, added to the loss of each token, so that logits do
    not drift (PaLM: 1e-4). 0: none."""

    wandb: str | None = None
    """Weights & Biases project to log to as well, offline under save/wandb unless WANDB_MODE says otherwise."""

    peak_tflops: float | None = None
    """What one GPU can do, in TFLOP/s, that the log's MFU is a part of. None: the data sheet's for bf16 where the GPU
    is known and the run is in bf16 (H100, H200, A100, B200); otherwise no MFU."""

    deterministic: bool = False
    """Use only kernels that give the same bits each time, so that a run on the same GPUs can be repeated exactly; on a
    CPU all do."""

    seed: int = 1234
    """Order of the samples, and where lora begins; from 0 to 4294967295."""

    data: DataSettings = field(default_factory=DataSettings)

    validation: ValidationSettings = field(default_factory=ValidationSettings)

    distillation: DistillationSettings = field(default_factory=DistillationSettings)

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    lora: LoraSettings = field(default_factory=LoraSettings)

    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for key in ("steps", "micro_batch_size", "global_batch_size", "save_interval"):
            require_at_least(key, getattr(self, key), 1)
        if self.keep_last is not None:
            require_at_least("keep_last", self.keep_last, 1)
        require_at_least("max_skips_in_a_row", self.max_skips_in_a_row, 1)
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed: {self.seed} is not from 0 to {SEEDS - 1}")
        for key, valid in (
            ("on_nan", ("stop", "skip")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("implementation", ("auto", *IMPLEMENTATIONS)),
            ("recompute", ("none", "latent", "selective", "full")),
        ):
            require_one_of(key, getattr(self, key), valid)
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"z_loss: {self.z_loss} is not a number of at least 0")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"peak_tflops: {self.peak_tflops} is not a positive number")
        if self.fp8 is not None:
            require_one_of("fp8", self.fp8, ("delayed", "current"))
        if self.cuda_graph:
            self._check_cuda_graph()
        if self.keep_best and self.validation.data is None and not self.data.shares[1] > 0:
            raise UserError("keep_best: needs validation.data, or a validation share in data.split")
        warmup, decay = self.warmup_steps, self.decay_steps
        if warmup + decay > self.steps or warmup < 0 or decay < 1:
            raise UserError(
                f"optimizer.warmup_steps {warmup} + optimizer.decay_steps {decay} do not fit into steps {self.steps}"
            )
        if (given := self.distillation.decay_steps) is not None and given > self.steps:
            raise UserError(f"distillation.decay_steps: {given} does not fit into steps {self.steps}")

    def _check_cuda_graph(self) -> None:
        """What changes from step to step on the host cannot be in a graph; pipelines are not tried yet."""
        for key, found, valid in (
            ("parallel.pipeline_model_parallel_size", self.parallel.pipeline_model_parallel_size, 1),
            ("parallel.overlap_param_gather", self.parallel.overlap_param_gather, False),
        ):
            if found != valid:
                raise UserError(f"{key}: {found} is not possible with cuda_graph; valid: {str(valid).lower()}")

    @property
    def warmup_steps(self) -> int:
        given = self.optimizer.warmup_steps
        return self.steps // 10 if given is None else given

    @property
    def decay_steps(self) -> int:
        given = self.optimizer.decay_steps
        return max(1, self.steps // 6) if given is None else given

    def distillation_weight(self, step: int) -> float:
        """w of this step, counted from 1: of nothing but the step, so that a resumed run goes on with it."""
        wanted = self.distillation
        if wanted.final_weight is None:
            return wanted.weight
        length = self.decay_steps if wanted.decay_steps is None else wanted.decay_steps
        done = min(max(step - (self.steps - length), 0) / length, 1.0)
        return (1 - done) * wanted.weight + done * wanted.final_weight


def _check_blend(key: str, value: Any) -> None:
    """Refuse what is neither one prefix of token files nor several with weights."""
    if isinstance(value, dict):
        blend_weights(key, value)
    elif value is not None and not isinstance(value, str):
        raise UserError(f"{key}: give one prefix or a mapping prefix -> weight")
