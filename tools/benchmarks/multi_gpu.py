"""Everything that needs several GPUs of one host, in one command: is it exact, how fast is it, does it survive.

    python tools/benchmarks/multi_gpu.py [gpus=2] [parts=[exact,scaling]] [key=value ...]

Parts: exact (loss and gradients of each layout against one GPU), reshard (a checkpoint saved at one layout, loaded at
another), kill (a rank gets SIGKILL; the resume), memory (peak of each rank against tools/plan.py), scaling (tokens a
second, efficiency, original and converted), save (how long saves hold up training), calibrate (several GPUs calibrate,
one converts). Rows are printed, and appended to OUTPUT.jsonl, as they come; what does not fit into time_budget is left
out and says so. On a machine without a GPU it runs with gloo on the CPU (shapes=[tiny]). Exit code 1 if a row FAILED.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import multi_gpu_commands as commands
from job_worlds import JobFailed, World
from shapes import KINDS, SHAPES, make_architecture

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, first_line, require_at_least, require_one_of, run_tool
from mha2mla_megatron.files import write_json
from mha2mla_megatron.model.cpu_mode import has_transformer_engine
from mha2mla_megatron.model.parallel import ParallelConfig, check_batches, check_layout
from mha2mla_megatron.settings import load_settings, to_dict

USAGE = "multi_gpu.py [key=value ...]"
WORKER = Path(__file__).with_name("multi_gpu_worker.py")
PARTS = ("exact", "reshard", "kill", "memory", "scaling", "save", "calibrate")

FLOAT32_LIMIT = 1e-4
"""Of ||difference|| / ||gradient|| of any tensor: float32 sums in another order, through 8 layers. What a layout does
wrong shows at 1e-2 and above."""

FLOOR_FACTOR = 2.0
"""Two bf16 runs may differ in a tensor's gradient by this many times what bf16 itself costs it on one GPU: independent
rounding would give 1.4, and partial sums of tensor parallelism are rounded once more."""

BF16_LOSS_LIMIT, FLOAT32_LOSS_LIMIT = 1e-3, 1e-5
RESUMED_LOSS_LIMIT = {"bfloat16": 5e-3, "float32": 1e-5}
"""Relative, of the losses after a checkpoint, at another layout or the same: kernels that add in no fixed order."""

STATISTICS_LIMIT = 1e-4
MEMORY_LIMIT = 0.10
TARGETS = {2: 0.95, 4: 0.90, 8: 0.90}
"""Weak scaling over data-parallel GPUs."""

TENSOR_TARGET = 0.85

ACCUMULATED = "4 micro batches"
"""A step of so many, as the name says, beside those of one: what happens once a step weighs less in it."""


@dataclass(frozen=True)
class MultiGpuSettings:
    gpus: int | None = None
    """How many are used, 2, 4 or 8. None: all, or, without a GPU, 2 processes."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """What is run: exact, reshard, kill, memory, scaling, save, calibrate."""

    shapes: list[str] = field(default_factory=lambda: ["135M", "1.7B", "7B"])
    """Of scaling and memory: tiny, 135M, 1.7B, 7B (8 layers)."""

    small_shape: str = "small"
    """Of exact and reshard: small (8 layers, h 512, 8 heads, 4 key/value heads), tiny."""

    save_shape: str = "1.7B"

    save_layers: int = 8
    """Layers of save_shape in the part save: a checkpoint has 14 bytes a weight."""

    calibrate_shape: str = "7B"

    calibrate_layers: int = 4

    steps: int = 7
    """Timed steps of each measurement."""

    profile: int = 0
    """Of the part scaling: one more step of each row is profiled on rank 0, and so many kernels are listed. 0: none."""

    time_budget: float = 570.0
    """Seconds for everything."""

    output: str | None = None
    """A JSON file for all rows; OUTPUT.jsonl beside it gets them as they come."""

    folder: str | None = None
    """Where checkpoints and logs go, kept at the end. None: a temporary folder."""

    def __post_init__(self) -> None:
        for part in self.parts:
            require_one_of("parts", part, PARTS)
        for key in ("small_shape", "save_shape", "calibrate_shape"):
            require_one_of(key, getattr(self, key), tuple(SHAPES))
        for name in self.shapes:
            require_one_of("shapes", name, tuple(SHAPES))
        for key in ("steps", "save_layers", "calibrate_layers"):
            require_at_least(key, getattr(self, key), 1)
        if self.gpus is not None and self.gpus not in (2, 4, 8):
            raise UserError(f"gpus: {self.gpus} is not supported; valid: 2, 4, 8")


@dataclass(frozen=True)
class Job:
    """Something that a world of `size` processes does, and who makes rows of its result."""

    part: str
    size: int
    name: str
    arguments: dict[str, Any]
    layout: str
    model: str
    report: Callable[[Any], None]
    seconds: float
    """Roughly."""

    extra: bool = False
    """Left out where time is short for others."""


class Table:
    """The rows, printed and appended to a file as they come."""

    def __init__(self, output: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.file = None if output is None else Path(f"{output}.jsonl").open("w")  # noqa: SIM115 (as long as this)
        self.started = time.monotonic()
        print(f"{'s':>4} {'part':<9} {'gpus':>4} {'layout':<24} {'model':<28} {'verdict':<12} result", flush=True)

    def add(self, part: str, size: int, layout: str, model: str, verdict: str, text: str, **numbers: Any) -> None:
        """verdict: ok, FAILED, below target, left out, or nothing where nothing is asked for."""
        seconds = round(time.monotonic() - self.started, 1)
        row = {"seconds": seconds, "part": part, "gpus": size, "layout": layout, "model": model, "verdict": verdict,
               "text": text, **numbers}  # fmt: skip
        self.rows.append(row)
        print(f"{seconds:4.0f} {part:<9} {size:>4} {layout:<24} {model:<28} {verdict or '-':<12} {text}", flush=True)
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    @property
    def failed(self) -> int:
        return sum(row["verdict"] == "FAILED" for row in self.rows)


def parallel(
    tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 1, sp: bool = False, comm: str = "p2p", reduce: bool = True,
    gather: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fields of ParallelConfig."""
    return dict(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp, sequence_parallel=sp, cp_comm_type=comm,
        overlap_grad_reduce=reduce, overlap_param_gather=gather,
    )  # fmt: skip


