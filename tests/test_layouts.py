"""Every form of parallelism trains like one process: losses, all gradients, and the weights after two steps.

    python -m tests.test_layouts

prints the table.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.architecture import parse_architecture
from mha2mla_megatron.checkpoint.mapping import megatron_shapes
from mha2mla_megatron.model.parallel import ParallelConfig
from mha2mla_megatron.training.config import DataSettings, FinetuneSettings, OptimizerSettings
from mha2mla_megatron.training.pieces import Piece
from tests.distributed import layout_worker
from tests.distributed.worlds import run_world
from tests.megatron_cases import SHORT_NAMES, converted_config, original_config, random_tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

SIZES = dict(num_hidden_layers=8, hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
MULTI_HEAD = dict(num_key_value_heads=8)
MODELS = {
    "original": original_config(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "joint": converted_config("joint", **SIZES, attention_bias=True, tie_word_embeddings=True),
    "split": converted_config("split", **SIZES, attention_bias=True, mlp_bias=True),
    "shared": converted_config("joint", True, **SIZES | MULTI_HEAD, attention_bias=True, tie_word_embeddings=True),
    "experts": {
        **converted_config("joint", **SIZES, attention_bias=True), "model_type": "mha2mla_qwen3_moe",
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0, 5],
    },
}  # fmt: skip
"""G = 4 groups of 2 heads; all with biases of q, k and v. In `shared`, where all heads have one rotated key, G = H: so
attention keeps keys as they are, not a copy for each query head, and recompute=latent is seen to give them again."""

BATCH, LENGTH, LIMIT = 4, 16, 2e-5
WORLDS: dict[int, list[dict[str, Any]]] = {
    1: [
        dict(micro=BATCH), dict(), dict(micro=2, recompute="full"), dict(fused=True, micro=2, only="joint"),
        dict(fused=True, micro=2, recompute="latent", only="split"),
        dict(fused=True, micro=2, recompute="full", only="split"), dict(micro=2, recompute="full", only="experts"),
        dict(fused=True, micro=2, recompute="latent", only="shared"),
    ],
    2: [
        dict(tp=2), dict(tp=2, sp=True), dict(tp=2, sp=True, recompute="full", only="split"),
        dict(tp=2, fused=True, micro=2, only="joint"),
        dict(tp=2, sp=True, fused=True, micro=2, recompute="latent", only="split"),
        dict(pp=2), dict(pp=2, stages="Et*5|t*3L"), dict(pp=2, vpp=2),
        dict(pp=2, vpp=4, recompute="full", only="original"),
        dict(cp=2), dict(cp=2, recompute="selective", only="shared"),
        dict(), dict(reduce=False, only="split"), dict(gather=True), dict(micro=2, gather=True, only="joint"),
        dict(tp=2, only="shared"), dict(tp=2, sp=True, only="shared"), dict(tp=2, fused=True, micro=2, only="shared"),
        dict(tp=2, sp=True, fused=True, micro=2, recompute="latent", only="shared"),
    ],
    4: [
        dict(tp=2, sp=True, gather=True, fused=True, only="joint"), dict(tp=2, cp=2, fused=True, micro=2, only="split"),
        dict(tp=4, sp=True, only="original"), dict(tp=4, only="split"), dict(cp=4, only="joint"),
        dict(pp=4, vpp=2, only="split"), dict(pp=4, stages="E|t*5|t*3|L", only="joint"),
        dict(tp=2, pp=2, sp=True, only="joint"), dict(tp=2, cp=2, sp=True, only="original"),
        dict(tp=2, cp=2, sp=True, only="split"), dict(pp=2, cp=2, vpp=2, stages="Et|t*3|t*2|t*2L", only="original"),
        dict(tp=2, gather=True, only="joint"), dict(pp=2, vpp=2, gather=True, only="joint"),
        dict(pp=2, gather=True, only="original"), dict(cp=2, only="split"), dict(gather=True, only="original"),
        dict(tp=2, pp=2, vpp=2, sp=True, only="experts"), dict(cp=2, gather=True, only="experts"),
    ],
    8: [
        dict(tp=2, pp=2, only="original"), dict(tp=2, pp=2, vpp=2, sp=True, gather=True, only="joint"),
        dict(tp=2, cp=2, pp=2, sp=True, only="split"), dict(tp=2, cp=2, sp=True, gather=True, only="joint"),
        dict(pp=4, reduce=False, only="split"),
    ],
}  # fmt: skip
"""Processes -> layouts; the processes that a layout leaves over are data parallel.

