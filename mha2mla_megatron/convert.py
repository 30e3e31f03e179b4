"""MHA -> MLA: a whole model as a stream of layers, written as a Hugging Face folder or as a Megatron checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import Architecture, read_architecture, read_config
from mha2mla_megatron.attention_converter import AttentionConverter
from mha2mla_megatron.calibration.original import OriginalModel
from mha2mla_megatron.checkpoint.causal_lm import pick_device, rank_device
from mha2mla_megatron.checkpoint.folders import copy_companions
from mha2mla_megatron.checkpoint.hf import HFReader, HFWriter, parse_size, write_config
from mha2mla_megatron.checkpoint.mapping import parameter_map
from mha2mla_megatron.checkpoint.megatron_writer import MegatronWriter
from mha2mla_megatron.checkpoint.resume import identity, resumable_folder
from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.conversion_picture import draw_allocation
from mha2mla_megatron.errors import UserError, require_one_of
from mha2mla_megatron.families import LAYER_TYPES
from mha2mla_megatron.frequencies import warn_of_untrainable_scaling
from mha2mla_megatron.healing import Healer, HealSettings
from mha2mla_megatron.ignored_settings import refuse_ignored_low_rank, refuse_ignored_rope
from mha2mla_megatron.planning import AllocationSettings, Plan, Planner, with_plan
from mha2mla_megatron.ranks import launched_ranks, process_group

OF_ORIGINALS = (
    "auto_map",
    "decoder_sparse_step",
    "layer_types",
    "max_window_layers",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "output_router_logits",
    "router_aux_loss_coef",
    "sliding_window",
    "torch_dtype",
    "use_sliding_window",
)
"""Keys of an original's config.json that a converted model has not, or in one form for all families."""

MODEL_CLASSES = {
    "mha2mla_llama": "modeling_mha2mla.MHA2MLALlama",
    "mha2mla_mixtral": "experts_mha2mla.MHA2MLAMixtral",
    "mha2mla_qwen3_moe": "experts_mha2mla.MHA2MLAQwen3Moe",
}
"""The file and the beginning of the name of each converted family's classes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CKPT_FORMATS = ("hf", "torch_dist")
OF_THE_OUTPUT = ("ckpt_format", "device", "max_shard_size", "overwrite")
"""Settings that no weight depends on."""

SHARED_UP_TO = 0.5
"""Of the original cache: up to here rotated keys of grouped-query attention are shared by default. Measured to be
better at 0.3125 and below, with three key/value heads; not measured with as many as query heads."""


@dataclass(frozen=True)
class ConvertSettings:
    """Settings of tools/convert_mha_to_mla.py."""

    statistics: str | None = None
    """The file of tools/calibrate.py. It stands in for partial_rope.scores and low_rank.statistics where these are not
    given, and so turns on the data-aware choices."""

    cache_budget: float | None = None
    """Instead of r and c: the part of the original's cached elements that may remain (0.3125 saves 68.75 %)."""

    cache_elements: float | None = None
    """The same as elements per token and layer, on average over layers."""

    allocation: AllocationSettings = field(default_factory=AllocationSettings)

    partial_rope: PartialRopeConfig = field(default_factory=PartialRopeConfig)

    low_rank: LowRankConfig = field(default_factory=LowRankConfig)

    heal: HealSettings = field(default_factory=HealSettings)

    dtype: str = "auto"
    """Type of the written weights: auto (as the source), float32, bfloat16 or float16. Factors are computed in
    float64, healing in float32."""

    device: str = "auto"
    """Where the work is done: auto (the GPU if there is one, under torchrun the rank's), cpu, cuda, cuda:1, ..."""

    ckpt_format: str = "hf"
    """What DST becomes: hf, a Hugging Face folder; torch_dist, a Megatron checkpoint, the same that
    tools/convert_hf_to_megatron.py makes of that folder, with the report in its `hf` folder."""

    max_shard_size: str = "5GB"
    """Largest safetensors file written. A Megatron checkpoint has one file."""

    overwrite: bool = False
    """Replace DST if it exists and is not empty."""

    def __post_init__(self) -> None:
        require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        require_one_of("ckpt_format", self.ckpt_format, CKPT_FORMATS)
        pick_device(self.device)
        parse_size(self.max_shard_size, "max_shard_size")
        if self.statistics is not None:
            for key, name in (("partial_rope", "scores"), ("low_rank", "statistics")):
                part = getattr(self, key)
                if getattr(part, name) is None:
                    object.__setattr__(self, key, dataclasses.replace(part, **{name: self.statistics}))
        if self.cache_budget is not None and self.cache_elements is not None:
            raise UserError("cache_budget and cache_elements are both set; give one")
        if self.cache_budget is not None and not 0 < self.cache_budget <= 1:
            raise UserError(
                f"cache_budget: {self.cache_budget} is not a fraction of the original cache, above 0 and at most 1"
            )
        if self.cache_elements is not None and not (math.isfinite(self.cache_elements) and self.cache_elements > 0):
            raise UserError(f"cache_elements: {self.cache_elements} is not a number above 0")
        if self.budgeted:
            for key, value in (
                ("partial_rope.qk_rope_head_dim", self.partial_rope.qk_rope_head_dim),
                ("low_rank.kv_lora_rank", self.low_rank.kv_lora_rank),
                ("low_rank.k_lora_rank", self.low_rank.k_lora_rank),
                ("low_rank.d_kv", self.low_rank.d_kv),
            ):
                if value is not None:
                    raise UserError(f"{key}: a cache budget chooses r and c; give one or the other")
            if self.low_rank.method == "none":
                raise UserError("low_rank.method=none saves no cache, so it cannot meet a cache budget")
            if self.allocation.key_share < 1 and self.low_rank.method not in ("auto", "joint"):
                raise UserError(
                    f"allocation.key_share: of low_rank.method=joint alone, which is {self.low_rank.method}; of split "
                    "the budget divides the width"
                )
            if self.partial_rope.strategy == "full":
                raise UserError("partial_rope.strategy=full keeps every rotation: give low_rank.kv_lora_rank instead")
        elif self.allocation != AllocationSettings():
            raise UserError("allocation: these settings spend a cache budget; give cache_budget or cache_elements too")
        healed = self.heal.steps > 0
        for key, used in (("a cache budget", self.budgeted), ("heal.steps", healed)):
            if used and self.low_rank.statistics is None:
                raise UserError(f"{key} needs statistics=FILE (of tools/calibrate.py)")
        refuse_ignored_rope(self.partial_rope, self.statistics)
        refuse_ignored_low_rank(self.low_rank, self.statistics, self.budgeted, healed)

    @property
    def budgeted(self) -> bool:
        return self.cache_budget is not None or self.cache_elements is not None

    def budget(self, original: Architecture) -> int:
        """Cached elements per token that may remain, over all layers."""
        return int(self.cache_share(original) * original.whole_cache_elements * original.num_layers + 1e-6)

    def cache_share(self, original: Architecture) -> float:
        """The part of the original's cache that may remain, of a model with a budget."""
        if self.cache_budget is not None:
            return self.cache_budget
        elements, before = self.cache_elements, original.whole_cache_elements
        assert elements is not None
        if elements > before:
            raise UserError(f"cache_elements: {elements:g} per token and layer; the original caches {before}")
        return elements / before


