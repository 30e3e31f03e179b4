"""The samples of LongBench: read from JSON lines or the authors' archive, and turned into prompts of tokens."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.evaluation.longbench.scores import score
from mha2mla_megatron.evaluation.longbench.tasks import TASKS, LongBenchTask
from mha2mla_megatron.evaluation.rows import Row, parse_rows, read_rows, require_text, require_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHIVE = "data.zip"
"""What the hub's data set keeps its rows in, as data/TASK.jsonl."""


class Sample(NamedTuple):
    """One row."""

    context: str
    input: str
    answers: list[str]

    classes: list[str]
    """All there are, for classification; else empty."""

    about: dict[str, Any]
    """The fields that are only passed on, where present: length, _id."""

    where: str
    """File and line, for messages."""


@dataclass(frozen=True)
class TaskData:
    """The samples of one task."""

    task: LongBenchTask

    samples: list[Sample]

    sha256: str
    """Of contexts, inputs, answers and classes of all samples, those beyond `max_samples` included."""


def read_tasks(source: str, names: Sequence[str] | None, max_samples: int | None) -> list[TaskData]:
    """The first `max_samples` samples of each task, in the benchmark's order.

    source: a folder of TASK.jsonl[.gz], the authors' data.zip, or a hub data set that holds it. names: None for all
    that are there. Raises UserError for bad rows and tasks that are missing.
    """
    origin = Path(source)
    if not origin.exists():
        origin = _download(source)
    files = _folder_files(origin) if origin.is_dir() else _members(origin)
    for name in names or ():
        if name not in TASKS:
            raise UserError(f"tasks: unknown task '{name}'; known: {', '.join(TASKS)}")
        if name not in files:
            raise UserError(f"{source}: holds no {name}.jsonl; it has: {', '.join(files) or 'no task of LongBench'}")
    chosen = [name for name in TASKS if name in (files if names is None else names)]
    if not chosen:
        raise UserError(f"{source}: holds no task of LongBench; their files are called TASK.jsonl or TASK.jsonl.gz")
    return [_read_task(TASKS[name], origin, files[name], max_samples) for name in chosen]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, task: LongBenchTask, sample: Sample, max_tokens: int, chat: bool
) -> list[int]:
    """The prompt in tokens, with the special tokens that the tokenizer adds; what is too long loses its middle.

    As in the benchmark, the halves that are kept are decoded and tokenised again, so that the length may differ from
    `max_tokens` a little; a chat template comes on top.
    """
    prompt = task.prompt.format(context=sample.context, input=sample.input)
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]  # type: ignore[assignment]
    if len(ids) > max_tokens:
        half = max_tokens // 2
        prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))  # type: ignore[misc]
        ids = tokenizer(prompt, verbose=False)["input_ids"]  # type: ignore[assignment]
    if chat and task.chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
    return ids


def _folder_files(folder: Path) -> dict[str, str]:
    names = ((task, f"{task}{ending}") for task in TASKS for ending in (".jsonl.gz", ".jsonl"))
    return {task: name for task, name in names if (folder / name).is_file()}


def _members(archive: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            there = set(opened.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive}: neither a folder nor a zip archive ({first_line(error)})") from None
    return {task: f"data/{task}.jsonl" for task in TASKS if f"data/{task}.jsonl" in there}


def _download(name: str) -> Path:
    """The archive of a hub data set. Its loading script is of a kind that the datasets library has given up."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such folder or archive")
    try:
        return Path(hf_hub_download(name, ARCHIVE, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: neither a folder nor a hub data set with a {ARCHIVE} that can be had ({first_line(error)})"
        ) from None


def _read_task(task: LongBenchTask, origin: Path, name: str, max_samples: int | None) -> TaskData:
    if origin.is_dir():
        rows = read_rows(origin / name)
    else:
        with zipfile.ZipFile(origin) as archive:
            rows = parse_rows(archive.read(name), f"{origin}: {name}")
    samples = [_sample(task, row) for row in rows]
    if not samples:
        raise UserError(f"{origin / name}: holds no rows")
    content = json.dumps([sample[:4] for sample in samples]).encode()
    return TaskData(task, samples[:max_samples], hashlib.sha256(content).hexdigest())


def _sample(task: LongBenchTask, found: Row) -> Sample:
    where, row = found
    classes: Any = []
    if task.metric == "classification":
        classes = require_texts(row, "all_classes", where)
    sample = Sample(
        require_text(row, "context", where),
        require_text(row, "input", where),
        require_texts(row, "answers", where),
        classes,
        {field: row[field] for field in ("length", "_id") if field in row},
        where,
    )
    score(task, "", sample.answers, sample.classes, where)  # what cannot be scored is found before the model runs
    return sample
