"""LongBench as a command: predictions as JSON lines, scores, averages and a table; alone or under torchrun.

Samples are put into batches by length, the longest first, before anything else; so batches, and with them predictions,
are the same however many processes share them and wherever an earlier run stopped.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, pick_device, rank_device
from mha2mla_megatron.checkpoint.folders import model_sha256, resolve_model
from mha2mla_megatron.data.tokenizer import load_tokenizer
from mha2mla_megatron.errors import UserError, require_at_least, require_entries, require_one_of
from mha2mla_megatron.evaluation.cached_perplexity import KINDS, check_options, make_cache
from mha2mla_megatron.evaluation.journal import claim, cut_torn_line
from mha2mla_megatron.evaluation.longbench.generate import Answer, Generator
from mha2mla_megatron.evaluation.longbench.journal import Prediction, append, read_journals
from mha2mla_megatron.evaluation.longbench.samples import TaskData, encode_prompt, read_tasks
from mha2mla_megatron.evaluation.longbench.scores import AVERAGES, score
from mha2mla_megatron.evaluation.longbench.tasks import TASKS
from mha2mla_megatron.evaluation.means import Mean, mean, weighted
from mha2mla_megatron.evaluation.perplexity import DTYPES, read_config
from mha2mla_megatron.evaluation.table import format_markdown
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.ranks import process_group
from mha2mla_megatron.settings import to_dict


@dataclass(frozen=True)
class LongBenchSettings:
    """Settings of tools/evaluate_longbench.py."""

    tasks: list[str] | None = None
    """Names of tasks. null: all that DATA has."""

    max_samples: int | None = None
    """Use only the first so many samples of each task. null: all of them."""

    max_tokens: int = 3500
    """Tokens of a prompt; longer ones lose their middle. The benchmark takes 3500 for models of 4096 tokens, 7500 for
    8192, 15500 for 16384, 31500 for 32768."""

    chat: bool = False
    """true: put prompts into the tokenizer's chat template, except for few-shot tasks and code."""

    batch_size: int = 1
    """Prompts that are continued at a time, padded on the left."""

    cache: str | None = None
    """Generate through this cache: full, int8, int4, int2 (converted models), hqq8, hqq4, hqq2, quanto4, quanto2.
    null: the one that transformers makes."""

    cache_options: dict[str, int] = field(default_factory=dict)
    """Settings of that cache, such as residual_length, group_size and rope_nbits (int) or q_group_size and axis_key
    (hqq, quanto)."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16."""

    device: str = "auto"
    """auto (the GPU if there is one, under torchrun the rank's), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        require_entries("tasks", self.tasks, "task")
        if self.max_samples is not None:
            require_at_least("max_samples", self.max_samples, 1)
        require_at_least("max_tokens", self.max_tokens, 2)
        require_at_least("batch_size", self.batch_size, 1)
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        if self.cache is not None:
            require_one_of("cache", self.cache, KINDS)
        check_options([self.cache], self.cache_options)
        pick_device(self.device)


SAME = ("max_tokens", "chat", "cache", "cache_options", "dtype")
"""Settings on which predictions depend. They, the model and the data must be those of the run that is continued."""


def evaluate_longbench(model: str, data: str, target: Path, settings: LongBenchSettings) -> dict[str, Any] | None:
    """Answer what `target` holds no prediction for yet, and score everything; returns what results.json then holds.

    model: a folder or hub id; a converted model runs the code in its folder. data: as for `read_tasks`. Under torchrun
    the ranks share the batches, and all but rank 0 return None. Raises UserError for bad input; what can be found
    without reading weights is found before any are read.
    """
    device = rank_device(settings.device)
    folder = resolve_model(model)
    tasks = read_tasks(data, settings.tasks, settings.max_samples)
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    prompts = _encode(model, folder, tokenizer, tasks, settings)
    journals = target / "journal"
    results: list[dict[str, Any]] = []

    with process_group() as ranks:
        rank, unwritable = ranks.rank, "cannot be written"
        ranks.every(lambda: None if rank else _claim(target, folder, tasks, settings), unwritable)
        ranks.every(lambda: cut_torn_line(journals / f"{rank}.jsonl"), unwritable)
        missing = _missing(tasks, prompts, read_journals(journals), settings.batch_size)[rank :: ranks.world]

        def answer() -> None:
            generator = Generator(
                model, load_causal_lm(model, folder, DTYPES[settings.dtype], device), tokenizer, settings.cache,
                settings.cache_options,
            )  # fmt: skip
            total = sum(len(prompts[task.task.name][index]) for task, batch in missing for index in batch)
            progress = Progress("longbench", total, "prompt tokens")
            for task, batch in missing:
                name, chosen = task.task.name, [prompts[task.task.name][index] for index in batch]
                answers = generator.answer(chosen, task.task.max_new_tokens, task.task.stops_at_newline)
                predictions = [Prediction(name, *pair) for pair in zip(batch, answers, strict=True)]
                append(journals / f"{rank}.jsonl", predictions)
                progress.advance(sum(map(len, chosen)))
            progress.close()

        ranks.every(answer if missing else lambda: None, unwritable)
        if rank == 0:
            results.append(_write_results(model, data, target, tasks, read_journals(journals), settings))
    return results[0] if results else None


def format_results(results: dict[str, Any]) -> str:
    """The scores of tasks and averages as Markdown, and what the cache takes."""

    def cells(entry: dict[str, Any]) -> tuple[str, str]:
        error = entry["standard_error"]
        return f"{entry['score']:.2f}", "-" if error is None else f"{error:.2f}"

    tasks = [
        (
            TASKS[name].group,
            name,
            TASKS[name].metric,
            str(len(entry["scores"])),
            *cells(entry),
            f"{entry['cache_bytes_per_token']:.6g}",
            _rate_text(entry),
        )
        for name, entry in results["tasks"].items()
    ]
    header = ("group", "task", "metric", "samples", "score", "std. error", "cache bytes/token", "decode tokens/s")
    tables = [format_markdown(header, tasks, text_columns=3)]
    if results["averages"]:
        averages = [(name, *cells(entry)) for name, entry in results["averages"].items()]
        tables.append(format_markdown(("average", "score", "std. error"), averages))
    cost = f"{results['cache_bytes_per_token']:.6g} cache bytes/token, {_rate_text(results)} decode tokens/s"
    return "\n\n".join([*tables, cost])


def _encode(
    name: str, folder: Path, tokenizer: Any, tasks: list[TaskData], settings: LongBenchSettings
) -> dict[str, list[list[int]]]:
    """The prompts of each task in tokens. Raises UserError for what the model cannot take."""
    config = read_config(name, folder)
    if settings.cache is not None:
        make_cache(name, config, settings.cache, settings.cache_options)
    if settings.chat and tokenizer.chat_template is None:
        raise UserError(f"{name}: chat=true, but its tokenizer has no chat template")
    limit = getattr(config, "max_position_embeddings", None)
    prompts: dict[str, list[list[int]]] = {}
    for data in tasks:
        task, rows = data.task, []
        for sample in data.samples:
            ids = encode_prompt(tokenizer, task, sample, settings.max_tokens, settings.chat)
            if limit is not None and len(ids) + task.max_new_tokens > limit:
                raise UserError(
                    f"{name}: {sample.where}: {len(ids)} tokens (max_tokens={settings.max_tokens}) and "
                    f"{task.max_new_tokens} new ones are more than the model's max_position_embeddings {limit}"
                )
            if not ids or max(ids) >= config.vocab_size:
                raise UserError(
                    f"{name}: {sample.where}: token id {max(ids, default=None)} is not in the model's vocabulary of "
                    f"{config.vocab_size}"
                )
            rows.append(ids)
        prompts[task.name] = rows
    return prompts


def _claim(target: Path, folder: Path, tasks: list[TaskData], settings: LongBenchSettings) -> None:
    """Write down what the predictions in `target` are made of. Raises UserError if they are made of something else."""
    made_of = {"model_sha256": model_sha256(folder)} | {key: getattr(settings, key) for key in SAME}
    claim(target, made_of, "data_sha256", {task.task.name: task.sha256 for task in tasks}, "data set for")


def _missing(
    tasks: list[TaskData], prompts: dict[str, list[list[int]]], done: Container[tuple[str, int]], size: int
) -> list[tuple[TaskData, list[int]]]:
    """Batches of samples, the longest of a task first, less those that have a prediction."""
    batches = []
    for task in tasks:
        rows = prompts[task.task.name]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), size):
            batch = [index for index in order[start : start + size] if (task.task.name, index) not in done]
            if batch:
                batches.append((task, batch))
    return batches


def _write_results(
    model: str,
    data: str,
    target: Path,
    tasks: list[TaskData],
    answers: dict[tuple[str, int], Answer],
    settings: LongBenchSettings,
) -> dict[str, Any]:
    """Score all predictions; write predictions/TASK.jsonl, results.md and results.json."""
    means: dict[str, Mean] = {}
    entries: dict[str, dict[str, Any]] = {}
    given: dict[str, list[Answer]] = {}
    for found in tasks:
        task = found.task
        given[task.name] = [answers[task.name, index] for index in range(len(found.samples))]
        texts = [answer.text for answer in given[task.name]]
        scores = [
            score(task, text, sample.answers, sample.classes, sample.where)
            for text, sample in zip(texts, found.samples, strict=True)
        ]
        means[task.name] = mean(scores)
        entries[task.name] = {
            **_entry(means[task.name]),
            **_cost(given[task.name]),
            "data_sha256": found.sha256,
            "scores": scores,
        }
        rows = (
            {"pred": text, "answers": sample.answers, "all_classes": sample.classes or None, **sample.about}
            for text, sample in zip(texts, found.samples, strict=True)
        )
        with new_files([target / "predictions" / f"{task.name}.jsonl"], overwrite=True) as (file,):
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    averages = {name: weighted(means, weights) for name, weights in AVERAGES.items()}
    results = {
        "model": model,
        "data": data,
        "settings": to_dict(settings),
        **_cost([answer for own in given.values() for answer in own]),
        "tasks": entries,
        "averages": {name: _entry(value) for name, value in averages.items() if value is not None},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    with new_files([target / "results.md", target / "results.json"], overwrite=True) as (table, file):
        table.write_text(format_results(results) + "\n", encoding="utf-8")
        write_json(file, results)
    return results


def _cost(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Means over all cached tokens and all decoded ones; these take a process's time, so its rate, at its batch size.
    None where every answer was one token."""
    seconds = sum(answer.decode_seconds for answer in answers)
    return {
        "cache_bytes_per_token": sum(answer.cache_bytes for answer in answers)
        / sum(answer.cached_tokens for answer in answers),
        "decode_tokens_per_second": sum(answer.decoded_tokens for answer in answers) / seconds if seconds else None,
    }


def _rate_text(entry: dict[str, Any]) -> str:
    rate = entry["decode_tokens_per_second"]
    return "-" if rate is None else f"{rate:.4g}"


def _entry(value: Mean) -> dict[str, Any]:
    return {"score": value.value, "standard_error": value.error}
