"""lighteval, unmodified, on the tasks of `cloze`: what is bad is said first, then its own command runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mha2mla_megatron.checkpoint.folders import model_sha256, resolve_model
from mha2mla_megatron.errors import UserError, require_at_least, require_entries, require_one_of
from mha2mla_megatron.evaluation.cloze import TASKS
from mha2mla_megatron.evaluation.perplexity import DTYPES, read_config
from mha2mla_megatron.evaluation.rows import read_rows


@dataclass(frozen=True)
class LightevalSettings:
    """Settings of tools/evaluate_lighteval.py."""

    tasks: list[str] | None = None
    """Names of tasks. null: all nine."""

    data: str | None = None
    """A folder of NAME/SPLIT.jsonl[.gz] to read in the place of the hub's data sets."""

    max_samples: int | None = None
    """Use only so many rows of each task, drawn by lighteval with a fixed seed. null: all of them."""

    batch_size: int = 16
    """lighteval divides it by the number of choices and rounds it to 8."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16."""

    def __post_init__(self) -> None:
        require_entries("tasks", self.tasks, "task")
        for name in self.tasks or ():
            require_one_of("tasks", name, tuple(TASKS))
        if self.max_samples is not None:
            require_at_least("max_samples", self.max_samples, 1)
        require_at_least("batch_size", self.batch_size, 1)
        require_one_of("dtype", self.dtype, tuple(DTYPES))


def evaluate_lighteval(model: str, target: Path, settings: LightevalSettings) -> None:
    """Run lighteval on a model (folder or hub id); its results and the details of every row go into `target`.

    Raises UserError for bad input, before anything is run, and where lighteval ends with an error.
    """
    names = list(TASKS) if settings.tasks is None else settings.tasks
    folder = resolve_model(model)
    config = read_config(model, folder)
    if settings.data is not None:
        for name in names:
            _check_rows(Path(settings.data), name)
    if importlib.util.find_spec("lighteval") is None:
        raise UserError("lighteval is not installed: pip install -c constraints.txt -e '.[eval]'")
    target = Path(os.path.abspath(target))
    # lighteval keeps answers below cache_dir / model_name, which an absolute name leads into the model's folder, and
    # knows a model there by its settings only: hence a name below `target`, and the weights' digest.
    link = target / "models" / Path(os.path.abspath(model)).name
    parameters: dict[str, Any] = {
        "model_name": f"./models/{link.name}",
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "max_length": config.max_position_embeddings,
        "trust_remote_code": True,
        "override_chat_template": False,
        "cache_dir": str(target / "cache" / model_sha256(folder)[:16]),
    }
    arguments = target / "model.yaml"
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        arguments.write_text(yaml.safe_dump({"model_parameters": parameters}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    command = [sys.executable, "-m", "lighteval", "accelerate", str(arguments), ",".join(f"{name}|0" for name in names)]
    command += ["--custom-tasks", str(Path(__file__).with_name("lighteval_tasks.py"))]
    command += ["--output-dir", str(target), "--save-details"]
    if settings.max_samples is not None:
        command += ["--max-samples", str(settings.max_samples)]
    here = {} if settings.data is None else {"MHA2MLA_EVAL_DATA": os.path.abspath(settings.data)}
    done = subprocess.run(command, env={**os.environ, **here}, cwd=target)
    if done.returncode != 0:
        raise UserError(f"lighteval ended with exit code {done.returncode}; its own messages are above")


def _check_rows(data: Path, name: str) -> None:
    """Raise UserError if a task's local file is missing or a row in it is not one of the task."""
    task = TASKS[name]
    folder = data / task.folder
    files = sorted(file for file in folder.glob(f"{task.split}*.jsonl*") if file.is_file())
    if not files:
        raise UserError(f"{folder}: holds no {task.split}.jsonl[.gz], which {name} needs")
    for file in files:
        empty = True
        for where, row in read_rows(file):
            task.ask(row, where)
            empty = False
        if empty:
            raise UserError(f"{file}: holds no rows")
