"""Retrieval from long contexts by depth and length: needles in a haystack, for runs of models through their caches.

Three scores of a question, from two forwards: the context is fed once, in chunks, through the cache, and each choice is
then fed through a copy of that cache.

    accuracy       the right value has the largest log-probability of all choices (a tie is not right)
    probability    of the right value among the choices (softmax of their summed log-probabilities)
    greedy         each token of the right value is the most likely one, so that greedy decoding writes it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mha2mla_megatron.checkpoint.folders import model_sha256
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.errors import UserError, require_at_least
from mha2mla_megatron.evaluation.cache import fork, stored_bytes
from mha2mla_megatron.evaluation.cached_perplexity import make_cache, prefill
from mha2mla_megatron.evaluation.haystack import ADJECTIVES, NOUNS, Haystack, HaystackMaker, score_choices
from mha2mla_megatron.evaluation.journal import append_lines, claim, cut_torn_line, read_lines
from mha2mla_megatron.evaluation.long_context import LongContextSettings, Plan, Run, plan_runs, running, write_results
from mha2mla_megatron.evaluation.means import Mean, mean
from mha2mla_megatron.evaluation.perplexity import encode_text
from mha2mla_megatron.evaluation.table import format_markdown
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import to_dict

SCORES = ("accuracy", "probability", "greedy")


@dataclass(frozen=True)
class NeedleSettings(LongContextSettings):
    """Settings of tools/evaluate_needle.py."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where the needle stands: 0 at the beginning of the context, 1 at its end."""

    samples: int = 10
    """Questions in each cell, each with other keys, values and filler."""

    needles: int = 1
    """Needles in each context, of which one is asked for; the others stand anywhere."""

    choices: int = 10
    """Values to choose from: those of the other needles first, then some that the context has not."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UserError(f"depths: {depth} is not from 0 to 1")
        if not self.depths:
            raise UserError("depths: an empty list; give one depth or more")
        require_at_least("samples", self.samples, 1)
        require_at_least("needles", self.needles, 1)
        require_at_least("choices", self.choices, 2)
        if self.needles > len(ADJECTIVES) * len(NOUNS):
            raise UserError(f"needles: {self.needles} are more than the {len(ADJECTIVES) * len(NOUNS)} keys there are")


class Place(NamedTuple):
    """One question to one run."""

    model: str
    cache: str
    length: int
    depth: float
    sample: int


class Answer(NamedTuple):
    accuracy: float
    probability: float
    greedy: float
    bytes_per_token: float
    """All that the cache stores after the context, over its tokens."""


@dataclass(frozen=True)
class Results:
    """Answers by place, for the runs, lengths and depths of one call."""

    runs: list[Run]
    lengths: list[int]
    depths: list[float]
    samples: int
    answers: dict[Place, Answer]

    def cell(self, run: Run, length: int, depth: float, score: str) -> Mean:
        """One score over the samples."""
        return mean([getattr(self.answers[Place(*run, length, depth, n)], score) for n in range(self.samples)])

    def row(self, run: Run, length: int, score: str) -> Mean:
        """One score over depths and samples. A sample's depths share needle and filler, so samples are independent and
        depths are not: the error is that of the samples' means."""
        return mean([self._sample(run, length, n, score) for n in range(self.samples)])

    def row_over_first(self, run: Run, length: int, score: str) -> Mean | None:
        """`row` less that of the first run, paired; None for the first run."""
        if run == self.runs[0]:
            return None
        pairs = [[self._sample(r, length, n, score) for r in (run, self.runs[0])] for n in range(self.samples)]
        return mean([one - other for one, other in pairs])

    def bytes_per_token(self, run: Run, length: int) -> float:
        return self.answers[Place(*run, length, self.depths[0], 0)].bytes_per_token

    def _sample(self, run: Run, length: int, sample: int, score: str) -> float:
        values = [getattr(self.answers[Place(*run, length, depth, sample)], score) for depth in self.depths]
        return sum(values) / len(values)


