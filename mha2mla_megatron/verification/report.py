"""Whether two model folders are what they should be to each other: numbered checks, one report.

Two folders are the same model twice (two formats, or two copies), an original and its conversion, or two conversions of
one original. What has to be equal follows from that. Of a conversion's factors only what they do to the output can be
judged, which needs a text.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, pick_device
from mha2mla_megatron.checkpoint.convert_hf_megatron import ToHFSettings, megatron_to_hf
from mha2mla_megatron.checkpoint.either import MegatronTensors, ModelTensors, model_tensors
from mha2mla_megatron.config import describe_conversion
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.errors import UnusableModel, UserError, first_line
from mha2mla_megatron.evaluation.agreement import Agreement, agreement
from mha2mla_megatron.evaluation.perplexity import DTYPES, PerplexitySettings, check_config, check_windows, cut_windows
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.ranks import require_one_process
from mha2mla_megatron.verification.weights import Check, WeightChecks, same_form

SAME_KL = 1e-6
"""Nats. The same weights in the same type give the same numbers but for the order of float32 sums."""
SHOWN = 5
"""Problems of a check that the printed report names; the JSON file has all."""


@dataclass(frozen=True)
class VerifySettings:
    """Settings of tools/verify_conversion.py."""

    text: str | None = None
    """Run both models on this text (.txt, .jsonl or .jsonl.gz) and compare their logits. null: the weights alone."""

    window: int = 512
    """Tokens in a window of the text."""

    max_windows: int | None = 8
    """Use only the first so many windows. null: all of them."""

    batch_size: int = 1
    """Windows in a forward pass."""

    dtype: str = "float32"
    """Type that both models run in: float32, bfloat16 or auto (as stored)."""

    device: str = "auto"
    """Where the models run, both at once: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""

    max_kl: float | None = None
    """Fail above this mean KL divergence, in nats. null: 1e-6 for the same model twice in one type, else no limit."""

    min_top1: float | None = None
    """Fail below this part of positions with the same most likely token. null: no limit."""

    output: str | None = None
    """A JSON file for the report, replaced if it exists."""

    def __post_init__(self) -> None:
        check_windows(self.window, self.max_windows, self.batch_size, self.dtype, self.device)
        if self.text is None and (self.max_kl is not None or self.min_top1 is not None):
            raise UserError("max_kl and min_top1 are about logits: give text=FILE too")


@dataclass(frozen=True)
class Report:
    """All that was found. a, b, relation: for people."""

    a: str
    b: str
    relation: str
    checks: list[Check]
    agreement: Agreement | None

    @property
    def passed(self) -> bool:
        return not any(check.problems for check in self.checks)


def verify_conversion(a: str, b: str, settings: VerifySettings) -> Report:
    """Check two models (Hugging Face or Megatron, original or converted) against each other; writes settings.output.

    Raises UserError for what is no model at all, or a text that cannot be read; all else is in the report.
    """
    require_one_process("verify_conversion.py")
    outputs = [] if settings.output is None else [Path(settings.output)]
    with new_files(outputs, overwrite=True) as scratch:
        content = None if settings.text is None else read_text(Path(settings.text))
        sides = {"A": model_tensors(a), "B": model_tensors(b)}
        output, found, windows = Check("output", "give text=FILE to run both models", done=False), None, None
        if content is not None:
            with _reported(output, UnusableModel):
                windows = _windows(sides, content, settings)
        weights = WeightChecks(*sides.values())
        weights.run()
        if windows is not None and not weights.runnable:
            output.detail = "a model cannot be run"
        elif windows is not None:
            with _reported(output, UserError):
                found = _run_both(sides, windows, settings)
        if found is not None:
            _judge(output, found, settings, SAME_KL if weights.same_form and _one_type(weights) else math.inf)
        report = Report(_describe(a, sides["A"]), _describe(b, sides["B"]), _relation(sides), weights.checks, found)
        report.checks.append(output)
        for file in scratch:
            values = dataclasses.asdict(report)
            if found is not None:  # JSON has no NaN
                values["agreement"] = {k: v if math.isfinite(v) else None for k, v in values["agreement"].items()}
            write_json(file, {"passed": report.passed, **values})
    return report


