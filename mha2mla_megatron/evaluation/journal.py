"""What a long evaluation has found so far: JSON lines, appended and flushed, from which a rerun goes on.

A last line without its end, left by a process that was killed in the middle of it, does not count and is cut off when
the file is written to again. run.json beside the lines says what they are made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import replace_text


def read_lines[Row](file: Path, parse: Callable[[dict[str, Any]], Row], what: str) -> list[Row]:
    """The whole lines of a file, none where it is not there. parse: raises KeyError, TypeError or ValueError for an
    object that is not `what` ("a prediction"). Raises UserError, naming the line, for damaged ones."""
    if not file.exists():
        return []
    found = []
    *lines, _ = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}, line {number}: not {what}; remove the line to have it made again") from None
    return found


def append_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows to the disk, all in one piece. Raises UserError where that fails."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def cut_torn_line(file: Path) -> None:
    """Remove what stands after the last line end, if the file is there."""
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def claim(target: Path, made_of: Mapping[str, Any], parts: str, digests: Mapping[str, str], noun: str) -> None:
    """Write down in target/run.json what the predictions in `target` are made of.

    made_of: what must be the same in every run that adds to them; digests: of parts (data sets, models) that are kept
    under the key `parts`, of which a run may bring new ones. Raises UserError, naming the first of them (`noun` and its
    name, for a part), if something is another than before, and for a folder with other things in it.
    """
    file = target / "run.json"
    before: dict[str, Any] = {parts: {}}
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key in made_of if before[key] != made_of[key]]
            changed += [f"{noun} {name}" for name in digests if before[parts].get(name, digests[name]) != digests[name]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: not written by this tool; give another OUT") from None
        if changed:
            key = changed[0]
            values = f": {before[key]!r} there, {made_of[key]!r} now" if key in made_of else ""
            raise UserError(f"{target}: holds predictions of another {key}{values}; give another OUT")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and holds no run.json of this tool")
    try:
        target.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps({**made_of, parts: {**before[parts], **digests}}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
