"""The manifest of a saved step: what its files are, so that one that is lost, cut or changed is named.

`manifest.json` is written last into a step folder. It has the size of every file and the sha256 of the small ones. The
tensors' own bytes are not hashed again: each piece of a `.distcp` file carries a checksum, which `TorchDistReader`
checks where it reads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mha2mla_megatron.checkpoint.megatron import TorchDistReader
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import replace_text, scratch_of

MANIFEST = "manifest.json"


def seal_step(folder: Path, iteration: int, layout: dict[str, int]) -> None:
    """Write the manifest of a step whose files are all there. layout: the parallel sizes it was saved at.

    Raises UserError where a file that the index names is missing or too short, as on a node whose disk is its own.
    """
    ends: dict[str, int] = {}
    for info in TorchDistReader(folder).storage.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < end:
            raise UserError(f"{folder / name}: {size} bytes were written, the index says {end}; is the disk shared?")
    scratch_of(folder / MANIFEST).unlink(missing_ok=True)  # of a process that ended at this point
    files = {file.name: _describe(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    content = {"format": 1, "step": iteration, "layout": layout, "files": files}
    replace_text(folder / MANIFEST, json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n")


def check_manifest(folder: Path) -> dict[str, Any] | None:
    """Compare a step folder with its manifest and return that; None for a step saved without one.

    Raises UserError naming the first file that differs.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text())
        digest = content.pop("sha256")
        files = dict(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: damaged ({type(error).__name__}: {error})") from None
    if digest != _digest(content):
        raise UserError(f"{manifest}: damaged (its own checksum differs)")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {MANIFEST} names it")
        if file.stat().st_size != expected["size"]:
            raise UserError(f"{file}: truncated or changed ({file.stat().st_size} bytes, saved {expected['size']})")
        if expected["sha256"] is not None and _describe(file) != expected:
            raise UserError(f"{file}: damaged (its sha256 is not the one in {MANIFEST})")
    return content


def _describe(file: Path) -> dict[str, Any]:
    digest = None if file.suffix == ".distcp" else hashlib.sha256(file.read_bytes()).hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
