"""Hugging Face folders: a checked, lazy reader and a streaming writer of safetensors shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.resume import PartialFolder
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.families import is_converted

CODE_FILES = (
    "layout_mha2mla.py", "configuration_mha2mla.py", "modeling_mha2mla.py", "experts_mha2mla.py",
    "decode_mha2mla.py", "decode_triton_mha2mla.py", "decode_packed_mha2mla.py", "quantise_mha2mla.py",
    "quantise_triton_mha2mla.py", "packed_tokens_mha2mla.py", "latent_cache_mha2mla.py", "static_cache_mha2mla.py",
    "backend_cache_mha2mla.py", "offloaded_cache_mha2mla.py",
)  # fmt: skip
CODE_FOLDER = Path(__file__).resolve().parents[1] / "hf"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()} | {torch.int64: "I64", torch.int32: "I32"}
"""What safetensors calls the types that are written."""


class HFReader:
    """The tensors of a model folder, checked against its architecture when opened and read one at a time.

    check: false leaves out the comparison with the architecture.

    Raises UserError naming the tensor or file for a missing, surplus or mis-shaped tensor and for a damaged shard.
    """

    def __init__(self, folder: Path, architecture: Architecture, check: bool = True) -> None:
        self.folder = folder
        self.files = {file: self._open(folder / file) for file in _shards(folder)}
        self.where: dict[str, str] = {}
        for file, tensors in self.files.items():
            for name in tensors.keys():  # noqa: SIM118
                if name in self.where:
                    raise UserError(f"{folder}: tensor {name} is in two files, {self.where[name]} and {file}")
                self.where[name] = file
        expected = architecture.tensor_shapes()
        self.names = list(expected)
        self.dtypes: dict[str, torch.dtype] = {}
        if check:
            self._check(architecture, expected)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU: a view of the mapped file, whose bytes are read where they are used."""
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
            valid = {"I64": torch.int64} if name.endswith("rope_pairs") else FLOATS
            if found.get_dtype() not in valid:
                raise UserError(
                    f"{self.folder}: {name} has dtype {found.get_dtype()}; one of {', '.join(valid)} is needed"
                )
            self.dtypes[name] = valid[found.get_dtype()]
        for name in self.where:
            if name not in expected and not architecture.droppable(name):
                raise UserError(f"{self.folder}: surplus tensor {name}: this architecture has none of that name")


class HFWriter:
    """Writes tensors into shards of at most `max_shard_size` bytes, laid out as the safetensors library would.

    tensors: every tensor of the model on the meta device, in the order in which they are dealt out to shards.
    hf: the folder of config.json and the tokenizer, here that of the shards.
    """

    def __init__(self, partial: PartialFolder, tensors: dict[str, torch.Tensor], max_shard_size: int) -> None:
        self.partial, self.tensors = partial, tensors
        self.hf = partial.path
        self.files: dict[str, str] = {}
        self.offsets: dict[str, int] = {}
        shards: list[list[str]] = []
        size = 0
        for name, tensor in tensors.items():
            if not shards or size + tensor.nbytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += tensor.nbytes
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            self._lay_out(file, names)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which must not change after that."""
        planned = self.tensors[name]
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), f"{name} is not as it was planned"
        content = memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy())
        self.partial.write(name, self.files[name], self.offsets[name], lambda stream: stream.write(content))

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is written."""
        planned = self.tensors[name]
        return torch.frombuffer(self.partial.read(name), dtype=planned.dtype).view(planned.shape)

    def close(self) -> None:
        """Index the shards if there are several."""
        self.partial.wait()
        missing = self.tensors.keys() - self.partial.pieces.keys()
        assert not missing, f"not written: {missing}"
        if len(set(self.files.values())) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors.values())},
                "weight_map": {name: self.files[name] for name in self.tensors},
            }
            (self.partial.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: str, names: list[str]) -> None:
        """Give each tensor of a shard its place, and write the header."""
        head, offsets = lay_out({name: self.tensors[name] for name in names}, {"format": "pt"})
        self.files.update(dict.fromkeys(names, file))
        self.offsets.update(offsets)
        if file not in self.partial.done and self.partial.ranks.rank == 0:
            self.partial.write(file, file, 0, lambda stream: stream.write(head))
            self.partial.finish(file)


def lay_out(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> tuple[memoryview, dict[str, int]]:
    """The header of a safetensors file of these tensors, which may be on the meta device, and where each starts in it.

    Wide types come first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
    return memoryview(len(text).to_bytes(8, "little") + text), offsets


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and beside a converted model's the code files that its auto_map names."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if is_converted(config["model_type"]):
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a valid index ({error})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a file in this folder")
        yield file
