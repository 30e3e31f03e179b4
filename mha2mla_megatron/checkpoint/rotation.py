"""The step folders of a checkpoint root over time: one that is being written, saved ones, ones that are deleted.

A folder is called `iter_0000100` only while it is complete. What is being written or deleted has a hidden name, so that
a process that dies at any moment leaves nothing behind that looks like a saved step.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mha2mla_megatron.checkpoint.megatron import BEST, LATEST, BestStep, iteration_folder, write_latest

_STEP = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(rf"\.iter_\d{{7,}}\.(partial|deleted)|\.({re.escape(LATEST)}|{re.escape(BEST)})")


def partial_folder(root: Path, iteration: int) -> Path:
    """Where a step is written before it is complete."""
    return root / f".{iteration_folder(root, iteration).name}.partial"


def saved_steps(root: Path) -> list[int]:
    """The steps that have a folder, in order."""
    found = (_STEP.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in found if match)


def publish_step(root: Path, iteration: int) -> None:
    """Give the complete, sealed partial folder its name, and point `latest` at it."""
    folder = iteration_folder(root, iteration)
    if folder.exists():  # of a run that was put back to an earlier step
        delete_step(root, iteration)
    partial_folder(root, iteration).rename(folder)
    write_latest(root, iteration)


def delete_older(root: Path, iteration: int, keep_last: int, best: BestStep | None) -> None:
    """Delete all but the newest `keep_last` steps up to this one, and the best; later ones are of a run that was put
    back."""
    for old in [step for step in saved_steps(root) if step <= iteration][:-keep_last]:
        if best is None or old != best.step:
            delete_step(root, old)


def delete_step(root: Path, iteration: int) -> None:
    folder = iteration_folder(root, iteration)
    hidden = root / f".{folder.name}.deleted"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path) -> list[str]:
    """Remove what an interrupted save or deletion left behind; returns the names."""
    leftovers = sorted(path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]