def evaluate_needle(models: Sequence[str], text: Path, target: Path, settings: NeedleSettings) -> Results:
    """Answer what `target` does not hold yet, and write results.json, results.md and results.png there.

    text: the filler. predictions.jsonl in `target` has a line for each question. Raises UserError for bad input; what
    can be found without reading weights is found before any are read.
    """
    content = read_text(text)
    plan = plan_runs(models, settings)
    tokenizer, ids = encode_text(content, plan.folders)
    if settings.bos and tokenizer.bos_token_id is None:
        raise UserError(f"{models[0]}: bos=true, but its tokenizer has no bos_token")
    maker = HaystackMaker(
        encode=lambda words: tokenizer(words, add_special_tokens=False)["input_ids"],
        decode=tokenizer.decode,
        filler=ids,
        prefix=[tokenizer.bos_token_id] if settings.bos else [],
        needles=settings.needles,
        choices=settings.choices,
        seed=settings.seed,
    )
    depths = sorted(set(settings.depths))
    questions = _questions(maker, plan, depths, settings.samples, text)
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    keys = ("needles", "choices", "seed", "bos", "cache_chunk", "cache_options", "dtype")
    made_of = {"text_sha256": digest, **{key: getattr(settings, key) for key in keys}}
    claim(target, made_of, "models", {name: model_sha256(folder) for name, folder in plan.folders.items()}, "model")
    journal = target / "predictions.jsonl"
    cut_torn_line(journal)
    found = _read(journal)
    wanted = [Place(*run, *question) for run in plan.runs for question in questions]
    _answer(plan, questions, [place for place in wanted if place not in found], journal, settings)
    answers = _read(journal)
    results = Results(plan.runs, plan.lengths, depths, settings.samples, {place: answers[place] for place in wanted})
    report = {
        "text": str(text),
        "text_sha256": digest,
        "settings": to_dict(settings),
        "chance": 1 / settings.choices,
        "results": _entries(results),
    }
    write_results(target, format_results(results), partial(draw, results), report)
    return results


def format_results(results: Results) -> str:
    """Scores by run and length, over all depths, in per cent, as Markdown."""

    def cell(value: Mean | None, sign: str = "") -> str:
        if value is None:
            return "-"
        return f"{100 * value.value:{sign}.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}")

    rows = [
        (
            *run,
            str(length),
            *(cell(results.row(run, length, score)) for score in SCORES),
            cell(results.row_over_first(run, length, "accuracy"), "+"),
            f"{results.bytes_per_token(run, length):.6g}",
        )
        for run in results.runs
        for length in results.lengths
    ]
    header = ("model", "cache", "context", *SCORES, "accuracy over first run", "cache bytes/token")
    return format_markdown(header, rows, text_columns=2)


def draw(results: Results, file: Path) -> None:
    """A heat map of depth by length for each run (columns) and score (rows), as PNG."""
    from matplotlib.figure import Figure

    runs, lengths, depths = results.runs, results.lengths, results.depths
    figure = Figure(
        figsize=(2 + len(runs) * max(2.5, 0.8 * len(lengths)), 1 + len(SCORES) * (0.8 + 0.4 * len(depths))),
        layout="constrained",
    )
    grid = figure.subplots(len(SCORES), len(runs), squeeze=False)
    for line, score in zip(grid, SCORES, strict=True):
        for axes, run in zip(line, runs, strict=True):
            values = [[results.cell(run, length, depth, score).value for length in lengths] for depth in depths]
            image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    ink = "black" if 0.15 < value < 0.85 else "white"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=ink)
            axes.set_xticks(range(len(lengths)), list(map(str, lengths)), fontsize="x-small")
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize="x-small")
            if score == SCORES[0]:
                axes.set_title(f"{Path(run.model).name} ({run.cache})", fontsize="small")
            if score == SCORES[-1]:
                axes.set_xlabel("tokens of context", fontsize="small")
            if run == runs[0]:
                axes.set_ylabel(f"{score}\ndepth of the needle", fontsize="small")
    figure.colorbar(image, ax=grid, shrink=0.6)
    figure.savefig(file, dpi=120, format="png")


