"""Where models come from, local folders and hub ids, and what travels with their weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from mha2mla_megatron.architecture import refuse_special_weights
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import file_sha256

COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What travels with the weights, where present. Code files do not: an export brings its own."""


def resolve_model(name: str) -> Path:
    """The local folder of a model: `name` itself if it is one, else the hub id's snapshot (downloaded or cached).

    Raises UserError where it is neither, and for an adapter or quantised weights.
    """
    folder = resolve_folder(name)
    refuse_special_weights(folder)
    return folder


def resolve_folder(name: str) -> Path:
    """`resolve_model` for what is read beside the weights, such as the tokenizer."""
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


def model_sha256(folder: Path) -> str:
    """Hex digest of a model's weights, configs, tokenizer and chat template."""
    parts = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return hashlib.sha256(json.dumps([(file.name, file_sha256(file)) for file in parts]).encode()).hexdigest()


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