def convert_model(source: Path, target: Path, settings: ConvertSettings) -> dict[str, Any] | None:
    """Convert the model of a Hugging Face folder; returns the report that it wrote on rank 0, None on the others.

    The source is an original, or a model with partial RoPE alone (low_rank.method=none), which is factored then.

    One layer is in memory at a time. After an interrupt the same call goes on from the last layer that was written.
    Under torchrun the ranks share the layers.

    Raises UserError before anything is written for a model or settings that cannot be converted.
    """
    original = read_architecture(source)
    rope = settings.partial_rope
    if original.mla is not None:
        _check_second_stage(source, original.mla, settings)
        rope = original.mla.partial_rope
    mla = MHA2MLAConfig(rope, settings.low_rank)
    if settings.budgeted:
        mla = _open_ranks(mla, original, settings.cache_share(original))
    mla = original.resolve(mla)
    if settings.heal.steps > 0 and launched_ranks().world > 1:
        raise UserError(
            f"heal.steps={settings.heal.steps}: a layer is healed against what the healed layers below it put out, "
            "so that there is nothing for several processes to share; start one"
        )
    device = rank_device(settings.device)
    reader = HFReader(source, original)
    converter = AttentionConverter(reader, original, mla, device)
    report: dict[str, Any] = {"source": str(source)}
    files = (settings.partial_rope.scores, settings.low_rank.statistics)
    what = identity(f"MHA -> MLA on {device.type}", settings, [source, *(Path(file) for file in files if file)])
    with process_group() as ranks, resumable_folder(target, settings.overwrite, what, ranks) as partial:
        healer = plan = None
        if settings.budgeted or settings.heal.steps > 0:
            assert converter.statistics is not None
            model, sequences = OriginalModel(reader, original, device), converter.statistics.sequences
            if settings.budgeted:
                if "plan" not in partial.done:
                    planner = Planner(converter, settings.allocation, model, sequences, settings.heal, ranks)
                    made = dataclasses.asdict(planner.plan(settings.budget(original)))
                    partial.first(lambda: partial.finish("plan", made))
                plan = Plan(**partial.done["plan"])
                mla = original.resolve(with_plan(plan, mla))
                report["allocation"] = plan.report
            if settings.heal.steps > 0:
                healer = Healer(model, original, sequences, settings.heal)
        report["mha2mla"], report["heal"] = dataclasses.asdict(mla), dataclasses.asdict(settings.heal)
        converted = original.converted(mla)
        tensors = _planned_tensors(reader, converted, settings.dtype)
        if settings.ckpt_format == "hf":
            writer = HFWriter(partial, tensors, parse_size(settings.max_shard_size, "max_shard_size"))
        else:
            if ranks.rank == 0:
                warn_of_untrainable_scaling(converted, source)
            writer = MegatronWriter(partial, tensors, converted)
        partial.together(lambda: _write_tensors(writer, converter, converted, healer))

        def complete() -> None:
            writer.close()
            report["layers"] = [partial.done[_attention(layer)] for layer in range(original.num_layers)]
            _summarise(report, original)
            write_config(writer.hf, converted_config(read_config(source), converted, settings.dtype))
            copy_companions(source, writer.hf)
            (writer.hf / "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n")
            if plan is not None:
                draw_allocation(report, original.head_dim, writer.hf / "allocation.png")

        partial.first(complete)
    return report if ranks.rank == 0 else None