def answer(
    name: str, model: Any, kind: str, question: Haystack, settings: NeedleSettings
) -> tuple[list[float], bool, int]:
    """(log-probability of each choice, whether greedy decoding gives the first one, bytes of the cache)."""
    cache = make_cache(name, model.config, kind, settings.cache_options)
    ids = torch.tensor([question.ids], device=model.device)
    with torch.inference_mode():
        ((_, logits),) = prefill(cache, model, ids, settings.cache_chunk, wanted=1)
        first = logits[0, -1]
        rest = []
        for choice in question.choices:
            more = logits.new_empty(0, first.shape[-1])
            if len(choice) > 1:
                tail = torch.tensor([choice[:-1]], device=model.device)
                more = model(input_ids=tail, past_key_values=fork(cache)).logits[0]
            rest.append(more)
        return *score_choices(first, rest, question.choices), stored_bytes(cache)


def _questions(
    maker: HaystackMaker, plan: Plan, depths: Sequence[float], samples: int, text: Path
) -> dict[tuple[int, float, int], Haystack]:
    """All questions by length, depth and sample, the longest last. Raises UserError for what cannot be asked."""
    questions = {}
    try:
        for length in plan.lengths:
            for depth in depths:
                for sample in range(samples):
                    questions[length, depth, sample] = maker.make(length, depth, sample)
    except UserError as error:
        raise UserError(f"{text}: {error}") from None
    for question in questions.values():
        largest = max(max(ids) for ids in (question.ids, *question.choices))
        if largest >= plan.vocab_size:
            raise UserError(f"{text}: token id {largest} is beyond the models' vocabulary {plan.vocab_size}")
        if len({tuple(choice) for choice in question.choices}) < len(question.choices) or not all(question.choices):
            raise UserError(f"{next(iter(plan.folders))}: its tokenizer cannot tell the values {question.values} apart")
    return questions


def _answer(
    plan: Plan,
    questions: dict[tuple[int, float, int], Haystack],
    missing: Sequence[Place],
    journal: Path,
    settings: NeedleSettings,
) -> None:
    progress = Progress("needles", sum(place.length for place in missing), "tokens")
    for place, model in running(plan, missing, settings):
        question = questions[place.length, place.depth, place.sample]
        sums, greedy, held = answer(place.model, model, place.cache, question, settings)
        scores = torch.tensor(sums, dtype=torch.float64)
        if not scores.isfinite().all():
            raise UserError(f"{place.model}: gives log-likelihoods that are not finite, dtype {model.dtype}")
        row = {
            **place._asdict(),
            "key": question.key,
            "answer": question.values[0],
            "prediction": question.values[int(scores.argmax())],
            "rank": 1 + int((scores[1:] >= scores[0]).sum()),
            "probability": scores.softmax(0)[0].item(),
            "greedy": greedy,
            "bytes_per_token": held / len(question.ids),
            "log_likelihoods": dict(zip(question.values, sums, strict=True)),
        }
        append_lines(journal, [row])
        progress.advance(place.length)
    if missing:
        progress.close()


def _read(journal: Path) -> dict[Place, Answer]:
    def parse(row: dict[str, Any]) -> tuple[Place, Answer]:
        place = Place(row["model"], row["cache"], int(row["length"]), float(row["depth"]), int(row["sample"]))
        right = float(int(row["rank"]) == 1)
        return place, Answer(right, float(row["probability"]), float(row["greedy"]), float(row["bytes_per_token"]))

    return dict(read_lines(journal, parse, "a prediction"))


def _entries(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "model": run.model,
            "cache": run.cache,
            "length": length,
            "cache_bytes_per_token": results.bytes_per_token(run, length),
            **{score: results.row(run, length, score)._asdict() for score in SCORES},
            "depths": [
                {"depth": depth, **{score: results.cell(run, length, depth, score)._asdict() for score in SCORES}}
                for depth in results.depths
            ],
        }
        for run in results.runs
        for length in results.lengths
    ]
