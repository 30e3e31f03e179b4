"""tools/plan.py against models that are built, bytes that autograd keeps, and published or measured numbers."""

from __future__ import annotations

import dataclasses
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.layout_plan.settings import PlanSettings, planned_architecture
from mha2mla_megatron.model.parallel import initialize_parallel
from mha2mla_megatron.settings import load_settings
from mha2mla_megatron.training.distillation import Distillation
from mha2mla_megatron.training.step import build_training_model, forward_step
from tests.conftest import ROOT, refused, run_tool
from tests.megatron_cases import converted_config, original_config
from tests.saved_activations import SavedActivations, random_batch

EXAMPLES = ROOT / "examples" / "multi_node"
GIB = 2**30


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A settings file in which everything is at its default."""
    (tmp_path / "run.yaml").write_text("")
    return tmp_path / "run.yaml"


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """The word for a folder with nothing but this config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return f"model={folder}"


def plan(config: Path, *words: object) -> dict[str, Any]:
    """What the tool writes."""
    output = config.parent / "plan.json"
    run_tool("plan", config, f"output={output}", "overwrite=true", *words)
    return json.loads(output.read_text())


def test_parameters_of_llama_2(empty: Path) -> None:
    """The published models' counts, from their configs alone, whatever the layout: summed over stages, an unsplit norm
    or latent projection counted once for each tensor-parallel rank."""
    published = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
    for name, number in published.items():
        words = (f"model={EXAMPLES / f'llama-2-{name}'}", "gpus=8", "gpu_memory=2000")
        (whole,) = plan(empty, *words)["stages"]
        assert whole["parameter_count"] == number
        stages = plan(empty, *words, "parallel.pipeline_model_parallel_size=8")["stages"]
        assert len(stages) == 8 and sum(stage["parameter_count"] for stage in stages) == number


MEASURED = {
    "original 135M": (("576", "1536", "30", "9", "3", "16"), (), 24.0),
    "converted 135M": (("576", "1536", "30", "9", "3", "16"), ("low_rank.d_kv=32",), 24.1),
    "original 1.7B": (("2048", "8192", "24", "32", "32", "8"), (), 62.0),
    "converted 1.7B": (("2048", "8192", "24", "32", "32", "8"), ("low_rank.d_kv=32",), 62.1),
}
"""hidden, MLP, layers, heads, key/value heads, micro batch of 2048 tokens; conversion; GiB on an H100, of
docs/performance.md."""


