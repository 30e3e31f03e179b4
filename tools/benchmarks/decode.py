"""Decoding speed and memory of original and converted models, and of the Triton kernels alone, on one GPU.

    python tools/benchmarks/decode.py [shapes=[1.7B,7B]] [batches=[1,16]] [output=decode.json] [key=value ...]
    python tools/benchmarks/decode.py quick=true      a tiny shape in seconds, on the CPU too
    python tools/benchmarks/decode.py variants=[]     the kernels alone

Models are random with a real model's shapes, caches are filled with random numbers to the context's length; a row is
the time of a step that adds one token to every sequence. First the kernels are compared with float64: if one is wrong,
nothing is timed. Rows are printed, and written to `output`, one by one; what `time_limit` leaves no time for is named.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of, run_tool
from mha2mla_megatron.hf.configuration_mha2mla import MHA2MLALlamaConfig
from mha2mla_megatron.hf.decode_packed_mha2mla import PackedTiles, choose_packed_tiles, flash_decode_packed
from mha2mla_megatron.hf.decode_triton_mha2mla import Tiles, choose_tiles, device_limits, flash_decode
from mha2mla_megatron.hf.modeling_mha2mla import MHA2MLALlamaForCausalLM
from mha2mla_megatron.hf.packed_tokens_mha2mla import PackedTokens
from mha2mla_megatron.hf.static_cache_mha2mla import StaticLatentCache
from mha2mla_megatron.settings import load_settings, to_dict

sys.path.insert(0, str(Path(__file__).parent))
from shapes import ModelShape

USAGE = "decode.py [key=value ...]"
KERNEL_TOLERANCE = 1.6e-2
"""Of bf16, relative to the largest value: roundings of the probabilities and of the output."""
GROUP, RESIDUAL = 32, 64
"""Tokens of a group and of the window's least length in a quantised cache: the defaults of `LatentQuantizedCache`."""
LAUNCHES = 4
"""Launches of a kernel in one CUDA graph: a graph's own start costs some microseconds."""
SPARE_BYTES = 3 << 30
"""Left free when the largest batch is estimated: activations, the compiler's workspaces."""


@dataclass(frozen=True)
class Shape(ModelShape):
    def rope_columns(self) -> int:
        """G r with r = d/8."""
        return self.groups * self.head_dim // 8


METHODS = ("joint", "half", "split")
"""Keys and values of one latent; keys of the first half of it; a latent each."""


@dataclass(frozen=True)
class Conversion:
    """Of a model whose heads rotate r = d/8 dims: percentage of the cache that is saved, and one of METHODS."""

    saving: float
    method: str

    def __str__(self) -> str:
        return f"-{self.saving:g} % {self.method}"

    def width(self, shape: Shape) -> int:
        """Columns of a cached row beside the rotated ones."""
        return round((1 - self.saving / 100) * 2 * shape.groups * shape.head_dim) - shape.rope_columns()

    def rank(self, shape: Shape) -> int:
        return self.width(shape) // (2 if self.method == "split" else 1)

    def key_rank(self, shape: Shape) -> int:
        return self.rank(shape) // (2 if self.method == "half" else 1)

    def columns(self, shape: Shape) -> tuple[slice, slice]:
        """Of keys and values, in the unrotated part."""
        rank = self.rank(shape)
        return slice(0, self.key_rank(shape)), slice(rank, 2 * rank) if self.method == "split" else slice(0, rank)

    def low_rank(self, shape: Shape) -> dict[str, Any]:
        """The settings of that name."""
        method = "joint" if self.method == "half" else self.method
        return {"method": method, "kv_lora_rank": self.rank(shape), "k_lora_rank": self.key_rank(shape)}


SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 512, True),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, True),
    "1.7B": Shape(2048, 8192, 24, 32, 32, 49152, True),
    "7B": Shape(4096, 11008, 32, 32, 32, 32000, False),
}


@dataclass(frozen=True)
class Variant:
    """What a row times: a model (original or converted), its form of attention, its cache."""

    converted: bool
    static: bool
    decode: str = "expanded"
    kernel: str = "torch"
    nbits: int = 16
    """Of the latents in the cache; the rotated keys have 4 at least."""


