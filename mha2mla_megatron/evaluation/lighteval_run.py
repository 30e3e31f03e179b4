"""lighteval, unmodified, on the tasks of `cloze`: what is bad is said first, then its own command runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mha2mla_megatron.checkpoint.folders import model_sha256, resolve_model
from mha2mla_megatron.errors import UserError, require_at_least, require_entries, require_one_of
from mha2mla_megatron.evaluation.cache import planned_cache_bytes_per_token
from mha2mla_megatron.evaluation.cloze import TASKS
from mha2mla_megatron.evaluation.comparison import COST_FILE
from mha2mla_megatron.evaluation.perplexity import DTYPES, read_config
from mha2mla_megatron.evaluation.rows import read_rows
from mha2mla_megatron.files import file_sha256, new_files, write_json

DEFAULT_LENGTH = 2048
"""Tokens that a model sees at most if nothing is said."""


@dataclass(frozen=True)
class LightevalSettings:
    """Settings of tools/evaluate_lighteval.py."""

    tasks: list[str] | None = None
    """Names of tasks. null: all nine."""

    data: str | None = None
    """A folder of NAME/SPLIT.jsonl[.gz] to read in the place of the hub's data sets."""

    max_samples: int | None = None
    """Use only so many rows of each task, drawn by lighteval with a fixed seed. null: all of them."""

    num_fewshot: int = 0
    """Examples before each question, drawn by lighteval from the train split (MMLU: dev, of any subject)."""

    max_length: int | None = None
    """Tokens that the model sees at most; of a longer prompt lighteval cuts off the beginning. null: 2048, or the
    model's context if that is shorter."""

    batch_size: int = 16
    """lighteval divides it by the number of choices and rounds it to 8."""

    processes: int = 1
    """Processes that share the questions, each with the whole model on a GPU of its own (without GPUs, on the CPU)."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16."""

    def __post_init__(self) -> None:
        require_entries("tasks", self.tasks, "task")
        for name in self.tasks or ():
            require_one_of("tasks", name, tuple(TASKS))
        if self.max_samples is not None:
            require_at_least("max_samples", self.max_samples, 1)
        require_at_least("num_fewshot", self.num_fewshot, 0)
        if self.max_length is not None:
            require_at_least("max_length", self.max_length, 2)
        require_at_least("batch_size", self.batch_size, 1)
        require_at_least("processes", self.processes, 1)
        if torch.cuda.is_available() and self.processes > torch.cuda.device_count():
            raise UserError(f"processes: {self.processes}, but there are {torch.cuda.device_count()} GPUs; one each")
        require_one_of("dtype", self.dtype, tuple(DTYPES))


def evaluate_lighteval(model: str, target: Path, settings: LightevalSettings) -> None:
    """Run lighteval on a model (folder or hub id); results, details of every row and cost.json go into `target`.

    Raises UserError for bad input, before anything is run, and where lighteval ends with an error.
    """
    names = list(TASKS) if settings.tasks is None else settings.tasks
    folder = resolve_model(model)
    config = read_config(model, folder)
    max_length = _max_length(model, config, settings)
    cost = planned_cache_bytes_per_token(model, config, DTYPES[settings.dtype])
    files: list[Path] = []
    if settings.data is not None:
        for name in names:
            files += _check_rows(Path(settings.data), name, TASKS[name].split, 1)
            if settings.num_fewshot:
                files += _check_rows(Path(settings.data), name, "train", settings.num_fewshot)
    if importlib.util.find_spec("lighteval") is None:
        raise UserError("lighteval is not installed: pip install -c constraints.txt -e '.[eval]'")
    target = Path(os.path.abspath(target))
    # lighteval keeps answers below cache_dir / model_name, which an absolute name leads into the model's folder, and
    # knows model and rows there by their paths only: hence a name below `target`, and the digest of both.
    link = target / "models" / Path(os.path.abspath(model)).name
    contents = "".join([model_sha256(folder), *map(file_sha256, files)])
    answers = target / "cache" / hashlib.sha256(contents.encode()).hexdigest()[:16]
    parameters: dict[str, Any] = {
        "model_name": f"./models/{link.name}",
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "max_length": max_length,
        "trust_remote_code": True,
        "override_chat_template": False,
    }
    words = [",".join(f"{name}|{settings.num_fewshot}" for name in names)]
    words += ["--custom-tasks", str(Path(__file__).with_name("lighteval_tasks.py"))]
    words += ["--output-dir", str(target), "--save-details"]
    if settings.max_samples is not None:
        words += ["--max-samples", str(settings.max_samples)]
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        launch = _launch(target, parameters, answers, settings.processes)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    # lighteval takes its tasks out of a set; in another order, processes would disagree on who asks which question.
    here = {"PYTHONHASHSEED": "0"}
    if settings.data is not None:
        here["MHA2MLA_EVAL_DATA"] = os.path.abspath(settings.data)
    if not torch.cuda.is_available():
        here["ACCELERATE_USE_CPU"] = "true"  # several processes would each do all the work otherwise
    code = _run([sys.executable, "-m", *launch, *words], {**os.environ, **here}, target)
    if code != 0:
        raise UserError(f"lighteval ended with exit code {code}; its own messages are above")
    with new_files([target / COST_FILE], overwrite=True) as (file,):
        write_json(file, {"cache_bytes_per_token": cost})


