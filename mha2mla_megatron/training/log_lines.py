"""The lines of a run's log.jsonl, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def log_lines(file: Path) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """(number from 1, the line, its values) of each whole line: a killed run may leave half a line at the end.

    Values are None where the line is none of tools/finetune.py's. Raises OSError.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        ours = isinstance(found, dict) and isinstance(found.get("step"), int)
        yield number, f"{line}\n", found if ours else None
