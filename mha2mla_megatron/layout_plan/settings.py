"""What is planned: a run, as its own settings say, the model's shapes, and the GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.checkpoint.megatron import HF_FOLDER
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.frequencies import inverse_frequencies
from mha2mla_megatron.ignored_settings import refuse_ignored_low_rank, refuse_ignored_rope
from mha2mla_megatron.layout_plan.schedule import idle_part
from mha2mla_megatron.model.parallel import check_layout
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.checks import check_graph, check_kernels, check_reset, check_samples, check_teacher
from mha2mla_megatron.training.config import FinetuneSettings

GIB = 2**30


@dataclass(frozen=True)
class PlanSettings(FinetuneSettings):
    """Settings of tools/plan.py: those of the run that is planned, so that its YAML file is one of these too."""

    model: str | None = None
    """Folder with the model's config.json, or that file, original or converted; no weights are needed. None: the
    folder hf of load."""

    conversion: str | None = None
    """YAML file of tools/convert_mha_to_mla.py: plan for what it makes of an original model."""

    partial_rope: PartialRopeConfig = field(default_factory=PartialRopeConfig)

    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    device: str = "cuda"
    """Where the run will be, cuda or cpu; decides what dtype=auto and implementation=auto are."""

    gpus: int = 8
    """GPUs of the run, all nodes together: one process each."""

    gpus_per_node: int = 8
    """Tensor parallelism is suggested within a node only."""

    gpu_memory: float = 80.0
    """GiB of one GPU."""

    reserve: float = 6.0
    """GiB of it that the plan leaves alone: CUDA context, NCCL's and cuBLAS's buffers, fragments."""

    output: str | None = None
    """JSON file for all numbers, in bytes."""

    overwrite: bool = False
    """Replace output if it exists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("gpus", "gpus_per_node"):
            require_at_least(key, getattr(self, key), 1)
        for key in ("gpu_memory", "reserve"):
            if not math.isfinite(getattr(self, key)):
                raise UserError(f"{key}: {getattr(self, key)} is not a number of GiB")
        if self.gpu_memory <= 0:
            raise UserError(f"gpu_memory: {self.gpu_memory:g} GiB is not above 0")
        if not 0 <= self.reserve < self.gpu_memory:
            raise UserError(f"reserve: {self.reserve:g} GiB is not between 0 and gpu_memory {self.gpu_memory:g}")
        require_one_of("device", self.device, ("cuda", "cpu"))
        if self.device == "cpu" and self.implementation not in ("auto", "local"):
            raise UserError(f"implementation: {self.implementation} needs device=cuda; valid with device=cpu: local")

    @property
    def planned_dtype(self) -> str:
        """float32 or bfloat16."""
        return ("bfloat16" if self.device == "cuda" else "float32") if self.dtype == "auto" else self.dtype

    @property
    def planned_implementation(self) -> str:
        """One of `IMPLEMENTATIONS`."""
        automatic = "transformer_engine" if self.device == "cuda" else "local"
        return automatic if self.implementation == "auto" else self.implementation

    @property
    def room(self) -> int:
        """Bytes that the run may take of a GPU."""
        return int((self.gpu_memory - self.reserve) * GIB)

    @property
    def data_size(self) -> int:
        return self.gpus // self.parallel.model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model, and share its optimizer: data- and context-parallel ones."""
        return self.data_size * self.parallel.context_parallel_size

    @property
    def micro_batches(self) -> int:
        """Forward passes of each rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    @property
    def bubble(self) -> float:
        """Part of a step in which a pipeline stage waits."""
        return idle_part(self.parallel, self.micro_batches)


def planned_architecture(settings: PlanSettings) -> Architecture:
    """The model's shapes, after the conversion that the settings name. Raises UserError where they cannot be."""
    if settings.model is None and settings.load is None:
        raise UserError("model is not set; give model=FOLDER, with a config.json, or load=CHECKPOINT")
    path = Path(settings.model) if settings.model is not None else Path(str(settings.load)) / HF_FOLDER
    architecture = _read_config_at(path)
    given = MHA2MLAConfig(settings.partial_rope, settings.low_rank)
    mla = given
    if settings.conversion is not None:
        if given != MHA2MLAConfig():
            raise UserError("conversion: partial_rope and low_rank are given too; give one or the other")
        from mha2mla_megatron.convert import ConvertSettings  # brings in all of the conversion

        convert = load_settings(ConvertSettings, [], Path(settings.conversion))
        if convert.budgeted:
            raise UserError(
                f"{settings.conversion}: a cache budget chooses r and c from statistics, which a plan has not; "
                "give partial_rope.qk_rope_head_dim and low_rank.kv_lora_rank instead"
            )
        mla = MHA2MLAConfig(convert.partial_rope, convert.low_rank)
    elif given == MHA2MLAConfig():
        return architecture
    else:
        refuse_ignored_rope(given.partial_rope, None)
        refuse_ignored_low_rank(given.low_rank, None, budgeted=False, healed=False)
    if architecture.mla is not None:
        raise UserError(f"{path}: is converted already; leave out conversion, partial_rope and low_rank")
    mla = architecture.resolve(mla)
    return architecture.converted(mla)


def planned_teacher(settings: PlanSettings) -> Architecture | None:
    """The shapes of distillation.teacher: a Megatron checkpoint, or a folder with a config.json, or that file."""
    if settings.distillation.teacher is None:
        return None
    path = Path(settings.distillation.teacher)
    try:
        return _read_config_at(path / HF_FOLDER if (path / HF_FOLDER).is_dir() else path)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None


def check_planned(settings: PlanSettings, architecture: Architecture, teacher: Architecture | None) -> None:
    """Refuse, as UserError, what tools/finetune.py refuses of this model at these settings and on so many GPUs."""
    check_layout(architecture, settings.parallel, settings.gpus)
    check_samples(settings, architecture, settings.gpus)
    check_reset(settings, architecture, settings.planned_implementation)
    check_kernels(settings, architecture, settings.planned_implementation, settings.planned_dtype)
    check_graph(settings, settings.device)
    for model in (architecture, teacher):
        if model is not None and model.experts is not None:
            model.experts.check_router()
    if teacher is not None:
        check_teacher(settings, teacher, architecture, settings.gpus)


def _read_config_at(path: Path) -> Architecture:
    """Refuses a rope scaling that training refuses."""
    architecture = read_architecture(path.parent if path.name == "config.json" else path)
    if architecture.rope_parameters["rope_type"] != "default":
        inverse_frequencies(architecture)  # asks transformers, which takes seconds to import
    return architecture
