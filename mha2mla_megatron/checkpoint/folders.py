"""Where models come from, local folders and hub ids, and what travels with their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from mha2mla_megatron.errors import UserError, first_line

COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What travels with the weights, where present. Code files do not: an export brings its own."""


def resolve_model(name: str) -> Path:
    """The local folder of a model: `name` itself if it is one, else the hub id's snapshot (downloaded or cached).

    Raises UserError where it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name}: a file, not a model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such folder")
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: neither a folder nor a hub model that can be had ({first_line(error)})") from None


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