def _check_second_stage(source: Path, first: MHA2MLAConfig, settings: ConvertSettings) -> None:
    """Refuse settings that cannot factor a model with partial RoPE alone, whose rotation is as it is."""
    if first.low_rank.method != "none":
        raise UserError(
            f"{source}: is converted already (low_rank.method={first.low_rank.method}); valid: an original, or a model "
            "with partial RoPE alone"
        )
    if settings.low_rank.statistics is not None or settings.partial_rope.scores is not None:
        raise UserError(
            f"{source}: has partial RoPE already, and statistics are of an original model; it is factored without them "
            "(low_rank.objective=weights), and without a cache budget and healing, which need them"
        )
    if settings.partial_rope != PartialRopeConfig():
        rope = first.partial_rope
        raise UserError(
            f"partial_rope: {source} has its rotation already (strategy {rope.strategy}, qk_rope_head_dim "
            f"{rope.qk_rope_head_dim}); leave partial_rope unset"
        )
    if settings.low_rank.resolve(1).method == "none":
        raise UserError(f"{source}: has partial RoPE already; give low_rank.kv_lora_rank or low_rank.d_kv to factor it")


def _open_ranks(mla: MHA2MLAConfig, original: Architecture, share: float) -> MHA2MLAConfig:
    """The config with a method, whether rotated keys are shared, and placeholders where the plan will put r and c.

    share: of the original cache that may remain. With much of it each head can keep what rotations matter, and with all
    of it everything: shared keys cannot.
    """
    method = "joint" if mla.low_rank.method == "auto" else mla.low_rank.method
    shared = mla.partial_rope.shared
    if shared is None:
        possible = mla.partial_rope.chosen_strategy == "activation" and not original.qk_norm
        grouped = 1 < original.num_key_value_heads < original.num_attention_heads
        shared = possible and grouped and share <= SHARED_UP_TO
    return MHA2MLAConfig(
        dataclasses.replace(mla.partial_rope, qk_rope_head_dim=0, shared=shared),
        dataclasses.replace(mla.low_rank, method=method, kv_lora_rank=1),
    )