def format_report(report: Report) -> str:
    """The report on a page."""
    lines = [f"A  {report.a}", f"B  {report.b}", f"   {report.relation}", ""]
    failed = []
    for number, check in enumerate(report.checks, 1):
        state = "FAILED" if check.problems else "passed" if check.done else "-"
        lines.append(f"{number}  {check.name:<10}  {state:<6}  {check.detail}".rstrip())
        lines += [f"     {problem}" for problem in check.problems[:SHOWN]]
        if len(check.problems) > SHOWN:
            lines.append(f"     and {len(check.problems) - SHOWN} more")
        if check.problems:
            failed.append(str(number))
    return "\n".join([*lines, "", f"failed: {', '.join(failed)}" if failed else "all checks passed"])


def _describe(name: str, side: ModelTensors) -> str:
    model = side.architecture
    conversion = "" if model.mla is None else f", {describe_conversion(dataclasses.asdict(model.mla))}"
    size = f"{model.num_layers} layers, hidden size {model.hidden_size}"
    return f"{name}: {side.kind}, {model.model_type}, {size}{conversion}"


def _relation(sides: dict[str, ModelTensors]) -> str:
    if same_form(sides["A"].architecture, sides["B"].architecture):
        return "taken as one model twice: every tensor has to be equal"
    converted = [label for label, side in sides.items() if side.architecture.mla is not None]
    if len(converted) == 2:
        return "taken as two conversions of one model: all but attention has to be equal"
    return f"taken as a model and its conversion, {converted[0]}: what conversion leaves alone has to be equal"


def _one_type(weights: WeightChecks) -> bool:
    return len(weights.types["A"] | weights.types["B"]) == 1


@contextmanager
def _reported(check: Check, refusals: type[UserError]) -> Iterator[None]:
    """Let the check fail where a model cannot be loaded or run, so that the report and its other checks are kept.

    refusals: those that are taken for that; others are still raised, such as what is wrong with the text.
    """
    try:
        yield
        return
    except UserError as error:
        if not isinstance(error, refusals):
            raise
        problem = str(error)
    except Exception as error:  # of any kind: a converted model runs the code in its folder
        traceback.print_exc()
        problem = f"cannot be run ({type(error).__name__}: {first_line(error)})"
    check.done, check.detail = True, "the models were not compared"
    check.problems.append(problem)


def _windows(sides: dict[str, ModelTensors], content: str, settings: VerifySettings) -> torch.Tensor:
    """The text in the tokens of both models, int64 [w, t]. Raises UserError where one of them cannot take it."""
    assert settings.text is not None
    run = PerplexitySettings(
        window=settings.window, max_windows=settings.max_windows, dtype=settings.dtype, device=settings.device
    )
    folders = {label: side.hf for label, side in sides.items()}
    windows = cut_windows(content, folders, Path(settings.text), run)
    for label, folder in folders.items():
        check_config(label, folder, windows, run)
    return windows


def _run_both(sides: dict[str, ModelTensors], windows: torch.Tensor, settings: VerifySettings) -> Agreement:
    """Both models on the same windows, int64 [w, t]."""
    device, folders = pick_device(settings.device), {label: side.hf for label, side in sides.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for label, side in sides.items():
            if isinstance(side, MegatronTensors):
                folders[label] = Path(scratch) / label
                megatron_to_hf(side.step, folders[label], ToHFSettings())
        a, b = (load_causal_lm(label, folder, DTYPES[settings.dtype], device) for label, folder in folders.items())
        return agreement(a, b, windows, settings.batch_size)


def _judge(check: Check, found: Agreement, settings: VerifySettings, max_kl: float) -> None:
    """Fill in check 9. max_kl: the limit where none is set."""
    check.done = True
    check.detail = (
        f"{found.tokens} tokens: KL {found.kl_divergence:.3g} nats, top-1 {found.top1:.2%}, logits differ by up to "
        f"{found.largest_difference:.3g}"
    )
    limit = max_kl if settings.max_kl is None else settings.max_kl
    if not math.isfinite(found.kl_divergence) or found.kl_divergence > limit:
        check.problems.append(f"KL divergence {found.kl_divergence:.3g} nats; at most {limit:.3g} is allowed")
    if settings.min_top1 is not None and found.top1 < settings.min_top1:
        check.problems.append(f"top-1 agreement {found.top1:.4f}; at least {settings.min_top1} is needed")
