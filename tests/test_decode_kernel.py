"""The Triton kernel against attention in float64: small shapes in the interpreter, a large grid on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mha2mla_megatron.hf.decode_triton_mha2mla import (
    _shared_bytes,
    choose_tiles,
    flash_decode,
    has_triton,
    visible_bounds,
)
from mha2mla_megatron.hf.offloaded_cache_mha2mla import OffloadedLatentCache
from tests.conftest import ROOT, refused, run_cases_in_eight_processes, run_tool, start_cases
from tests.decode_kernel_cases import TOLERANCES, Case, make_inputs, relative_error
from tests.kernel_variants import counted_variants

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_interpreted_kernel() -> None:
    pytest.importorskip("triton")
    out, err = start_cases("decode_kernel_cases", 24, 0, TRITON_INTERPRET="1").communicate()
    assert out == "24 cases\n", out + err


def test_interpreted_models_of_every_method() -> None:
    pytest.importorskip("triton")
    out, err = start_cases("decode_kernel_cases", "model", TRITON_INTERPRET="1").communicate()
    assert out == "5 models\n", out + err


def test_importable_where_triton_is_absent() -> None:
    script = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from mha2mla_megatron.hf import decode_triton_mha2mla as kernel, modeling_mha2mla\n"
        "assert not kernel.has_triton(torch.zeros(1))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_no_kernel_on_the_cpu() -> None:
    assert not has_triton(torch.zeros(1))


@pytest.mark.parametrize("shared_memory", [227 * 1024, 163 * 1024, 99 * 1024], ids=["H100", "A100", "consumer"])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit(element_size: int, shared_memory: int) -> None:
    """Every tile is a power of two, fits the shared memory, and all programs together cover the shape."""
    for m in (1, 9, 32, 160):
        for shared in (True, False):
            for v in (16, 96, 100, 512, 1024, 2048, 4096):
                tiles = choose_tiles(7, m, 5000, v, shared, element_size, 132, shared_memory)
                sizes = (tiles.block_m, tiles.block_n, tiles.block_c, tiles.warps)
                assert all(n & (n - 1) == 0 for n in sizes)
                assert not tiles.scores_values or (shared and tiles.block_c >= v)  # a score needs all columns
                assert _shared_bytes(tiles, element_size) <= shared_memory
                assert 1 <= tiles.splits <= 5000 // 64 + 1


def test_bounds() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    assert visible_bounds(mask, 3).tolist() == [[1, 3], [0, 4], [0, 0]]
    assert visible_bounds(mask[:1], 2).tolist() == [[1, 3], [1, 3]]
    assert visible_bounds(mask.transpose(0, 2), 1).tolist() == [[0, 4]]


def test_layers_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of all widths, over a cache that grows: a kernel is compiled for each power of two that holds the latent,
    or for rotated keys of which 2, 4 or 8 columns can be moved at once and for none, and for 128 columns; not for each
    layer and length."""
    pytest.importorskip("triton")
    with counted_variants(monkeypatch) as variants:
        for rope_dim, rank in [(0, 184), *zip(range(2, 42, 2), range(24, 184, 8), strict=True)]:
            for rows in (100, 101, 112):
                shape = (2, 9, 1, rows, 3 * rope_dim, (0, rank), (0, rank))
                inputs, _ = make_inputs(Case(*shape, dtype=torch.bfloat16, mask="static", gap=0))
                flash_decode(**inputs)
    counts = {name: len(found) for name, found in variants.items()}
    assert counts == {"_score_rows": 5, "_average_rows": 5, "_combine_splits": 4}


def test_benchmark_on_the_cpu(tmp_path: Path) -> None:
    """Cache bytes are counted, a plot is drawn, and what there is no time for is named."""
    output = tmp_path / "decode.json"
    words = ["quick=true", "variants=[original-static,absorbed-static]", f"output={output}"]
    run_tool("benchmarks/decode", *words, own_process=True)
    result = json.loads(output.read_text())
    assert [row["saving"] for row in result["steps"]] == [0, 0, 68.75, 68.75, 87.5, 87.5]
    assert all(row["cache/formula"] == 1 and row["tokens/s"] > 0 for row in result["steps"])
    full, *saved = (row["cache GB"] for row in result["steps"] if row["batch"] == 1)
    assert [1 - size / full for size in saved] == pytest.approx([0.6875, 0.875])
    assert output.with_suffix(".png").stat().st_size > 1000
    run_tool("benchmarks/decode", *words, "time_limit=0.01", own_process=True)
    result = json.loads(output.read_text())
    assert result["steps"] == [] and "tiny, -68.75 % joint" in result["not_run"]


