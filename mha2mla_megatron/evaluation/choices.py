"""Multiple choice by log-likelihood, zero-shot: the continuation that the model finds the most likely is its answer.

Prompts (`choice_questions`), the boundary between context and continuation, and both scores are those of
lm-evaluation-harness. A choice follows its context after one space. Its tokens are those of the whole less as many as
the context alone has, so that a token across the boundary belongs to the context. acc takes the largest sum of
log-probabilities of these tokens, acc_norm the largest sum per character of the choice (the space not counted).

Shape letters: n sequences, b of them in a batch, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, pick_device
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.data.tokenizer import load_tokenizer
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.evaluation.cache import cache_bytes_per_token
from mha2mla_megatron.evaluation.choice_questions import TASKS, Question, read_questions
from mha2mla_megatron.evaluation.means import mean
from mha2mla_megatron.evaluation.perplexity import DTYPES, read_config
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.files import file_sha256, new_files, write_json
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import to_dict


@dataclass(frozen=True)
class ChoicesSettings:
    """Settings of tools/evaluate_choices.py."""

    task: str | None = None
    """hellaswag, piqa, arc_easy, arc_challenge, openbookqa or winogrande. null: what the fields of the rows tell; those
    of ARC and OpenBookQA are the same."""

    max_rows: int | None = None
    """Use only the first so many rows of the file. null: all of them."""

    batch_tokens: int = 4096
    """Tokens in a forward pass, padding included; a longer sequence is a batch of its own."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16. Log-probabilities are float32 always."""

    device: str = "auto"
    """Where the models run: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""

    bos: bool | None = None
    """true: put the tokenizer's BOS token before each context."""

    output: str | None = None
    """A JSON file for the results, replaced if it exists."""

    def __post_init__(self) -> None:
        if self.task is not None:
            require_one_of("task", self.task, tuple(TASKS))
        if self.max_rows is not None:
            require_at_least("max_rows", self.max_rows, 1)
        require_at_least("batch_tokens", self.batch_tokens, 1)
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        pick_device(self.device)


class Pair(NamedTuple):
    """Context and one choice as tokens; the log-likelihood is that of the last `predicted` ones."""

    ids: list[int]
    predicted: int


@dataclass(frozen=True)
class ChoicesResult:
    """One model's figures."""

    model: str

    task: str

    rows: int

    acc: float

    acc_standard_error: float | None
    """None for a single row."""

    acc_norm: float

    acc_norm_standard_error: float | None

    cache_bytes_per_token: float

    dtype: str

    right: list[bool]
    """Of each row, whether acc counts it."""

    right_norm: list[bool]


def evaluate_choices(models: Sequence[str], file: Path, settings: ChoicesSettings) -> list[ChoicesResult]:
    """Both accuracies of each model (folder or hub id) on the rows of a .jsonl[.gz].

    A converted model runs the code in its folder. Writes `settings.output` if that is set. Raises UserError for bad
    input; what can be found without reading weights is found before any are read.
    """
    outputs = [] if settings.output is None else [Path(settings.output)]
    with new_files(outputs, overwrite=True) as scratch:
        task, questions = read_questions(file, settings.task, settings.max_rows)
        folders = {model: resolve_model(model) for model in models}
        pairs = {model: _encode(model, folder, questions, settings.bos) for model, folder in folders.items()}
        results = [
            _evaluate(model, folder, task, questions, pairs[model], settings) for model, folder in folders.items()
        ]
        for output in scratch:
            report = {
                "file": str(file),
                "file_sha256": file_sha256(file),
                "task": task,
                "rows": len(questions),
                "settings": to_dict(settings),
                "results": [dataclasses.asdict(result) for result in results],
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            }
            write_json(output, report)
    return results