VARIANTS = {
    "original-dynamic": Variant(False, False),
    "original-static": Variant(False, True),
    "expanded-dynamic": Variant(True, False),
    "absorbed-dynamic": Variant(True, False, "absorbed"),
    "absorbed-static": Variant(True, True, "absorbed"),
    "triton-static": Variant(True, True, "absorbed", "auto"),
    "int4-static": Variant(True, True, "absorbed", "auto", 4),
    "int2-static": Variant(True, True, "absorbed", "auto", 2),
}


@dataclass(frozen=True)
class DecodeSettings:
    shapes: list[str] = field(default_factory=lambda: ["1.7B", "7B"])
    """tiny, 135M, 1.7B, 7B."""

    savings: list[float] = field(default_factory=lambda: [68.75, 87.5])
    """Percentages of the cache that the converted models save."""

    methods: list[str] = field(default_factory=lambda: ["joint"])
    """joint, half (keys of half of a joint latent), split: how keys and values are factored, in caches of one size."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """original-dynamic, original-static, expanded-dynamic, absorbed-dynamic, absorbed-static, triton-static,
    int4-static, int2-static (packed caches of fixed size)."""

    batches: list[int] = field(default_factory=lambda: [1, 16])
    """Sequences of a step; 0 is the largest batch that fits, which is searched for (static caches only)."""

    contexts: list[int] = field(default_factory=lambda: [8192])
    """Cached tokens of each sequence."""

    capture: str = "compile"
    """How a step over a static cache runs: compile (torch.compile, reduce-overhead: what generate does), graph (a CUDA
    graph of the uncompiled step: no compile time) or eager."""

    steps: int = 16
    """Timed steps of each round."""

    rounds: int = 5
    """The median round counts."""

    kernel: bool = True
    """Time the kernels alone, at these batches and contexts (for 0: at a batch whose 16-bit cache has 4 GiB)."""

    kernel_bits: list[int] = field(default_factory=lambda: [16, 4, 2])
    """Which kernels: 16 (over rows), 8, 4 or 2 (over packed latents)."""

    tune: bool = False
    """Time the kernels with other tiles too, fastest first."""

    time_limit: float = 540.0
    """Seconds after which no new row is started."""

    quick: bool = False
    """A tiny shape, short contexts, few steps, nothing compiled."""

    output: str | None = None
    """A JSON file for the numbers; the plot goes beside it."""

    def conversions(self) -> list[Conversion]:
        return [Conversion(saving, method) for saving in self.savings for method in self.methods]

    def __post_init__(self) -> None:
        for name in self.shapes:
            require_one_of("shapes", name, tuple(SHAPES))
        for name in self.variants:
            require_one_of("variants", name, tuple(VARIANTS))
        for method in self.methods:
            require_one_of("methods", method, METHODS)
        for bits in self.kernel_bits:
            require_one_of("kernel_bits", bits, (16, 8, 4, 2))
        require_one_of("capture", self.capture, ("compile", "graph", "eager"))
        for key, values, minimum in (("batches", self.batches, 0), ("contexts", self.contexts, 1)):
            for value in values:
                require_at_least(key, value, minimum)
        for key in ("steps", "rounds"):
            require_at_least(key, getattr(self, key), 1)
        if any(not 0 < saving < 87.6 for saving in self.savings):
            raise UserError("savings: percentages above 0, up to 87.5 (with r = d/8 the rotated keys alone are 1/16)")


class Report:
    """Rows as they come: printed, and in the JSON file at once, so that an interrupt loses none."""

    def __init__(self, settings: DecodeSettings, device: torch.device) -> None:
        self.start, self.settings, self.longest = time.perf_counter(), settings, 0.0
        self.file = Path(settings.output) if settings.output else None
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.result: dict[str, Any] = {
            "device": card, "torch": torch.__version__, "settings": to_dict(settings), "kernel": [], "steps": []
        }  # fmt: skip

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.result[table].append(row)
        print("  " + "  ".join(f"{key} {_show(value)}" for key, value in row.items()), flush=True)
        self.save()

    def save(self, **entries: Any) -> None:
        self.result.update(entries)
        if self.file:
            self.file.write_text(json.dumps(self.result, indent=2) + "\n")

    def has_time(self, what: str) -> bool:
        """Whether a row like the longest so far would end in time; says so where not."""
        enough = time.perf_counter() - self.start + self.longest < self.settings.time_limit
        if not enough:
            print(f"  not run, no time left: {what}", flush=True)
            self.save(not_run=[*self.result.get("not_run", []), what])
        return enough


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(
    run: Callable[[], Any], steps: int, rounds: int, device: torch.device, before: Callable[[], Any] = lambda: None
) -> tuple[float, float]:
    """Median over rounds of the time of one run, and the spread of the rounds relative to it. `before`: untimed."""
    times = []
    for _ in range(rounds):
        before()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            run()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start) / steps)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def copy_bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes per second that a copy of a large tensor reads and writes."""
    source = torch.ones((16 if quick else 2048) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms, _ = milliseconds(lambda: target.copy_(source), 8, 3, device)
    return 2000 * source.numel() / ms


@dataclass
class Kernel:
    """One attention kernel over filled tensors."""

    run: Callable[..., torch.Tensor]
    """Averaged latents [b, H, 1, c], with the chosen tiles or those given as `tiles`."""
    chosen: Any
    others: list[Any]
    nbytes: int
    """Of the cached tensors that a launch has to read."""
    q: torch.Tensor
    rows: Callable[[], torch.Tensor]
    """[b, t, G r + w]: what is attended to."""
    inputs: dict[str, Any]


def normal(*sizes: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*sizes, device=device, dtype=torch.bfloat16)


def row_kernel(batch: int, context: int, shape: Shape, conversion: Conversion, device: torch.device) -> Kernel:
    """The kernel over 16-bit rows."""
    columns, heads, width, rank = shape.rope_columns(), shape.heads, conversion.width(shape), conversion.rank(shape)
    keys, values = conversion.columns(shape)
    q_rope, q_key = (normal(batch, heads, 1, n, device=device) for n in (columns, conversion.key_rank(shape)))
    k_rope, unrotated = (normal(batch, context, n, device=device) for n in (columns, width))
    inputs = {"mask": torch.ones(batch, 1, 1, context, dtype=torch.bool, device=device)}

    def run(tiles: Tiles | None = None) -> torch.Tensor:
        scaling = (columns + q_key.shape[-1]) ** -0.5
        return flash_decode(q_rope, q_key, k_rope, unrotated, keys, values, inputs["mask"], scaling, tiles)

    chosen = choose_tiles(batch, heads, context, rank, keys == values, 2, *device_limits(device.index))
    others = list(other_tiles(chosen, rank, keys == values))
    nbytes, q = 2 * batch * context * (columns + width), torch.cat((q_rope, q_key), -1)
    return Kernel(run, chosen, others, nbytes, q, lambda: torch.cat((k_rope, unrotated), -1), inputs)


def packed_kernel(
    batch: int, context: int, shape: Shape, conversion: Conversion, nbits: int, device: torch.device
) -> Kernel:
    """The kernel over packed latents, full of random codes."""
    columns, heads, width, rank = shape.rope_columns(), shape.heads, conversion.width(shape), conversion.rank(shape)
    q_rope, q_key = (normal(batch, heads, 1, n, device=device) for n in (columns, conversion.key_rank(shape)))
    like = normal(batch, 0, 1, device=device)
    rope, unrotated = parts = [
        PackedTokens(like.new_empty(batch, 0, n), context, bits, GROUP, RESIDUAL)
        for n, bits in ((columns, max(nbits, 4)), (width, nbits))
    ]
    for part in parts:
        fill_packed(part)
    keys, values = conversion.columns(shape)
    count = torch.tensor(context, device=device)
    inputs = {"mask": torch.ones(batch, 1, 1, context, dtype=torch.bool, device=device)}

    def run(tiles: PackedTiles | None = None) -> torch.Tensor:
        mask, scaling = inputs["mask"], (columns + q_key.shape[-1]) ** -0.5
        return flash_decode_packed(q_rope, q_key, rope, unrotated, keys, values, count, mask, scaling, tiles)

    def rows() -> torch.Tensor:
        newest = [part.window[:, (context - 1) % part.window.shape[1]][:, None].float() for part in parts]
        return torch.cat([part.dequantize(new, count - 1) for part, new in zip(parts, newest, strict=True)], -1)

    packed = unrotated.blocks * GROUP
    chosen = choose_packed_tiles(batch, heads, packed, rank, 2, device_limits(device.index)[0])
    nbytes = sum(part.nbytes for part in parts)
    q = torch.cat((q_rope, q_key), -1)
    return Kernel(run, chosen, list(other_packed_tiles(chosen, rank)), nbytes, q, rows, inputs)


def fill_packed(part: PackedTokens) -> None:
    """Random codes of values of about a normal distribution's spread."""
    part.codes.random_(0, 256)
    part.scale.fill_(3.5 / (2**part.nbits - 1))
    part.zero.uniform_(-2.25, -1.25)
    part.window.normal_()


def make_kernel(bits: int, *case: Any) -> Kernel:
    *sizes, device = case
    return row_kernel(*case) if bits == 16 else packed_kernel(*sizes, bits, device)


def check_kernel(bits: int, shape: Shape, conversion: Conversion, device: torch.device) -> float:
    """Largest error against float64, relative to the largest value, with left padding and hidden rows at the end."""
    kernel = make_kernel(bits, 2, 1111, shape, conversion, device)
    mask = kernel.inputs["mask"]
    mask[0, ..., :200] = False
    mask[:, ..., 1000:1080] = False
    q, (k_rope, unrotated) = kernel.q.double(), kernel.rows().double().tensor_split([shape.rope_columns()], -1)
    keys, values = conversion.columns(shape)
    scores = torch.einsum("bhsk,btk->bhst", q, torch.cat((k_rope, unrotated[..., keys]), -1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    exact = torch.einsum("bhst,btc->bhsc", weights, unrotated[..., values])
    error = ((kernel.run().double() - exact).abs().max() / exact.abs().max()).item()
    if not error < KERNEL_TOLERANCE:
        raise SystemExit(f"the {bits}-bit kernel is wrong for {shape}, {conversion}: error {error:.2e}")
    return error


def time_kernel(settings: DecodeSettings, report: Report, device: torch.device, copy: float) -> None:
    """The kernels alone, all their passes and the reading of the mask included, against the bandwidth of a copy."""
    cases = list(itertools.product(settings.shapes, settings.conversions()))
    for (name, conversion), bits in itertools.product(cases, settings.kernel_bits):
        error = check_kernel(bits, SHAPES[name], conversion, device)
        report.add("kernel", {"shape": name, **dataclasses.asdict(conversion), "bits": bits, "error": error})
    for (name, conversion), context in itertools.product(cases, settings.contexts):
        shape = SHAPES[name]
        row_bytes = 2 * (shape.rope_columns() + conversion.width(shape)) * context
        for batch in sorted({batch or max(1, (4 << 30) // row_bytes) for batch in settings.batches}):
            for bits in settings.kernel_bits:
                what = f"{name}, {conversion}, {bits} bits, batch {batch} context {context}"
                if report.has_time(f"kernel {what}"):
                    head = {"shape": name, **dataclasses.asdict(conversion), "bits": bits, "batch": batch}
                    head["context"] = context
                    kernel = make_kernel(bits, batch, context, shape, conversion, device)
                    for row in time_tiles(kernel, settings, report, device):
                        rate = kernel.nbytes / row["ms"] / 1e6
                        speed = {"GB/s": rate, "of copy": 1e9 * rate / copy}
                        report.add("kernel", {**head, **speed, **row})
                    del kernel
                    free_memory()


def time_tiles(kernel: Kernel, settings: DecodeSettings, report: Report, device: torch.device) -> list[dict[str, Any]]:
    """Times of the chosen tiles and, when tuning, of the eight fastest of all."""
    expected = kernel.run(kernel.chosen)
    rows = []
    for tiles in [kernel.chosen, *(kernel.others if settings.tune else ())]:
        if rows and not report.has_time(f"tiles from {tiles} on"):
            break
        try:
            result = kernel.run(tiles)
        except Exception as failure:  # a tile may need more registers or shared memory than there are
            print(f"  {tiles}: {str(failure).splitlines()[0]}", flush=True)
            continue
        if not (result - expected).abs().max() < KERNEL_TOLERANCE * expected.abs().max():
            print(f"  wrong: {tiles}", flush=True)
            continue

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                kernel.run(tiles)
        ms, spread = milliseconds(graph.replay, settings.steps, settings.rounds, device)
        chosen = "yes" if tiles == kernel.chosen else "no"
        rows.append({"ms": ms / LAUNCHES, "spread": spread, "chosen": chosen, "tiles": str(tiles)})
    fastest = sorted(rows, key=lambda row: row["ms"])[:8]
    return fastest if rows[0] in fastest else [*fastest, rows[0]]


def other_tiles(chosen: Tiles, rank: int, shared: bool) -> Iterator[Tiles]:
    """The same work cut in other ways."""
    for splits in (max(1, chosen.splits // 2), 2 * chosen.splits):
        yield dataclasses.replace(chosen, splits=splits)
    whole = 1 << (max(16, rank) - 1).bit_length()
    for (scores_values, block_c), warps, block_m, stages in itertools.product(
        ((True, whole), (False, 512), (False, 256), (False, 128)), (4, 8), (16, 32, 64), (2, 3, 4)
    ):
        tiles = dataclasses.replace(
            chosen, scores_values=scores_values, block_c=block_c, warps=warps, block_m=block_m, stages=stages
        )
        fits = block_c <= whole and block_c * block_m <= 128 * 32 * warps
        if tiles != chosen and fits and (shared or not scores_values):
            yield tiles


def other_packed_tiles(chosen: PackedTiles, rank: int) -> Iterator[PackedTiles]:
    """The same work cut in other ways: scored in other tiles, or averaged in others."""
    for score in ((128, 64, 4, 3), (128, 128, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2)):
        names = ("score_n", "score_k", "score_warps", "score_stages")
        yield dataclasses.replace(chosen, **dict(zip(names, score, strict=True)))
    for splits in (max(1, chosen.splits // 2), 2 * chosen.splits):
        yield dataclasses.replace(chosen, splits=splits)
    whole = 1 << (max(16, rank) - 1).bit_length()
    cuts = [
        (64, 128, 4, 3), (64, 256, 4, 2), (64, 256, 4, 4), (128, 128, 4, 2), (128, 256, 8, 2), (64, 512, 8, 2),
        (64, 512, 8, 3), (64, 64, 4, 3),
    ]  # fmt: skip
    for block_n, block_c, warps, stages in cuts:
        if block_c <= whole:
            yield dataclasses.replace(chosen, block_n=block_n, block_c=block_c, warps=warps, stages=stages)


def make_model(shape: Shape, conversion: Conversion | None, device: torch.device, context: int) -> Any:
    """A random bf16 model, made on the device."""
    settings: dict[str, Any] = dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        tie_word_embeddings=shape.tied, max_position_embeddings=context + 1024,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        if conversion is None:
            return LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=torch.bfloat16).eval()
        settings["mha2mla"] = {
            "partial_rope": {"qk_rope_head_dim": shape.head_dim // 8},
            "low_rank": conversion.low_rank(shape),
        }
        return MHA2MLALlamaForCausalLM._from_config(MHA2MLALlamaConfig(**settings), dtype=torch.bfloat16).eval()


def cache_widths(shape: Shape, conversion: Conversion | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, columns) of a layer's keys and values."""
    if conversion is None:
        return (shape.groups, shape.head_dim), (shape.groups, shape.head_dim)
    return (1, conversion.width(shape)), (1, shape.rope_columns())


def fill_cache(
    model: Any, shape: Shape, conversion: Conversion | None, variant: Variant, batch: int, tokens: int
) -> Any:
    """A cache of random tokens; where it is static, `tokens` is what there is room for."""
    static: dict[str, Any] = {"config": model.config, "max_cache_len": tokens}
    cache: Any = DynamicCache() if not variant.static else StaticCache(**static)
    if variant.nbits < 16:
        cache = StaticLatentCache(**static, nbits=variant.nbits)
    parts = cache_widths(shape, conversion)
    for layer in range(shape.layers):
        if variant.static:
            empty = (torch.empty(batch, n, 0, width, dtype=model.dtype, device=model.device) for n, width in parts)
            cache.layers[layer].lazy_initialization(*empty)
        if variant.nbits < 16:
            for part in cache.layers[layer].parts:
                fill_packed(part)
            cache.layers[layer].empty = False
        elif variant.static:
            cache.layers[layer].keys.normal_()
            cache.layers[layer].values.normal_()
        else:
            full = (torch.randn(batch, n, tokens, w, dtype=model.dtype, device=model.device) for n, w in parts)
            cache.update(*full, layer)
    return cache


def formula_bytes(shape: Shape, conversion: Conversion | None, nbits: int, tokens: int) -> float:
    """What a sequence's cache of so many tokens takes, all layers, scales and the window included."""
    (heads, key_width), (_, value_width) = cache_widths(shape, conversion)
    if nbits == 16:
        return 2 * tokens * shape.layers * heads * (key_width + value_width)
    packed, window = max(0, (tokens - RESIDUAL) // GROUP) * GROUP, min(tokens, RESIDUAL + GROUP)
    bits = sum(width * (b + 32 / GROUP) for width, b in ((key_width, nbits), (value_width, max(nbits, 4))))
    return shape.layers * (packed * bits / 8 + window * 2 * (key_width + value_width))


class Step:
    """One more token for every sequence, over a cache that is set back to the context's length now and then."""

    def __init__(self, model: Any, cache: Any, context: int, batch: int, capture: str) -> None:
        self.model, self.cache, self.context = model, cache, context
        self.static = isinstance(cache, StaticCache | StaticLatentCache)
        self.tokens = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self.forward: Callable[..., Any] = model.forward
        self.graph: Any = None
        if self.static and capture == "compile":
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        self.rewind()
        for _ in range(3):  # compile, then record
            self()
        if self.static and capture == "graph":
            synchronize(model.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self()
            self.graph = graph

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        with torch.no_grad():
            self.forward(input_ids=self.tokens, past_key_values=self.cache, use_cache=True)

    def rewind(self) -> None:
        if self.static:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)
        elif self.cache.get_seq_length() > self.context:
            self.cache.crop(self.context - self.cache.get_seq_length())


def free_memory() -> None:
    """Give back what the row before held: wrappers refer to each other, and compiled graphs to their pools."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all but an embedding that is not the output projection too."""
    skipped = None if model.config.tie_word_embeddings else model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)


def cache_bytes(cache: Any) -> int:
    """Bytes allocated for the cache: of the storages, not of views into them."""
    packed = isinstance(cache, StaticLatentCache)
    parts = [part for layer in cache.layers for part in (layer.tensors if packed else (layer.keys, layer.values))]
    return sum(part.untyped_storage().nbytes() for part in parts)


def time_step(
    model: Any, shape: Shape, conversion: Conversion | None, variant: Variant, batch: int, context: int,
    settings: DecodeSettings, copy: float,
) -> dict[str, Any]:  # fmt: skip
    """One row: milliseconds of a step, tokens per second, memory. Raises RuntimeError where it does not fit."""
    device, room = model.device, settings.steps + 8
    if variant.converted:
        model.config.mla_decode, model.config.mla_kernel = variant.decode, variant.kernel
    allocated = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    tokens = context + room if variant.static else context
    cache = fill_cache(model, shape, conversion, variant, batch, tokens)
    allocated = torch.cuda.memory_allocated() - allocated if device.type == "cuda" else cache_bytes(cache)
    step = Step(model, cache, context, batch, settings.capture)
    ms, spread = milliseconds(step, settings.steps, settings.rounds, device, before=step.rewind)
    read = weight_bytes(model) + batch * formula_bytes(shape, conversion, variant.nbits, context)
    formula = batch * formula_bytes(shape, conversion, variant.nbits, tokens)
    row = {
        "ms": ms, "spread": spread, "tokens/s": 1000 * batch / ms, "of copy": 1000 * read / ms / copy,
        "cache GB": allocated / 1e9, "cache/formula": allocated / formula,
        "saved %": 100 * (1 - allocated / (batch * formula_bytes(shape, None, 16, tokens))),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def largest_batch(
    model: Any, shape: Shape, conversion: Conversion | None, variant: Variant, settings: Any, context: int
) -> int:
    """The batch whose static cache fills the memory that the weights leave, less a step's own memory."""
    if model.device.type != "cuda":
        return 2
    free, _ = torch.cuda.mem_get_info()
    per_sequence = int(formula_bytes(shape, conversion, variant.nbits, context + settings.steps + 8))
    # A step's logits, and the float32 partial results of a layer's splits.
    per_sequence += 4 * (
        2 * shape.vocabulary + 8 * shape.heads * (conversion.rank(shape) if conversion else shape.head_dim)
    )
    return max(1, (free - SPARE_BYTES) // per_sequence)


def time_steps(settings: DecodeSettings, report: Report, device: torch.device, copy: float) -> None:
    for name in settings.shapes:
        for conversion in [None, *settings.conversions()]:
            names = [
                variant
                for variant in settings.variants
                if VARIANTS[variant].converted == (conversion is not None)
                and (VARIANTS[variant].kernel == "torch" or device.type == "cuda" or VARIANTS[variant].nbits < 16)
            ]
            if not names or not report.has_time(f"{name}, {conversion or 'original'}"):
                continue
            free_memory()
            model = make_model(SHAPES[name], conversion, device, max(settings.contexts))
            for context in settings.contexts:
                for batch in settings.batches:
                    for variant in names:
                        _add_row(model, name, conversion, variant, batch, context, settings, report, copy)
            del model


def _add_row(
    model: Any, name: str, conversion: Conversion | None, variant: str, batch: int, context: int,
    settings: DecodeSettings, report: Report, copy: float,
) -> None:  # fmt: skip
    """Time one row; where the batch is searched for, with 4 % less at every failure."""
    search, start = batch == 0, time.perf_counter()
    if search and not VARIANTS[variant].static:
        return
    free_memory()
    batch = batch or largest_batch(model, SHAPES[name], conversion, VARIANTS[variant], settings, context)
    about = dataclasses.asdict(conversion or Conversion(0.0, "none"))
    head = {"shape": name, "variant": variant, **about, "context": context}
    while report.has_time(f"{name} {variant} {conversion or 'original'} batch {batch} context {context}"):
        try:
            row = time_step(model, SHAPES[name], conversion, VARIANTS[variant], batch, context, settings, copy)
        except RuntimeError as failure:
            if not any(sign in str(failure) for sign in ("out of memory", "ALLOC_FAILED")):
                raise
            row = {"ms": float("inf")}
        free_memory()
        if row["ms"] < float("inf") or not search or batch == 1:
            fits = {"largest": "yes"} if search else {}
            failed = row["ms"] == float("inf")
            report.longest = max(report.longest, time.perf_counter() - start)
            report.add("steps", {**head, "batch": batch, **({"result": "out of memory"} if failed else row), **fits})
            return
        batch -= max(1, batch // 25)


def plot(report: Report) -> None:
    """Tokens per second over the batch, a line per variant, a panel per shape and context; beside the JSON file."""
    rows = [row for row in report.result["steps"] if "ms" in row]
    if report.file is None or not rows:
        return
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["shape"], row["context"]) for row in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (shape, context) in zip(axes[0], panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if (row["shape"], row["context"]) == (shape, context):
                label = row["variant"] + (f" {Conversion(row['saving'], row['method'])}" if row["saving"] else "")
                lines.setdefault(label, []).append((row["batch"], row["tokens/s"]))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(title=f"{shape}, context {context}", xlabel="batch", ylabel="tokens/s", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(report.file.with_suffix(".png"), dpi=120)


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=DecodeSettings)
    settings = load_settings(DecodeSettings, overrides, file)
    if settings.quick:
        quick = ["shapes=[tiny]", "contexts=[64]", "batches=[1,0]", "capture=eager", "steps=2", "rounds=2"]
        settings = load_settings(DecodeSettings, [*quick, *overrides], file)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and settings.capture != "eager":
        raise UserError(f"capture={settings.capture} needs a GPU; on the CPU give quick=true or capture=eager")
    report = Report(settings, device)
    copy = copy_bandwidth(device, settings.quick)
    report.save(copy_bytes_per_second=copy)
    print(f"\n{report.result['device']}: a copy moves {copy / 1e9:,.0f} GB/s")
    if settings.kernel and device.type == "cuda":
        print("\nThe kernels alone:")
        time_kernel(settings, report, device, copy)
    print("\nDecoding steps:")
    time_steps(settings, report, device, copy)
    plot(report)


if __name__ == "__main__":
    run_tool(main)