def test_benchmark_refuses_bad_settings() -> None:
    assert "fastest" in refused("benchmarks/decode", "variants=[fastest]", own_process=True)


@pytest.mark.gpu
@needs_gpu
def test_random_shapes_on_the_gpu() -> None:
    """240 shapes."""
    run_cases_in_eight_processes("decode_kernel_cases", 30)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shared", [True, False], ids=["joint", "split"])
@pytest.mark.parametrize("rank", [24, 96, 256, 512, 1024, 2048, 4096])
def test_long_rows_on_the_gpu(rank: int, shared: bool) -> None:
    """8192 rows in many splits, as a model's step has them; the same bits at every run."""
    torch.manual_seed(0)
    keys, values = ((0, rank), (0, rank)) if shared else ((0, rank), (rank, 2 * rank))
    inputs, exact = make_inputs(Case(4, 32, 1, 8192, 512, keys, values, torch.bfloat16, "static", 0), "cuda")
    result = flash_decode(**inputs)
    assert relative_error(result, exact) < TOLERANCES[torch.bfloat16]
    assert torch.equal(flash_decode(**inputs), result)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_follows_the_mask() -> None:
    """One captured launch serves every length: it is read from the mask on the device."""
    torch.manual_seed(0)
    inputs, _ = make_inputs(Case(3, 8, 1, 1000, 64, (0, 96), (0, 96), torch.bfloat16, "static", 0), "cuda")
    flash_decode(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flash_decode(**inputs)
    for length in (1, 17, 640, 1000):
        inputs["mask"][:] = torch.arange(1000, device="cuda") < length
        graph.replay()
        assert torch.equal(result, flash_decode(**inputs))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["joint", "split", "key", "value"])
def test_model_on_the_gpu(method: str) -> None:
    """generate with the kernel, compiled into CUDA graphs over a static cache, equals expanded with a dynamic cache."""
    from tests.test_latent_cache import GREEDY, TOKENS, make_model

    model = make_model(method, [0, 4, 4]).to("cuda")
    prompt, mask = TOKENS.cuda(), torch.ones_like(TOKENS).cuda()
    mask[0, :3] = 0
    results = []
    for decode, kernel, cache in (
        ("expanded", "torch", None), ("absorbed", "torch", None), ("absorbed", "auto", None),
        ("absorbed", "auto", "offloaded"), ("absorbed", "auto", "static"),
    ):  # fmt: skip
        model.config.mla_decode, model.config.mla_kernel = decode, kernel
        results.append(model.generate(prompt, attention_mask=mask, cache_implementation=cache, **GREEDY).tolist())
    assert all(result == results[0] for result in results)


@pytest.mark.gpu
@needs_gpu
def test_offloaded_rows_come_back_as_they_went() -> None:
    """Where the GPU is far behind its host: a layer's way back has to wait for its way there."""
    from tests.test_latent_cache import make_model

    cache = OffloadedLatentCache(make_model().config)
    rows = torch.randn(4, 3, 2, 1, 1000, 256, device="cuda")  # four steps of three layers
    seen = []
    for step in rows:
        for layer, new in enumerate(step):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            seen.append(cache.update(new, -new, layer))
    for number, (keys, values) in enumerate(seen):
        step, layer = divmod(number, 3)
        assert torch.equal(keys, torch.cat(list(rows[: step + 1, layer]), dim=-2)), (step, layer)
        assert torch.equal(values, -keys)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("capture", ["compile", "graph"])
def test_benchmark_on_the_gpu(tmp_path: Path, capture: str) -> None:
    """All variants of the tiny shape; on the device, allocated memory is the formula too."""
    output = tmp_path / "decode.json"
    # So many sequences that the 512 bytes to which the allocator rounds are little.
    words = ["quick=true", "batches=[32]", "contexts=[2000]", f"capture={capture}", f"output={output}"]
    run_tool("benchmarks/decode", *words, own_process=True)
    result = json.loads(output.read_text())
    assert len(result["steps"]) == 2 + 2 * 6  # the original's, and at each saving rows and packed
    ratios = {(row["variant"], row["saving"]): row["cache/formula"] for row in result["steps"]}
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.02)