def converted_config(config: dict[str, Any], converted: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of the converted model: the original's, in Llama's terms, plus the conversion."""
    assert converted.mla is not None
    config = {key: value for key, value in config.items() if key not in OF_ORIGINALS}
    classes = MODEL_CLASSES[converted.model_type]
    name = classes.split(".")[1]
    config.update(
        architectures=[f"{name}ForCausalLM"],
        model_type=converted.model_type,
        auto_map={
            "AutoConfig": f"configuration_mha2mla.{name}Config",
            "AutoModel": f"{classes}Model",
            "AutoModelForCausalLM": f"{classes}ForCausalLM",
        },
        num_key_value_heads=converted.num_key_value_heads,
        head_dim=converted.head_dim,
        max_position_embeddings=converted.max_position_embeddings,
        rms_norm_eps=converted.rms_norm_eps,
        rope_parameters=converted.rope_parameters,
        attention_bias=converted.qkv_bias,
        attention_output_bias=converted.attention_output_bias,
        mlp_bias=converted.mlp_bias,
        tie_word_embeddings=converted.tie_word_embeddings,
        qk_norm=converted.qk_norm,
        mha2mla=_published(converted.mla),
    )
    layers = range(converted.num_layers)
    if converted.no_rope_layers:
        config["no_rope_layers"] = [int(layer not in converted.no_rope_layers) for layer in layers]
    if converted.window_layers:
        config["sliding_window"] = converted.sliding_window
        config["layer_types"] = [LAYER_TYPES[layer in converted.window_layers] for layer in layers]
    if (experts := converted.experts) is not None:
        config["mlp_only_layers"] = [layer for layer in layers if layer not in experts.layers]
        config["num_local_experts"], config["num_experts_per_tok"] = experts.num_experts, experts.num_experts_per_tok
        config[experts.names.intermediate_size] = experts.intermediate_size
        config["norm_topk_prob"] = experts.norm_topk_prob
    if dtype != "auto":
        config["dtype"] = dtype
    return config


def _published(mla: MHA2MLAConfig) -> dict[str, Any]:
    """The conversion's settings with file names in place of paths, which say nothing on another machine."""
    values = dataclasses.asdict(mla)
    for part, key in (("partial_rope", "scores"), ("low_rank", "statistics")):
        if values[part][key] is not None:
            values[part][key] = Path(values[part][key]).name
    return values


def _planned_tensors(reader: HFReader, converted: Architecture, dtype: str) -> dict[str, torch.Tensor]:
    """Every tensor of the converted model, in its type, on the meta device."""
    planned = {}
    for name, shape in converted.tensor_shapes().items():
        # New ones have their layer's type; with dtype=float32 they keep more digits than a bfloat16 source has.
        source = reader.dtypes.get(name) or reader.dtypes[re.sub(r"self_attn\..*", "self_attn.v_proj.weight", name)]
        if name.endswith("rope_pairs"):
            written = torch.int64
        else:
            written = source if dtype == "auto" else DTYPES[dtype]
        planned[name] = torch.empty(shape, dtype=written, device="meta")
    return planned


def _write_tensors(
    writer: HFWriter | MegatronWriter, converter: AttentionConverter, converted: Architecture, healer: Healer | None
) -> None:
    """Write this rank's share of what is not there yet.

    A part is what one Megatron tensor is made of, or a layer's attention, with a result to report.
    """
    reader, partial, planned = converter.reader, writer.partial, writer.tensors
    parts: dict[str, list[str]] = {}
    for row in parameter_map(converted):
        parts.setdefault(re.sub(r"(?<=\.self_attn)\..*", "", row.hf[0]), []).extend(row.hf)
    layers = {_attention(layer): layer for layer in range(converted.num_layers)}
    sizes = {part: sum(planned[name].nbytes for name in names) for part, names in parts.items()}

    def follow(healer: Healer, layer: int) -> None:
        part = _attention(layer)
        written = {name.removeprefix(f"{part}."): writer.read(name) for name in parts[part]}
        healer.follow(layer, converted.layout(layer), written)

    for part in partial.parts_to_do("MHA -> MLA", sizes, slow=layers):
        names, layer = parts[part], layers.get(part)
        if layer is None:
            tensors, result = {name: reader[name] for name in names}, None
        else:
            while healer is not None and healer.next_layer < layer:
                follow(healer, healer.next_layer)
            tensors, result = _convert_layer(converter, converted, healer, layer)
        assert tensors.keys() == set(names), f"converted, but not planned or the reverse: {tensors.keys() ^ names}"
        for name in names:
            writer.add(name, _cast(name, tensors[name].cpu(), planned[name].dtype))
        partial.finish(part, result)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the type that is written. Raises UserError for what float16 has no room for."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and not cast.isfinite().all():
        raise UserError(f"{name}: has values beyond float16's largest, {torch.finfo(dtype).max:g}; give another dtype")
    return cast


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def _convert_layer(
    converter: AttentionConverter, converted: Architecture, healer: Healer | None, layer: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A converted attention layer's tensors by their whole names, and what the report says of it."""
    layout = converted.layout(layer)
    result = converter.convert(layer, layout)
    tensors = result.tensors if healer is None else healer.heal(layer, layout, result.tensors)
    return {f"{_attention(layer)}.{name}": tensor for name, tensor in tensors.items()}, {
        "layer": layer,
        "qk_rope_head_dim": layout.qk_rope_head_dim,
        "qk_nope_head_dim": layout.qk_nope_head_dim,
        "kv_lora_rank": layout.kv_lora_rank,
        "k_lora_rank": layout.k_lora_rank,
        "latent_width": layout.kv_down_dim,
        "rope_pairs": result.pairs.tolist(),
        **result.errors,
        "cache_elements_before": 2 * layout.value_dim,
        "cache_elements_after": layout.cache_elements,
    }


def _summarise(report: dict[str, Any], original: Architecture) -> None:
    layers = report["layers"]
    before = sum(layer["cache_elements_before"] for layer in layers)
    after = sum(layer["cache_elements_after"] for layer in layers)
    report["cache_elements_per_token"] = {"before": before, "after": after, "saved": round(1 - after / before, 6)}
    report["dropped"] = (
        ["k_proj.bias on unrotated dims: adds one number to all scores of a query, which softmax ignores"]
        if original.qkv_bias and not original.qk_norm and original.mla is None
        else []
    )
