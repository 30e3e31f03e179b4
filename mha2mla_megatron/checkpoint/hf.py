"""Hugging Face folders: a checked, lazy reader and a streaming writer of safetensors shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mha2mla_megatron.architecture import MLA_MODEL_TYPE, Architecture
from mha2mla_megatron.errors import UserError

CODE_FILES = (
    "layout_mha2mla.py", "configuration_mha2mla.py", "modeling_mha2mla.py", "decode_mha2mla.py",
    "decode_triton_mha2mla.py", "quantise_mha2mla.py", "latent_cache_mha2mla.py", "backend_cache_mha2mla.py",
)  # fmt: skip
CODE_FOLDER = Path(__file__).resolve().parents[1] / "hf"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class HFReader:
    """The tensors of a model folder, checked against its architecture when opened and read one at a time.

    check: false leaves out the comparison with the architecture.

    Raises UserError naming the tensor or file for a missing, surplus or mis-shaped tensor and for a damaged shard.
    """

    def __init__(self, folder: Path, architecture: Architecture, check: bool = True) -> None:
        self.folder = folder
        self.files = {file: self._open(folder / file) for file in _shards(folder)}
        self.where = {name: file for file, tensors in self.files.items() for name in tensors.keys()}  # noqa: SIM118
        expected = architecture.tensor_shapes()
        self.names = list(expected)
        if check:
            self._check(architecture, expected)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        try:
            return self.files[self.where[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / self.where[name]}: {name} cannot be read ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that is there."""
        return {name: tuple(self.files[file].get_slice(name).get_shape()) for name, file in self.where.items()}

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{file}: missing, though the index names it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None

    def _check(self, architecture: Architecture, expected: dict[str, tuple[int, ...]]) -> None:
        for name, shape in expected.items():
            if name not in self.where:
                raise UserError(f"{self.folder}: tensor {name} is missing")
            found = self.files[self.where[name]].get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise UserError(f"{self.folder}: {name} has shape {tuple(found.get_shape())}, config.json says {shape}")
            if found.get_dtype() not in ("F64", "F32", "F16", "BF16") and not name.endswith("rope_pairs"):
                raise UserError(f"{self.folder}: {name} has dtype {found.get_dtype()}; a floating one is needed")
        for name in self.where:
            if name not in expected and not architecture.droppable(name):
                raise UserError(f"{self.folder}: surplus tensor {name}: this architecture has none of that name")


class HFWriter:
    """Writes tensors into shards of at most `max_shard_size` bytes, then the index; the folder exists and is empty."""

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder, self.limit = folder, max_shard_size
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.limit:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is pending; name the shards as transformers does and index them if there are several."""
        self._flush()
        count = len(self.shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self.pending:
            save_file(self.pending, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
            self.shards.append(list(self.pending))
            self.pending, self.pending_bytes = {}, 0


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and beside a converted model's the code files that its auto_map names."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if config["model_type"] == MLA_MODEL_TYPE:
        for name in CODE_FILES:
            shutil.copyfile(CODE_FOLDER / name, folder / name)


def parse_size(text: str, key: str) -> int:
    """'5GB' or '500MiB' -> bytes. Raises UserError naming `key`."""
    number, unit = text.rstrip("BKMGIbkmgi").strip(), text.lstrip("0123456789. ").upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{key}: '{text}' is not a size; valid: 500MB, 5GB, 2GiB")
    return size


def _shards(folder: Path) -> Iterator[str]:
    """File names of the folder's safetensors shards."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise UserError(
                f"{folder}: no model.safetensors and no model.safetensors.index.json; safetensors are needed"
            )
        yield "model.safetensors"
        return
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a valid index ({error})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a file in this folder")
        yield file