@pytest.mark.parametrize("case", MEASURED)
def test_peak_measured_on_a_gpu(empty: Path, case: str) -> None:
    """Within 3 %, a few temporary tensors of a layer's kernels, which the plan does not follow one by one."""
    (hidden, mlp, layers, heads, groups, batch), conversion, measured = MEASURED[case]
    config = original_config(
        vocab_size=49152, hidden_size=int(hidden), intermediate_size=int(mlp), num_hidden_layers=int(layers),
        num_attention_heads=int(heads), num_key_value_heads=int(groups), head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = write_config(empty.parent / "model", config)
    found = plan(empty, model, "gpus=1", f"micro_batch_size={batch}", f"global_batch_size={batch}", *conversion)
    assert found["total"] / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("word", "measured"),
    [("recompute=none", 40.3), ("recompute=latent", 39.4), ("recompute=full", 32.9), ("fp8=current", 42.6)],
)
def test_peak_of_recomputing_and_8_bits_measured_on_a_gpu(empty: Path, word: str, measured: float) -> None:
    """Those of docs/performance.md at 7B with 8 layers, within 1 %: the temporary tensors of kernels, which are not
    followed. 8 bits take more here, not less: each weight of the layers has two copies of a byte."""
    config = original_config(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    found = plan(
        empty, write_config(empty.parent / "model", config), "gpus=1", "micro_batch_size=2", "global_batch_size=2",
        "data.sequence_length=4096", "partial_rope.qk_rope_head_dim=16", "low_rank.d_kv=64", word,
    )  # fmt: skip
    assert found["total"] / GIB == pytest.approx(measured, rel=0.01)


FAMILIES: dict[str, dict[str, Any]] = {
    "norms": {"model_type": "qwen3"},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "experts and norms": {
        "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "norm_topk_prob": False, "mlp_only_layers": [0],
    },
}  # fmt: skip
"""What config.json has instead of a Llama's."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's kernels keep")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "none"), ("llama", "joint"), ("llama", "half"), ("llama", "split"), ("llama", "shared"),
        ("norms", "none"), ("norms", "value"),
        ("experts", "none"), ("experts and norms", "value"),
    ],
)  # fmt: skip
def test_activations_are_those_that_autograd_keeps(empty: Path, family: str, method: str, recompute: str) -> None:
    """Within 1 %: the plan leaves out token ids and the loss mask, 12 bytes of the 6000 and more of each token.

    However unevenly a random router chooses experts: that what they keep does not depend on it is part of the plan.
    """
    length, samples = 256, 2
    for groups, dtype in ((2, "float32"), (4, "bfloat16")):
        config = original_config(
            vocab_size=512, hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=groups, head_dim=64, max_position_embeddings=length, **FAMILIES.get(family, {}),
        )  # fmt: skip
        words = [
            write_config(empty.parent / "model", config), "gpus=1", "device=cpu", f"recompute={recompute}",
            f"dtype={dtype}", f"micro_batch_size={samples}", f"global_batch_size={samples}",
            f"data.sequence_length={length}",
        ]  # fmt: skip
        if method != "none":
            words += ["partial_rope.qk_rope_head_dim=16", "low_rank.kv_lora_rank=48"]
            words += {
                "half": ["low_rank.k_lora_rank=24"],
                "shared": ["partial_rope.shared=true", "partial_rope.scores=statistics.safetensors"],
            }.get(method, [f"low_rank.method={method}"])
        (stage,) = plan(empty, *words)["stages"]
        settings = load_settings(PlanSettings, words)
        device = initialize_parallel(settings.parallel)
        (model,) = build_training_model(planned_architecture(settings), settings, getattr(torch, dtype), device)
        saved = SavedActivations(model)
        with saved.recorded():
            output, loss = forward_step(iter([random_batch(samples, length, 512)]), model, device)
            kept_alive = loss(output)
        assert stage["parameter_count"] == sum(parameter.numel() for parameter in model.parameters())
        planned = sum(stage[key] for key in ("attention", "mlp", "layer_inputs", "output"))
        assert planned == pytest.approx(saved.peak, rel=0.01), (groups, dtype)
        del kept_alive


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's kernels keep")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "z-loss"])
def test_our_losses_take_what_is_planned(empty: Path, dtype: str, taught: bool) -> None:
    """All that is allocated at the peak of a forward and a backward pass, by torch's own profile, of a model whose
    vocabulary makes everything but logits small. Within 2 %, the temporary tensors of its one layer."""
    length, samples = 64, 2
    config = original_config(vocab_size=8192, num_hidden_layers=1, tie_word_embeddings=True)
    model = write_config(empty.parent / "model", config)
    words = [
        model, "gpus=1", "device=cpu", f"dtype={dtype}", f"micro_batch_size={samples}", f"global_batch_size={samples}",
        f"data.sequence_length={length}", f"distillation.teacher={empty.parent / 'model'}" if taught else "z_loss=1",
    ]  # fmt: skip
    (stage,) = plan(empty, *words)["stages"]
    settings = load_settings(PlanSettings, words)
    architecture, device = planned_architecture(settings), initialize_parallel(settings.parallel)
    (student,) = build_training_model(architecture, settings, getattr(torch, dtype), device)
    distillation = None
    if taught:
        distillation = Distillation(architecture, [student], settings, getattr(torch, dtype), device)
        (student,) = distillation.chunks
        assert stage["teacher"] == sum(part.nbytes for part in student.teacher.parameters())
    batch = random_batch(samples, length, config["vocab_size"])
    planned = sum(stage[key] for key in ("attention", "mlp", "output", "working"))
    assert planned == pytest.approx(peak(batch, student, device, distillation, settings), rel=0.02)


def peak(batch: dict[str, torch.Tensor], model: torch.nn.Module, device: torch.device, *more: Any) -> int:
    """Bytes allocated at once, at most, in a forward and a backward pass."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        output, loss = forward_step(iter([batch]), model, device, *more)
        total, *_ = loss(output)
        del output, loss
        total.backward()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's kernels keep")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", ["at random", "the same by all"])
def test_the_peak_of_experts_is_bounded(empty: Path, dtype: str, chosen: str) -> None:
    """By up to a fifth, as without experts: a backward pass lets go of what it has used, which the plan keeps."""
    length, samples = 64, 8
    config = original_config(num_hidden_layers=1, intermediate_size=1024, **FAMILIES["experts"])
    words = [
        write_config(empty.parent / "model", config), "gpus=1", "device=cpu", f"dtype={dtype}",
        f"micro_batch_size={samples}", f"global_batch_size={samples}", f"data.sequence_length={length}",
    ]  # fmt: skip
    (stage,) = plan(empty, *words)["stages"]
    settings = load_settings(PlanSettings, words)
    device = initialize_parallel(settings.parallel)
    (model,) = build_training_model(planned_architecture(settings), settings, getattr(torch, dtype), device)
    if chosen == "the same by all":  # no expert differs from another, and the first two are taken
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.data.zero_()
    found = peak(random_batch(samples, length, config["vocab_size"]), model, device)
    planned = sum(stage[key] for key in ("attention", "mlp", "output", "working"))
    assert found <= planned <= 1.2 * found


def test_parameters_of_experts(empty: Path) -> None:
    """The published counts of Mixtral 8x7B and Qwen3-30B-A3B, from their configs alone, at any layout."""
    mixtral = original_config(
        **FAMILIES["experts"] | {"num_local_experts": 8}, vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    qwen3 = original_config(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True,
    )  # fmt: skip
    rest = ["gpus=8", "gpu_memory=2000", "data.sequence_length=64"]
    for name, config, number in (("mixtral", mixtral, 46_702_792_704), ("qwen3", qwen3, 30_532_122_624)):
        words = [write_config(empty.parent / name, config), *rest]
        found = plan(empty, *words)
        assert found["stages"][0]["parameter_count"] == number
        stages = plan(empty, *words, "parallel.pipeline_model_parallel_size=8")["stages"]
        assert sum(stage["parameter_count"] for stage in stages) == number
    text = run_tool("plan", empty, *words).stdout
    assert "8 of 128 experts of 768 in 48 layers" in text
    assert "needs parallel.sequence_parallel" in refused("plan", empty, *words, TP8)
    one = write_config(empty.parent / "one", {**qwen3, "num_experts_per_tok": 1})
    assert "num_experts_per_tok: 1, whose weight" in refused("plan", empty, one, *rest)
    assert "fp8: current is not supported with mixtures of experts" in refused("plan", empty, *words, "fp8=current")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the CPU")
def test_frozen_tensors_have_neither_gradients_nor_moments(empty: Path, tiny_llama: Path) -> None:
    words = [f"model={tiny_llama}", "gpus=1", "device=cpu", "data.sequence_length=64", "optimizer.lr_scale={mlp: 0}"]
    found = plan(empty, *words)
    (stage,) = found["stages"]
    settings = load_settings(PlanSettings, words)
    device = initialize_parallel(settings.parallel)
    (model,) = build_training_model(planned_architecture(settings), settings, torch.float32, device)
    trained = sum(parameter.main_grad.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.linear_fc" in name)
    assert (stage["trained_count"], stage["parameter_count"]) == (trained, trained + frozen)
    assert (stage["gradients"], stage["optimizer"]) == (4 * trained, 8 * trained)
    assert "frozen: 0.1 M of the weights below" in run_tool("plan", empty, *words).stdout
    assert "frozen" not in run_tool("plan", empty, *words[:-1]).stdout
    (averaged,) = plan(empty, *words, "optimizer.ema_decay=0.9")["stages"]
    changed = {key: value - stage[key] for key, value in averaged.items() if value != stage[key]}
    assert changed == {"optimizer": 4 * trained, "total": 4 * trained}
    assert "matches no tensor" in refused("plan", empty, *words[:-1], "optimizer.lr_scale={latents: 0}")


def test_a_conversion_is_planned_from_the_original_alone(empty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """As words, as a conversion's YAML file, and as the converted folder itself: one plan."""
    words = ["partial_rope.qk_rope_head_dim=[0,4,8]", "low_rank.method=split", "low_rank.kv_lora_rank=12"]
    words += ["low_rank.k_lora_rank=[4,8,6]"]
    yaml = tmp_path / "mla.yaml"
    low_rank = "{method: split, kv_lora_rank: 12, k_lora_rank: [4, 8, 6]}"
    yaml.write_text(f"partial_rope: {{qk_rope_head_dim: [0, 4, 8]}}\nlow_rank: {low_rank}\n")
    run_tool("convert_mha_to_mla", tiny_llama, tmp_path / "mla", *words)
    rest = ("gpus=1", "data.sequence_length=64")
    planned = [
        plan(empty, f"model={tiny_llama}", *rest, *words),
        plan(empty, f"model={tiny_llama}", *rest, f"conversion={yaml}"),
        plan(empty, f"model={tmp_path / 'mla' / 'config.json'}", *rest),
    ]
    assert planned[0] == planned[1] == planned[2]
    assert planned[0]["stages"] != plan(empty, f"model={tiny_llama}", *rest)["stages"]


def test_a_checkpoint_root_is_a_model_too(empty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run_tool("convert_hf_to_megatron", tiny_llama, tmp_path / "megatron")
    rest = ("gpus=1", "data.sequence_length=64")
    assert plan(empty, f"load={tmp_path / 'megatron'}", *rest) == plan(empty, f"model={tiny_llama}", *rest)


def test_in_flight_micro_batches_and_bubble(empty: Path) -> None:
    """1F1B: the first of four stages has four micro-batches, the last has one; three of m + 3 slots are idle."""
    words = (f"model={EXAMPLES / 'llama-2-7b'}", "gpus=4", "gpu_memory=200",
             "parallel.pipeline_model_parallel_size=4")  # fmt: skip
    found = plan(empty, *words, "global_batch_size=8")
    assert [stage["in_flight"] for stage in found["stages"]] == [4, 3, 2, 1]
    assert found["bubble"] == pytest.approx(3 / 11)
    few = plan(empty, *words, "global_batch_size=2")
    assert [stage["in_flight"] for stage in few["stages"]] == [2, 2, 2, 1]


def test_interleaved_stages(empty: Path) -> None:
    """Two chunks on each of four stages: 2 (3 - stage) + 4 forward passes go ahead of the first backward pass; an idle
    part of 3 in 2 m + 3. Uneven chunks hold what their layout says."""
    words = (f"model={EXAMPLES / 'llama-2-7b'}", "gpus=4", "gpu_memory=200", "global_batch_size=8",
             "parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2")  # fmt: skip
    found = plan(empty, *words)
    assert [stage["in_flight"] for stage in found["stages"]] == [11, 9, 7, 5]
    assert found["bubble"] == pytest.approx(3 / 19)
    uneven = plan(empty, *words, "parallel.pipeline_model_parallel_layout=E|t*5|t*5|t*5|t*5|t*5|t*5|ttL")
    assert [stage["layers"] for stage in uneven["stages"]] == [5, 10, 10, 7]


def test_the_suggestion_is_the_smallest_that_fits(empty: Path) -> None:
    """Tensor parallelism first, pipelining where a node ends, recomputing last; it needs the same when it is planned
    itself, and half as many GPUs a copy would not do."""
    cases = [
        ("7b", "gpus=16", "gpu_memory=80", (1, 1, "none")),
        ("7b", "gpus=16", "gpu_memory=40", (2, 1, "none")),
        ("70b", "gpus=32", "gpu_memory=80", (8, 2, "none")),
        ("70b", "gpus=16", "gpu_memory=82", (8, 2, "full")),
    ]
    for name, gpus, memory, expected in cases:
        words = [f"model={EXAMPLES / f'llama-2-{name}'}", gpus, memory, "global_batch_size=256",
                 "data.sequence_length=4096"]  # fmt: skip
        best = plan(empty, *words)["suggestion"]
        tp, pp, recompute = expected
        assert (best["tensor_model_parallel_size"], best["pipeline_model_parallel_size"], best["recompute"]) == expected
        layout = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}",
                  f"recompute={recompute}", f"parallel.sequence_parallel={str(tp > 1).lower()}"]  # fmt: skip
        again = plan(empty, *words, *layout)
        assert again["total"] == best["total"] <= again["room"]
        if tp * pp > 1:
            tp, pp = (tp, pp // 2) if pp > 1 else (tp // 2, pp)
            half = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}",
                    f"recompute={recompute}", f"parallel.sequence_parallel={str(tp > 1).lower()}"]  # fmt: skip
            assert plan(empty, *words, *half)["total"] > again["room"]


def test_the_tables_name_what_the_numbers_are(empty: Path) -> None:
    text = run_tool("plan", EXAMPLES / "llama-2-70b.yaml", f"model={EXAMPLES / 'llama-2-70b'}", "gpus=32").stdout
    assert "tensor 8 + sequence, pipeline 2, data 2 on 32 GPUs; bfloat16, transformer_engine" in text
    for word in (
        "working",
        "tensor: all-gather",
        "pipeline: send",
        "data: reduce-scatter",
        "suggestion: tensor 8",
        "why: ",
    ):
        assert word in text


def test_bad_input_is_refused(empty: Path, tmp_path: Path) -> None:
    model = f"model={EXAMPLES / 'llama-2-7b'}"
    assert "model is not set" in refused("plan", empty)
    words = ["partial_rope.strategy=high", "partial_rope.uniform_start=1"]
    assert "uniform_start: of strategy uniform" in refused("plan", empty, model, *words)
    assert "singular_values: of methods that factor" in refused("plan", empty, model, "low_rank.singular_values=sqrt")
    assert "no config.json" in refused("plan", empty, f"model={tmp_path / 'nowhere'}")
    assert "no config.json" in refused("plan", empty, f"load={tmp_path}")
    assert "none.yaml: no such file" in refused("plan", tmp_path / "none.yaml", model)
    layout = refused("plan", empty, model, "parallel.tensor_model_parallel_size=3", "gpus=3")
    assert "3 does not divide num_key_value_heads 32" in layout
    assert "8 processes were started, but one copy of the model takes 16" in refused(
        "plan", empty, model, "parallel.tensor_model_parallel_size=16"
    )
    assert "global_batch_size: 12 does not divide" in refused("plan", empty, model, "global_batch_size=12")
    assert "more than the model's context 4096" in refused("plan", empty, model, "data.sequence_length=8192")
    for memory in ("0", "-80"):
        assert f"gpu_memory: {memory} GiB is not above 0" in refused("plan", empty, model, f"gpu_memory={memory}")
    assert "gpu_memory: nan" in refused("plan", empty, model, "gpu_memory=.nan")
    assert "reserve: 90 GiB is not between 0" in refused("plan", empty, model, "reserve=90")
    assert "gpus: 0 is too small" in refused("plan", empty, model, "gpus=0")
    assert "needs device=cuda" in refused("plan", empty, model, "device=cpu", "implementation=transformer_engine")
    mla = write_config(tmp_path / "mla", converted_config("joint"))
    assert "is converted already" in refused("plan", empty, mla, "low_rank.d_kv=4", "data.sequence_length=64")
    (tmp_path / "budget.yaml").write_text("cache_budget: 0.5\nstatistics: s.safetensors\n")
    assert "a cache budget chooses r and c" in refused("plan", empty, model, f"conversion={tmp_path / 'budget.yaml'}")
    both = refused("plan", empty, model, f"conversion={tmp_path / 'budget.yaml'}", "low_rank.d_kv=64")
    assert "partial_rope and low_rank are given too" in both


PP2, TP8 = "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=8"
LATENT, TEACHER = "recompute=latent", f"distillation.teacher={EXAMPLES / 'llama-2-13b'}"
MLA = ("partial_rope.qk_rope_head_dim=16", "low_rank.d_kv=64")
REFUSED = {
    "latent, original": ((LATENT,), "recompute: latent needs a converted model"),
    "latent, fp8": ((LATENT, *MLA, "fp8=delayed"), "recompute: latent needs a converted model"),
    "latent, local": ((LATENT, *MLA, "implementation=local"), "recompute: latent needs a converted model"),
    "8 bits, local": (("fp8=delayed", "implementation=local"), "fp8: needs implementation transformer_engine"),
    "8 bits, sides": (("fp8=delayed", "partial_rope.qk_rope_head_dim=14", TP8),
                      "linear_k_rope.weight is 56 x 4096 on each process; valid: multiples of 16"),
    "8 bits, tokens": (("fp8=delayed", "data.sequence_length=24", "parallel.context_parallel_size=2"),
                       "fp8: a micro batch has 12 tokens on each process"),
    "graph, pipeline": (("cuda_graph=true", PP2), "parallel.pipeline_model_parallel_size: 2 is not possible with cuda"),
    "graph, cpu": (("cuda_graph=true", "device=cpu"), "cuda_graph: needs a GPU"),
    "documents": (("data.reset_attention_mask=true",), "data.reset_attention_mask: not possible with implementation"),
    "virtual stages": ((PP2, "parallel.virtual_pipeline_model_parallel_size=3"), "3 does not divide the 16 layers"),
    "uneven stages": ((PP2, "parallel.pipeline_model_parallel_layout=Et*3|t*3L"), "6 layers t, the model has"),
    "sequence": (("parallel.context_parallel_size=8", "data.sequence_length=24"), "give a multiple of 16"),
    "no teacher": (("distillation.teacher=nowhere",), "distillation.teacher: nowhere: not a Hugging Face model folder"),
    "teacher, stages": (
        (TEACHER, PP2, "parallel.pipeline_model_parallel_layout=Et*16|t*16L"),
        "distillation.teacher: parallel.pipeline_model_parallel_layout: Et*16|t*16L has 32 layers t, the model has",
    ),
    "attention": (
        (TEACHER, "distillation.attention_weight=1"),
        "distillation.attention_weight: 1.0 needs a teacher with the model's num_hidden_layers 32",
    ),
}  # fmt: skip
"""What -> settings of a Llama-2-7B, and what is said."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_training_refuses_is_refused(empty: Path, case: str) -> None:
    words, said = REFUSED[case]
    assert said in refused("plan", empty, f"model={EXAMPLES / 'llama-2-7b'}", *words)


def test_models_that_training_refuses_are_refused(empty: Path) -> None:
    folder = empty.parent
    qwen3 = write_config(folder / "qwen3", {**original_config(), "model_type": "qwen3"})
    words = ["data.sequence_length=64", "gpus=1"]
    norms = refused("plan", empty, qwen3, *words, LATENT, "low_rank.method=value", "low_rank.kv_lora_rank=8")
    assert "no norms on queries and keys" in norms
    other = write_config(folder / "other", original_config(vocab_size=48)).removeprefix("model=")
    teacher = refused("plan", empty, qwen3, *words, f"distillation.teacher={other}")
    assert "has a vocabulary of 48, the model has 64" in teacher
    scaling = original_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert "'dynamic' is not supported" in refused("plan", empty, write_config(folder / "dynamic", scaling), *words)


def test_where_nothing_fits_the_nearest_is_named(empty: Path, tmp_path: Path) -> None:
    """The tables are printed all the same."""
    words = [empty, f"model={EXAMPLES / 'llama-2-70b'}", "gpus=8", f"output={tmp_path / 'plan.json'}"]
    line = refused("plan", *words)
    nearest = json.loads((tmp_path / "plan.json").read_text())["nearest"]
    assert "nothing fits into 74.00 GiB" in line
    assert f"needs {nearest['total'] / GIB:.2f} GiB" in line
    assert (nearest["tensor_model_parallel_size"], nearest["recompute"]) == (8, "full")
    assert "does not fit" in run_tool("plan", *words, "overwrite=true", check=False).stdout


def test_settings_of_a_run_are_settings_of_its_plan() -> None:
    """So that a run's YAML file is one of the plan's."""
    from mha2mla_megatron.training.config import FinetuneSettings

    run = {field.name for field in dataclasses.fields(FinetuneSettings)}
    assert run < {field.name for field in dataclasses.fields(PlanSettings)}


def test_the_memory_benchmark_says_what_it_needs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("says so only where there is no GPU")
    assert "measures a GPU's memory, and torch finds none here" in refused("benchmarks/memory", "shapes=[tiny]")
    assert "shapes: unknown value '9B'" in refused("benchmarks/memory", "shapes=[9B]")