def _run(command: list[str], environment: Mapping[str, str], folder: Path) -> int:
    """The exit code of a command that does not outlive this process: where this one is told to end, that one is first.
    (A Ctrl-C reaches both.)"""
    told: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with subprocess.Popen(command, env=environment, cwd=folder) as child:
            children.append(child)
            for number in told:  # before there was a child
                child.send_signal(number)
            try:
                code = child.wait()
            except BaseException:
                child.kill()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    for number in told:
        os.kill(os.getpid(), number)
    return code


def _max_length(model: str, config: Any, settings: LightevalSettings) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if settings.max_length is None:
        return DEFAULT_LENGTH if context is None else min(DEFAULT_LENGTH, context)
    if context is not None and settings.max_length > context:
        raise UserError(
            f"{model}: max_length: {settings.max_length} tokens are more than its max_position_embeddings {context}"
        )
    return settings.max_length


def _launch(target: Path, parameters: Mapping[str, Any], answers: Path, processes: int) -> list[str]:
    """Write what lighteval is to know of the model; returns the module that starts it, and its first words.

    answers: a folder in which those of earlier runs may be.
    """
    if processes == 1:
        arguments = target / "model.yaml"
        _write_parameters(arguments, {**parameters, "cache_dir": str(answers)})
        return ["lighteval", "accelerate", str(arguments)]
    folder = target / "processes"
    folder.mkdir(exist_ok=True)
    for rank in range(processes):
        # New ones each time: processes that find different answers, as after a kill, would wait for each other.
        own = answers.with_name(f"{answers.name}-{rank}")
        shutil.rmtree(own, ignore_errors=True)
        _write_parameters(folder / f"{rank}.yaml", {**parameters, "cache_dir": str(own)})
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", "mha2mla_megatron.evaluation.lighteval_process", "accelerate", str(folder)]


def _write_parameters(file: Path, parameters: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump({"model_parameters": dict(parameters)}), encoding="utf-8")


def _check_rows(data: Path, name: str, split: str, least: int) -> list[Path]:
    """A task's local files of a split.

    Raises UserError if there are none, a row in them is not one of the task, or they hold fewer than `least`.
    """
    task = TASKS[name]
    folder = data / task.folder
    files = sorted(file for file in folder.glob(f"{split}*.jsonl*") if file.is_file())
    if not files:
        why = "needs" if split == task.split else "takes its examples from (num_fewshot)"
        raise UserError(f"{folder}: holds no {split}.jsonl[.gz], which {name} {why}")
    count = 0
    for file in files:
        before = count
        for where, row in read_rows(file):
            task.ask(row, where)
            count += 1
        if count == before:
            raise UserError(f"{file}: holds no rows")
    if count < least:
        raise UserError(f"{folder}: {split} holds {count} rows; num_fewshot={least} takes {least} of them")
    return files