def layout_name(size: int, tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 1, sp: bool = False, comm: str = "p2p",
                reduce: bool = True, gather: bool = False) -> str:  # fmt: skip
    """As in "tp2+sp pp2 dp2 overlap"."""
    words = [f"tp{tp}{'+sp' if sp else ''}"] * (tp > 1) + [f"pp{pp}"] * (pp > 1) + [f"vpp{vpp}"] * (vpp > 1)
    words += [f"cp{cp} {comm}"] * (cp > 1)
    if (copies := size // (tp * pp * cp)) > 1:
        overlap = "gather" if gather else ("" if reduce else "no overlap")
        words += [f"dp{copies}", *[overlap] * bool(overlap)]
    return " ".join(words) or "one GPU"


EXACT: dict[int, list[dict[str, Any]]] = {
    2: [
        dict(tp=2), dict(tp=2, sp=True), dict(pp=2), dict(cp=2), dict(gather=True), dict(pp=2, vpp=2),
        dict(cp=2, comm="all_gather"),
    ],
    4: [
        dict(tp=2, pp=2, sp=True), dict(tp=2, cp=2, sp=True), dict(tp=2, sp=True, gather=True), dict(pp=2, cp=2),
        dict(tp=4, sp=True), dict(cp=2, gather=True), dict(pp=2, vpp=2),
    ],
    8: [
        dict(tp=2, pp=2, cp=2, sp=True), dict(tp=2, pp=2, vpp=2, sp=True), dict(tp=2, cp=2, sp=True, gather=True),
        dict(tp=4, pp=2, sp=True), dict(tp=2, cp=4, sp=True),
    ],
}  # fmt: skip
"""GPUs -> layouts of the part exact; the GPUs that a layout leaves over are data parallel."""

RESHARD: dict[int, tuple[list[dict[str, Any]], list[tuple[int, int, dict[str, Any]]]]] = {
    1: ([dict()], []),
    2: (
        [dict(tp=2, sp=True), dict(pp=2)],
        [(1, 0, dict(tp=2, sp=True)), (2, 0, dict(gather=True)), (2, 0, dict(tp=2, sp=True)), (2, 1, dict(cp=2))],
    ),
    4: ([dict(tp=2, pp=2, sp=True)], [(2, 0, dict(tp=2, pp=2, sp=True)), (4, 0, dict(tp=2, cp=2, sp=True))]),
    8: ([dict(tp=2, pp=2, sp=True)], [(2, 1, dict(tp=2, pp=2, cp=2, sp=True)), (8, 0, dict(tp=4, sp=True))]),
}
"""GPUs -> layouts saved at; loads: (GPUs and number of the layout it was saved at, layout)."""


class Plan:
    """The jobs of all parts, and what rows are made of their results."""

    def __init__(self, settings: MultiGpuSettings, table: Table, folder: Path, size: int, on_gpu: bool) -> None:
        self.settings, self.table, self.folder, self.size, self.on_gpu = settings, table, folder, size, on_gpu
        self.sizes = [n for n in (1, 2, 4, 8) if n <= size]
        self.fast = "transformer_engine" if has_transformer_engine() else "local"
        self.floors: dict[str, dict[str, float]] = {}
        self.rates: dict[tuple[str, str, str, int], float] = {}
        self.saved: dict[str, dict[str, Any]] = {}
        self.jobs: list[Job] = []
        for part in settings.parts:
            getattr(self, part)()

    def add(
        self, part: str, size: int, job: str, layout: str, model: str, report: Callable[[Any], None],
        seconds: float, arguments: dict[str, Any], extra: bool = False,
    ) -> None:  # fmt: skip
        self.jobs.append(Job(part, size, job, arguments, layout, model, report, seconds, extra))

    def exact(self) -> None:
        shape = self.settings.small_shape
        types = [("float32", "local")] + [("bfloat16", "transformer_engine")] * (self.fast != "local")
        if self.fast == "local":
            self.table.add("exact", 0, "all", shape, "left out", "bf16, Transformer Engine: needs a GPU")
        for kind, (dtype, implementation) in itertools.product(KINDS, types):
            what = dict(shape=shape, kind=kind, dtype=dtype, implementation=implementation)
            model = _model(shape, kind, f"{dtype} {'TE' if implementation != 'local' else 'local'}")
            store = f"{kind}-{dtype}"
            more = {} if dtype == "float32" else {"reference": store.replace("bfloat16", "float32")}
            report = self._reference(model, store)
            arguments = dict(what, folder=str(self.folder), store=store, parallel=parallel(), **more)
            self.add("exact", 1, "gradients", "one GPU", model, report, 5, arguments)
            for size, layout in ((n, layout) for n in self.sizes for layout in EXACT.get(n, ())):
                if implementation == "local" and layout.get("comm") == "all_gather":
                    continue  # the one way that the local attention knows anyway
                if kind == "shared" and "tp" not in layout:
                    continue  # as any converted model
                name = layout_name(size, **layout).replace(" p2p", "" if implementation == "local" else " p2p")
                # Where there are more GPUs, their products of the same forms matter more.
                extra = "vpp" in layout or "comm" in layout or (size < self.size and dtype == "float32")
                if not self._possible("exact", size, layout, shape, kind, name, model):
                    continue
                report = self._exact(size, name, model, dtype, store)
                arguments = dict(what, folder=str(self.folder), reference=store, parallel=parallel(**layout))
                self.add("exact", size, "gradients", name, model, report, 3, arguments, extra)

    def _possible(
        self, part: str, size: int, layout: dict[str, Any], shape: str, kind: str, name: str, model: str
    ) -> bool:
        try:
            wanted = ParallelConfig(**parallel(**layout))
            check_layout(make_architecture(SHAPES[shape], KINDS[kind]), wanted, size)
            check_batches(wanted, size, SHAPES[shape].sequence_length, 1, 8)
        except UserError as error:
            self.table.add(part, size, name, model, "left out", str(error)[:120])
            return False
        return True

    def _reference(self, model: str, store: str) -> Callable[[Any], None]:
        def report(found: dict[str, Any]) -> None:
            text = f"loss {found['loss']:.5f}"
            if "errors" in found:
                self.floors[store] = found["errors"]
                worst = max(found["errors"], key=found["errors"].__getitem__)
                text += (
                    f"; the bf16 floor, against float32: loss {found['loss_error']:.1e}, gradients "
                    f"{statistics.median(found['errors'].values()):.1e} (median), {found['errors'][worst]:.1e} "
                    f"({worst})"
                )
            self.table.add("exact", 1, "one GPU", model, "", text, **found)

        return report

    def _exact(self, size: int, layout: str, model: str, dtype: str, store: str) -> Callable[[Any], None]:
        def report(found: dict[str, Any]) -> None:
            errors = found["errors"]
            if dtype == "float32":
                scale, limit, loss_limit, unit = dict.fromkeys(errors, 1.0), FLOAT32_LIMIT, FLOAT32_LOSS_LIMIT, ""
            else:
                if store not in self.floors:
                    raise JobFailed("there is no bf16 floor to compare with")
                scale, limit, loss_limit, unit = self.floors[store], FLOOR_FACTOR, BF16_LOSS_LIMIT, " floors"
            ratios = {key: error / scale[key] for key, error in errors.items()}
            worst = max(ratios, key=ratios.__getitem__)
            good = ratios[worst] <= limit and found["loss_error"] <= loss_limit
            text = (
                f"loss {found['loss_error']:.1e} (limit {loss_limit:g}); gradients "
                f"{statistics.median(ratios.values()):.2g}{unit} (median), {ratios[worst]:.2g}{unit} "
                f"({worst}; limit {limit:g}{unit})"
            )
            self.table.add("exact", size, layout, model, "ok" if good else "FAILED", text, worst=ratios[worst], **found)

        return report

    def reshard(self) -> None:
        shape, dtype = self.settings.small_shape, "bfloat16" if self.on_gpu else "float32"
        what = dict(shape=shape, kind="converted", dtype=dtype, implementation=self.fast, folder=str(self.folder))
        model = _model(shape, "converted", dtype)
        for size in self.sizes:
            saves, loads = RESHARD[size]
            for number, layout in enumerate(saves):
                name, source = layout_name(size, **layout), f"saved-{size}-{number}"
                if self._possible("reshard", size, layout, shape, "converted", name, model):
                    arguments = dict(what, name=source, parallel=parallel(**layout))
                    report = self._saved(source, size, name, model)
                    self.add("reshard", size, "save_training", name, model, report, 6, arguments)
            for origin, number, layout in loads:
                name, source = layout_name(size, **layout), f"saved-{origin}-{number}"
                if self._possible("reshard", size, layout, shape, "converted", name, model):
                    both = f"{layout_name(origin, **RESHARD[origin][0][number])} -> {name}"
                    arguments = dict(
                        what, name=f"{source}-loaded", source=source, processes=origin, parallel=parallel(**layout)
                    )
                    report = self._loaded(source, size, both, model, dtype)
                    self.add("reshard", size, "load_training", both, model, report, 7, arguments)

    def _saved(self, source: str, size: int, layout: str, model: str) -> Callable[[Any], None]:
        def report(found: dict[str, Any]) -> None:
            self.saved[source] = found
            losses = " ".join(f"{loss:.5f}" for loss in found["losses"])
            self.table.add("reshard", size, layout, model, "", f"saved; next losses {losses}", **found)

        return report

    def _loaded(self, source: str, size: int, layout: str, model: str, dtype: str) -> Callable[[Any], None]:
        def report(found: dict[str, Any]) -> None:
            if source not in self.saved:
                raise JobFailed("its source was not saved")
            wanted, limit = self.saved[source]["losses"], RESUMED_LOSS_LIMIT[dtype]
            error = max(abs(a / b - 1) for a, b in zip(found["losses"], wanted, strict=True))
            good, different = not found["different"] and error <= limit, found["different"]
            text = (
                f"{found['tensors'] - len(different)} of {found['tensors']} tensors equal, weights and moments"
                f"{f', not {different[0]}' if different else ''}; next losses {error:.1e} (limit {limit:g})"
            )
            self.table.add("reshard", size, layout, model, "ok" if good else "FAILED", text, loss_error=error, **found)

        return report

    def memory(self) -> None:
        if not self.on_gpu:
            self.table.add("memory", 0, "all", "all", "left out", "needs a GPU: torch counts none of a CPU's memory")
        elif "scaling" not in self.settings.parts:
            self._train_jobs("memory", 1)

    def scaling(self) -> None:
        self._train_jobs("scaling", self.settings.steps)

    def _train_jobs(self, part: str, steps: int) -> None:
        """What the parts scaling and memory share: the same trainings show both."""
        for shape in self.settings.shapes:
            for size in self.sizes:
                for layout, extra in self._speed_layouts(shape, size):
                    for kind in ("original", "converted"):
                        name, model = layout_name(size, **layout), _model(shape, kind, self.fast)
                        if not self._possible(part, size, layout, shape, kind, name, model):
                            continue
                        micro, batches, seconds = None, {"weak": 1}, 9.0
                        if size == 1:
                            batches["strong"], seconds = self.size, 9 + 1.5 * self.size
                        if shape == "7B" and part == "scaling" and (size == 1 or layout.get("tp", 1) > 1):
                            batches[ACCUMULATED], seconds = 4, seconds + 6
                        if layout.get("pp", 1) > 1:
                            micro, batches = 1, {"weak": 8}
                        report = self._trained(part, shape, kind, size, name)
                        arguments = dict(
                            shape=shape, kind=kind, implementation=self.fast, steps=steps,
                            parallel=parallel(**layout), batches=batches, micro_batch_size=micro,
                            profile=part == "scaling" and self.on_gpu and self.settings.profile > 0,
                        )  # fmt: skip
                        self.add(part, size, "train", name, model, report, seconds, arguments, extra)

    def _speed_layouts(self, shape: str, size: int) -> list[tuple[dict[str, Any], bool]]:
        """Layouts, and whether they may be left out."""
        if size == 1:
            return [(dict(), False)]
        largest = size == self.size
        found: list[tuple[dict[str, Any], bool]] = [(dict(gather=True), not largest)]
        if largest:
            found.append((dict(reduce=False), shape == "135M"))
        if shape != "135M":  # its 3 key/value heads
            found.append((dict(tp=2, sp=True), not (largest and shape == "7B")))
        if largest and shape == "7B":
            found.append((dict(pp=2), True))
            if size > 2:
                found += [(dict(tp=2, pp=2, sp=True), True), (dict(tp=4, sp=True), True)]
        return found

    def _trained(self, part: str, shape: str, kind: str, size: int, layout: str) -> Callable[[Any], None]:
        model = _model(shape, kind, self.fast)

        def report(found: dict[str, Any]) -> None:
            if part == "scaling":
                for name, values in found.items():
                    self._report_rate(shape, kind, size, layout, name, model, values)
            if "memory" in self.settings.parts and self.on_gpu:
                self._report_memory(size, layout, model, found["weak"]["memory"])

        return report

    def _report_rate(
        self, shape: str, kind: str, size: int, layout: str, name: str, model: str, values: dict[str, Any]
    ) -> None:
        rate, ms = values["tokens_per_second"], values["ms"]
        self.rates[shape, kind, f"{layout} {name}", size] = rate
        spread = (max(ms) - min(ms)) / statistics.median(ms)
        text = f"{name}: {rate:,.0f} tokens/s, {statistics.median(ms):.1f} ms a step, spread {spread:.0%}"
        verdict, numbers = "", {}
        alike = name if name == ACCUMULATED else "weak"
        single = self.rates.get((shape, kind, f"one GPU {alike}", 1))
        if size > 1 and single is not None:
            numbers["efficiency"] = efficiency = rate / (size * single)
            text += f"; {efficiency:.3f} of {size} x one GPU"
            if (target := self._target(shape, size, layout)) is not None:
                verdict = "ok" if efficiency >= target else "below target"
                text += f" (target {target})"
            strong = self.rates.get((shape, kind, "one GPU strong", 1))
            if strong is not None and layout.startswith("dp") and size == self.size:
                numbers["strong"] = rate / (size * strong)
                text += f"; strong scaling {rate / (size * strong):.3f}"
        other = self.rates.get((shape, "original", f"{layout} {name}", size))
        if kind == "converted" and other is not None:
            numbers["converted_to_original"] = rate / other
            text += f"; converted / original {rate / other:.3f} (target 1)"
            verdict = "below target" if rate < other else verdict or "ok"
        if not self.on_gpu:
            verdict = ""  # two processes share a CPU's cores
        self.table.add("scaling", size, layout, model, verdict, text, **numbers, **values)
        if (spent := values.get("profile")) is not None:
            parts = ", ".join(f"{key} {spent[key]:.1f}" for key in ("computing", "communicating", "exposed", "idle"))
            print(f"{'':>15} profile of rank 0, ms: {parts}")
            for kernel, milliseconds, calls in spent["kernels"][: self.settings.profile]:
                print(f"{'':>15} {milliseconds:>8.2f} {calls:>5}  {kernel[:100]}", flush=True)

    @staticmethod
    def _target(shape: str, size: int, layout: str) -> float | None:
        if layout == f"dp{size} gather":
            return TARGETS[size]
        return TENSOR_TARGET if shape == "7B" and layout.startswith("tp2+sp") and "pp" not in layout else None

    def _report_memory(self, size: int, layout: str, model: str, memory: list[list[int]]) -> None:
        ratios = [plan / real for plan, real in memory]
        good = all(abs(ratio - 1) <= MEMORY_LIMIT for ratio in ratios)
        parts = "  ".join(f"{plan / 2**30:.2f}/{real / 2**30:.2f}={plan / real:.3f}" for plan, real in memory)
        text = f"GiB of each rank, plan/measured: {parts} (limit 1 +- {MEMORY_LIMIT})"
        self.table.add("memory", size, layout, model, "ok" if good else "FAILED", text, ratios=ratios, memory=memory)

    def save(self) -> None:
        shape, layers = self.settings.save_shape, self.settings.save_layers
        layout = dict(gather=True)
        name, model = layout_name(self.size, **layout), _model(shape, True, f"{layers} layers")

        def report(found: dict[str, Any]) -> None:
            plain, busy = statistics.median(found["plain"]), found["while_writing"]
            begins, saves = [1000 * seconds for seconds in found["begin"]], len(found["begin"])
            begin, finish = begins[-1], 1000 * found["finish"][-1]
            slower = (sum(busy) - plain * len(busy)) / saves
            stall = begin + finish + slower
            text = (
                f"{found['bytes'] / 2**30:.2f} GiB; step {plain:.1f} ms; blocking save "
                f"{1000 * found['blocking']:.0f} ms; async: begin {begin:.0f} ms (first {begins[0]:.0f} ms, "
                f"a copy {1000 * found['copy']:.0f} ms), {len(busy) // saves} steps of "
                f"{statistics.median(busy) if busy else 0:.1f} ms in "
                f"{found['writing']:.1f} s of writing, finish {finish:.0f} ms; stall in all {stall:.0f} ms"
                f"{'' if found['written'] else ' (still writing then)'}"
            )
            good = found["written"] and stall < 1000 * found["blocking"]
            self.table.add(
                "save", self.size, name, model, "ok" if good else "below target", text, stall_ms=stall, **found
            )

        arguments = dict(
            shape=shape, kind="converted", implementation=self.fast, parallel=parallel(**layout),
            folder=str(self.folder / "stall"), layers=layers, steps=self.settings.steps, saves=2,
        )  # fmt: skip
        self.add("save", self.size, "save_stall", name, model, report, 80, arguments)

    def kill(self) -> None:
        self._prepare("kill", "make_run", 15, folder=str(self.folder / "kill"))

    def calibrate(self) -> None:
        self._prepare("calibrate", "make_original", 30, folder=str(self.folder / "calibrate"),
                      shape=self.settings.calibrate_shape, layers=self.settings.calibrate_layers)  # fmt: skip

    def _prepare(self, part: str, job: str, seconds: float, **arguments: Any) -> None:
        self.add(part, 1, job, "one GPU", "files for the command", lambda _: None, seconds, arguments)

    def commands(self) -> list[tuple[str, str, str, Callable[..., dict[str, Any]], float, bool]]:
        """(part, layout, model, function, seconds, extra) of what runs beside the worlds, after them."""
        found: list[tuple[str, str, str, Callable[..., dict[str, Any]], float, bool]] = []
        copies = f"dp{self.size}"
        if "kill" in self.settings.parts:
            tiny = _model("tiny", True, "finetune.py")
            found.append(("kill", copies, tiny, commands.kill_a_rank, 80, False))
            found.append(("kill", f"{copies} torchrun", tiny, commands.kill_under_torchrun, 60, True))
        if "calibrate" in self.settings.parts:
            model = f"{self.settings.calibrate_shape}, {self.settings.calibrate_layers} layers"
            found.append(("calibrate", copies, model, commands.calibrate, 80, self.size > 2))
        return found

    def report_command(self, part: str, layout: str, model: str, found: dict[str, Any]) -> None:
        if part == "kill":
            if "said" in found:
                clear = found["said"] is not None
                text = (
                    f"rank {self.size - 1} killed; the others ended after {found['seconds']:.0f} s with "
                    f"{found['codes']}, saying: {(found['said'] or found['else_said'])[:160]}; "
                    f"resumed from step {found['resumed_from']} "
                    f"to {found['resumed_to']} in {found['resume_seconds']:.0f} s"
                )
                self.table.add(part, self.size, layout, model, "ok" if clear else "FAILED", text, **found)
                return
            text = (
                f"rank {self.size - 1} killed; torchrun started all again, which went on from step "
                f"{found['resumed_from']} to {found['resumed_to']} in {found['seconds']:.0f} s"
            )
            self.table.add(part, self.size, layout, model, "ok", text, **found)
            return
        good, seconds = found["error"] <= STATISTICS_LIMIT, found["calibrate"]
        one, several = (seconds[n] for n in (1, self.size))
        text = (
            f"statistics differ by {found['error']:.1e} (limit {STATISTICS_LIMIT:g}); calibrate.py "
            f"{one['seconds']:.1f} s on 1 ({one['rank_0_rate']} tokens/s), "
            f"{several['seconds']:.1f} s on {self.size} (rank 0 "
            f"{several['rank_0_rate']} tokens/s), starts included; conversion with them on one GPU "
            f"{found['convert_seconds']:.1f} s"
        )
        self.table.add(part, self.size, layout, model, "ok" if good else "FAILED", text, **found)
        self.table.add(
            part, self.size, "tensor parallel", model, "left out",
            "not offered: calibration splits the text over GPUs, each with the whole model; conversion runs on one GPU",
        )  # fmt: skip


def _model(shape: str, kind: str, more: str) -> str:
    return f"{shape} {kind} {more.replace('transformer_engine', 'TE')}"


class Runner:
    """Runs jobs in worlds, in order of size, as far as time allows."""

    def __init__(self, plan: Plan, budget: float) -> None:
        self.plan, self.table = plan, plan.table
        self.end = time.monotonic() + budget
        self.worlds: dict[int, World] = {}
        self.count = 0
        self.card = "not known"

    def run(self) -> None:
        later = self.plan.commands()
        try:
            for size in self.plan.sizes:  # they import what they need while others work
                if any(job.size == size for job in self.plan.jobs):
                    self._start(size)
            for size in self.plan.sizes:
                jobs = sorted((job for job in self.plan.jobs if job.size == size), key=lambda job: job.extra)
                for index, job in enumerate(jobs):
                    waiting = [other.seconds for other in jobs[index + 1 :] if not other.extra]
                    waiting += [other.seconds for other in self.plan.jobs if other.size > size and not other.extra]
                    waiting += [seconds for *_, seconds, extra in later if not extra]
                    if self._has_time(job.part, size, job.layout, job.model, job.seconds, sum(waiting) * job.extra):
                        self._attempt(job.part, size, job.layout, job.model, lambda job=job: self._run_job(job))
                if size in self.worlds:
                    self.worlds.pop(size).close()
            for index, (part, layout, model, function, seconds, extra) in enumerate(later):
                waiting = [other[4] for other in later[index + 1 :] if not other[5]]
                if not self._has_time(part, self.plan.size, layout, model, seconds, sum(waiting) * extra):
                    continue

                def command(
                    part: str = part, layout: str = layout, model: str = model, function: Any = function
                ) -> None:
                    found = function(self.plan.folder / part, self.plan.size, self.end - time.monotonic())
                    self.plan.report_command(part, layout, model, found)

                self._attempt(part, self.plan.size, layout, model, command)
        finally:
            for world in self.worlds.values():
                world.stop()

    def _start(self, size: int) -> None:
        self.count += 1
        self.worlds[size] = World(WORKER, size, self.plan.folder / f"world-{self.count}-of-{size}")

    def _run_job(self, job: Job) -> None:
        if job.size in self.worlds and not self.worlds[job.size].usable:
            self.worlds.pop(job.size).stop()
        if job.size not in self.worlds:
            self._start(job.size)
        world = self.worlds[job.size]
        if world.number == 0:
            self.card = world.run("join", {}, 240)
        timeout = max(10.0, min(60 + 4 * job.seconds, self.end - time.monotonic()))
        job.report(world.run(job.name, job.arguments, timeout))

    def _has_time(self, part: str, size: int, layout: str, model: str, seconds: float, reserved: float) -> bool:
        left = self.end - time.monotonic()
        if seconds + reserved <= left:
            return True
        needed = f"{seconds:.0f} s" + (f", and {reserved:.0f} s are kept for others" if reserved else "")
        self.table.add(part, size, layout, model, "left out", f"time_budget: {left:.0f} s left, needs about {needed}")
        return False

    def _attempt(self, part: str, size: int, layout: str, model: str, action: Callable[[], None]) -> None:
        try:
            action()
        except JobFailed as error:
            self.table.add(part, size, layout, model, "FAILED", str(error))
        except Exception as error:  # whatever it is, the other parts are still worth running
            traceback.print_exc()
            self.table.add(part, size, layout, model, "FAILED", f"{type(error).__name__}: {first_line(error)}")


def main(argv: list[str]) -> None:
    _, overrides, file = split_words(argv, USAGE, 0, 0, schema=MultiGpuSettings)
    settings = load_settings(MultiGpuSettings, overrides, file)
    found = torch.cuda.device_count()
    size = settings.gpus or (max(n for n in (1, 2, 4, 8) if n <= found) if found else 2)
    if (found and size > found) or size < 2:
        raise UserError(f"gpus: {size}, but there are {found}; at least 2 are needed")
    folder = Path(settings.folder or tempfile.mkdtemp(prefix="multi-gpu-"))
    for part in ("kill", "calibrate"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    table = Table(settings.output)
    runner = Runner(Plan(settings, table, folder, size, bool(found)), settings.time_budget)
    runner.run()
    summary = f"{len(table.rows)} rows, {table.failed} FAILED, {time.monotonic() - table.started:.0f} s"
    print(f"\n{runner.card}, {size} processes, torch {torch.__version__}: {summary}")
    if settings.output:
        write_json(Path(settings.output), {"device": runner.card, "gpus": size, "torch": torch.__version__,
                                           "settings": to_dict(settings), "rows": table.rows})  # fmt: skip
    if settings.folder is None and not table.failed:
        shutil.rmtree(folder)
    elif table.failed:
        print(f"logs: {folder}")
    sys.exit(int(table.failed > 0))


if __name__ == "__main__":
    run_tool(main)
