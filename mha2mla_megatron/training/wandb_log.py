"""Weights & Biases, where a run asks for it: an optional package."""

from __future__ import annotations

import importlib
import os
import uuid
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import replace_text
from mha2mla_megatron.settings import to_dict
from mha2mla_megatron.training.config import FinetuneSettings


def check_wandb(settings: FinetuneSettings) -> None:
    """Raise UserError where the run is to be logged to W&B and the package is not there."""
    if settings.wandb is not None:
        _package()


def open_wandb(settings: FinetuneSettings, root: Path) -> Any:
    """W&B's run of this training, None where it is not asked for; a resumed training goes on with the one it had.

    Offline, under root/wandb, unless the variable WANDB_MODE is set.
    """
    if settings.wandb is None:
        return None
    name = root / "wandb" / "run_id"
    if not name.exists():
        name.parent.mkdir(exist_ok=True)
        replace_text(name, uuid.uuid4().hex)
    return _package().init(
        project=settings.wandb,
        name=root.name,
        id=name.read_text(),
        resume="allow",
        dir=str(root),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=to_dict(settings),
    )


def _package() -> Any:
    try:
        package: Any = importlib.import_module("wandb")
    except ImportError:
        package = None
    if not hasattr(package, "init"):  # a folder called wandb in the working directory can be imported too
        raise UserError("wandb: the package is not installed (pip install wandb); valid: null")
    return package