def log_likelihoods(
    model: Any, pairs: Sequence[Pair], batch_tokens: int, progress: Progress | None = None
) -> torch.Tensor:
    """Summed log-probability, in nats, of the predicted tokens of each pair: float64 [n], on the CPU."""
    sums = torch.empty(len(pairs), dtype=torch.float64)
    # By length, so that little is padding; the longest first, so that what does not fit into memory fails at once.
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].ids))
    start = 0
    while start < len(order):
        longest = len(pairs[order[start]].ids)
        chosen = order[start : start + max(1, batch_tokens // longest)]
        start += len(chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, index in enumerate(chosen):
            ids[row, : len(pairs[index].ids)] = torch.tensor(pairs[index].ids)
        ids = ids.to(model.device)
        with torch.inference_mode():
            # No mask: the padding is on the right, where no token that counts can see it.
            logits = model(input_ids=ids, use_cache=False).logits  # [b, T, V]
            for row, index in enumerate(chosen):
                end, predicted = len(pairs[index].ids), pairs[index].predicted
                guesses, targets = logits[row, end - predicted - 1 : end - 1], ids[row, end - predicted : end]
                sums[index] = -F.cross_entropy(guesses.float(), targets, reduction="none").double().sum().cpu()
        if progress is not None:
            progress.advance(len(chosen))
    return sums


def format_choices(results: Sequence[ChoicesResult]) -> str:
    """The results as an aligned table."""

    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        (
            result.model,
            result.task,
            str(result.rows),
            f"{result.acc:.4f}",
            error(result.acc_standard_error),
            f"{result.acc_norm:.4f}",
            error(result.acc_norm_standard_error),
            f"{result.cache_bytes_per_token:.12g}",
        )
        for result in results
    ]
    header = ("model", "task", "rows", "acc", "std. error", "acc_norm", "std. error", "cache bytes/token")
    return format_table(header, rows)


def _encode(model: str, folder: Path, questions: Sequence[Question], bos: bool | None) -> list[Pair]:
    """Every choice of every question, in order, in the model's tokens. Raises UserError for what it cannot take."""
    config = read_config(model, folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    if bos and tokenizer.bos_token_id is None:
        raise UserError(f"{model}: bos=true, but its tokenizer has no bos_token")
    prefix: list[int] = [tokenizer.bos_token_id] if bos else []  # type: ignore[list-item]

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    # Spaces at the end of a context are the continuation's: most tokenizers put a space before a word into its token.
    distinct = list(dict.fromkeys(context.rstrip() for question in questions for context in question.contexts))
    contexts = dict(zip(distinct, encode(distinct), strict=True))
    asked = [pair for question in questions for pair in zip(question.contexts, question.choices, strict=True)]
    wholes = iter(encode([f"{context} {choice}" for context, choice in asked]))
    limit = getattr(config, "max_position_embeddings", None)
    pairs = []
    for question in questions:
        where = f"{model}: {question.where}"
        for before, choice in zip(question.contexts, question.choices, strict=True):
            context = contexts[before.rstrip()]
            continuation = next(wholes)[len(context) :]
            pair = Pair(prefix + context + continuation, len(continuation))
            if not continuation or len(pair.ids) == len(continuation):
                raise UserError(f"{where}: its tokenizer leaves nothing of the context or of {choice!r}")
            if limit is not None and len(pair.ids) > limit:
                raise UserError(
                    f"{where}: {len(pair.ids)} tokens are more than the model's max_position_embeddings {limit}"
                )
            if max(pair.ids) >= config.vocab_size:
                raise UserError(
                    f"{where}: token id {max(pair.ids)} is beyond the model's vocabulary {config.vocab_size}"
                )
            pairs.append(pair)
    return pairs


def _evaluate(
    model_name: str,
    folder: Path,
    task: str,
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    settings: ChoicesSettings,
) -> ChoicesResult:
    """Load one model and run it over its pairs."""
    model = load_causal_lm(model_name, folder, DTYPES[settings.dtype], pick_device(settings.device))
    progress = Progress(model_name, len(pairs), "choices")
    sums = log_likelihoods(model, pairs, settings.batch_tokens, progress)
    progress.close()
    if not sums.isfinite().all():
        raise UserError(f"{model_name}: gives log-likelihoods that are not finite, dtype {model.dtype}")
    plain, normed = [], []
    for question, scores in zip(questions, sums.split([len(question.choices) for question in questions]), strict=True):
        characters = torch.tensor([len(choice) for choice in question.choices], dtype=torch.float64)
        plain.append(scores.argmax().item() == question.gold)
        normed.append((scores / characters).argmax().item() == question.gold)
    acc, acc_norm = mean(plain), mean(normed)
    return ChoicesResult(
        model=model_name,
        task=task,
        rows=len(questions),
        acc=acc.value,
        acc_standard_error=acc.error,
        acc_norm=acc_norm.value,
        acc_norm_standard_error=acc_norm.error,
        cache_bytes_per_token=cache_bytes_per_token(model),
        dtype=str(model.dtype).removeprefix("torch."),
        right=plain,
        right_norm=normed,
    )