micro: samples a micro batch, else 1. fused: the converted attention's fused path, its kernel interpreted, which takes
long for each micro batch.
only: the one model that it is run with, else the `GENERAL` ones.
"""
GENERAL = ("original", "joint", "split")

REFERENCE = 1, WORLDS[1][0]
RUNS = [
    (world, layout, model)
    for world, layouts in WORLDS.items()
    for layout in layouts
    for model in MODELS
    if model == layout.get("only", model) and (model in GENERAL or "only" in layout or (world, layout) == REFERENCE)
]
COMPARED = [run for run in RUNS if run[:2] != REFERENCE]


def name_of(world: int, layout: dict[str, Any], model: str) -> str:
    """As in "4: tp2 sp dp2, joint"."""
    shown = {key: value for key, value in layout.items() if key != "only"}
    words = [key if value is True else f"{key}={value}" if isinstance(value, str) else f"{key}{int(value)}"
             for key, value in shown.items()]  # fmt: skip
    data = world // math.prod(layout.get(key, 1) for key in ("tp", "pp", "cp"))
    return f"{world}: {' '.join(words + [f'dp{data}'] * (data > 1)) or 'micro1'}, {model}"


def settings_of(layout: dict[str, Any]) -> FinetuneSettings:
    parallel = {SHORT_NAMES[key]: value for key, value in layout.items() if key in SHORT_NAMES}
    return FinetuneSettings(
        micro_batch_size=layout.get("micro", 1),
        global_batch_size=BATCH,
        recompute=layout.get("recompute", "none"),
        implementation="local_fused" if layout.get("fused") else "local",
        data=DataSettings(sequence_length=LENGTH),
        # Adam divides a gradient by its own size; with an epsilon far above the noise of float32 sums, noise stays so.
        optimizer=OptimizerSettings(lr=1e-3, warmup_steps=0, decay_steps=1, adam_eps=1e-4),
        parallel=ParallelConfig(**parallel),
    )


def run_everything(folder: Path) -> None:
    """Start each world once, as forks of one process that has imported everything: that is what takes long."""
    for model, config in MODELS.items():
        architecture = parse_architecture(config, model)
        torch.manual_seed(11)
        shapes = megatron_shapes(architecture).items()
        whole = {name: random_tensor(name, shape, architecture.head_dim) for name, shape in shapes}
        torch.save(whole, folder / f"{model}.pt")
    for world in WORLDS:
        runs = [
            (str(number), MODELS[model], folder / f"{model}.pt", settings_of(layout))
            for number, (one, layout, model) in enumerate(RUNS)
            if one == world
        ]
        runs.sort(key=lambda run: tuple(run[-1].parallel.sizes(world).values()))
        run_world(world, folder, layout_worker.run, runs)


def errors_of(folder: Path, run: tuple[int, dict[str, Any], str]) -> dict[str, float]:
    """The largest relative errors of a run, by what was compared, against one process with a batch of all samples.

    Every piece of every process is compared: also the copies that several processes hold. The pieces must make up all
    tensors of the model.
    """
    world, _, model = run
    reference = torch.load(folder / f"{RUNS.index((*REFERENCE, model))}.0.pt", weights_only=False)
    found = [torch.load(folder / f"{RUNS.index(run)}.{rank}.pt", weights_only=False) for rank in range(world)]
    errors = {"loss": torch.stack([(one["losses"] / reference["losses"] - 1).abs() for one in found])}
    for kind in ("gradients", "weights"):
        wanted = whole_tensors(reference[kind])
        covered = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in wanted.items()}
        relative = []
        for key, shape, place, piece in (piece for one in found for piece in one[kind]):
            assert shape == wanted[key].shape, key
            scale = wanted[key].abs().max()
            assert scale > 0, f"{kind} of {key}: nothing to compare"
            relative.append((piece - wanted[key][place]).abs().max() / scale)
            covered[key][place] = True
        assert [key for key, mask in covered.items() if not mask.all()] == []
        errors[kind] = torch.stack(relative)
    return {kind: float(values.max()) for kind, values in errors.items()}


def whole_tensors(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """A single process's tensors; some of them it has in several pieces."""
    whole = {key: torch.full(shape, torch.nan) for key, shape, _, _ in pieces}
    for key, _, place, piece in pieces:
        whole[key][place] = piece
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    run_everything(folder)
    return folder


@pytest.mark.parametrize("run", COMPARED, ids=[name_of(*run) for run in COMPARED])
def test_trains_like_one_process(folder: Path, run: tuple[int, dict[str, Any], str]) -> None:
    errors = errors_of(folder, run)
    assert all(error < LIMIT for error in errors.values()), errors


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run_everything(Path(scratch))
        print(f"{'processes: layout, model':54} {'loss':>8} {'gradient':>8} {'weight':>8}   largest relative errors")
        for run in COMPARED:
            print(f"{name_of(*run):54}", *(f"{error:8.1e}" for error in errors_of(Path(scratch), run).values()))


if __name__ == "__main__":
    main()
