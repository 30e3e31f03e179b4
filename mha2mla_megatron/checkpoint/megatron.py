"""Megatron `torch_dist` checkpoints as folders: where things are, and reading and writing global tensors.

A checkpoint root holds `hf/` (config.json and the tokenizer of the model), one folder `iter_0000100` per saved step,
`latest_checkpointed_iteration.txt`, written last; `best_checkpointed_iteration.txt` where a run keeps its best step.
Tensors are stored with their global shapes, so that one process can read what any parallel layout wrote, and the
reverse.
"""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from mha2mla_megatron.checkpoint.adapters import with_adapters
from mha2mla_megatron.checkpoint.average import AVERAGE, check_average
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import replace_text

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
HF_FOLDER = "hf"

BESIDE_MODEL = ("optimizer.", AVERAGE)
"""How names of tensors begin that a run saves beside its model's."""

HEADER_LENGTH, NAME_LENGTH = 30, 26
"""Of a zip archive's header of a file: its bytes without name and extra field, and where their lengths are in it."""


def iteration_folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def read_latest(root: Path) -> int | None:
    """The newest complete step of a checkpoint root; None where there is none yet."""
    try:
        return int((root / LATEST).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{root / LATEST}: not a step number") from None


def write_latest(root: Path, iteration: int) -> None:
    """Point at a complete step; the file changes all at once."""
    replace_text(root / LATEST, f"{iteration}\n")


@dataclass(frozen=True)
class BestStep:
    """The saved step with the lowest validation loss of its run so far."""

    step: int
    validation_loss: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> BestStep | None:
        """As a checkpoint's plain values of the run have it."""
        return cls(**run["best"]) if run.get("best") is not None else None


def read_best(root: Path) -> BestStep | None:
    """The step that a run keeps as its best; None where it keeps none."""
    try:
        step, loss = (root / BEST).read_text().split()
        return BestStep(int(step), float(loss))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{root / BEST}: not a step number and a loss") from None


def write_best(root: Path, best: BestStep | None) -> None:
    """Point at a complete step, or at none; the file changes all at once."""
    if best is None:
        (root / BEST).unlink(missing_ok=True)
    else:
        replace_text(root / BEST, f"{best.step} {best.validation_loss!r}\n")


def locate_checkpoint(path: Path, iteration: int | str | None = None) -> tuple[Path, Path]:
    """(hf folder, step folder) of a checkpoint root, or of one of its step folders.

    iteration: the step of a root, or "best"; None: its latest.

    Raises UserError naming what is missing.
    """
    if (path / "metadata.json").exists():
        if iteration is not None:
            raise UserError(f"iteration={iteration}: {path} is one step; give its root to choose one")
        root, step = path.resolve().parent, path
    elif path.is_file():
        raise UserError(f"{path}: a file, not a Megatron checkpoint")
    else:
        root = path
        number = read_latest(root) if iteration is None else _step_number(root, iteration)
        if number is None:
            raise UserError(f"{path}: not a Megatron checkpoint (no {LATEST} and no metadata.json)")
        step = iteration_folder(root, number)
    for needed in (root / HF_FOLDER / "config.json", step / "metadata.json", step / ".metadata"):
        if not needed.is_file():
            raise UserError(f"{path}: not a complete Megatron checkpoint ({needed} is missing)")
    return root / HF_FOLDER, step


def _step_number(root: Path, iteration: int | str) -> int:
    if isinstance(iteration, int):
        return iteration
    if iteration != "best":
        raise UserError(f"iteration: '{iteration}' is not a step; valid: a number, or best")
    best = read_best(root)
    if best is None:
        raise UserError(f"iteration: {root} has no best step (no {BEST}); a run with keep_best=true has one")
    return best.step


class TorchDistReader:
    """Global tensors of one step folder, by name, one at a time.

    Nothing in the folder is executed: the index is unpickled with an allow-list of torch's own metadata types, tensors
    with `weights_only`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: dict[str, mmap.mmap] = {}
        try:
            self.metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            self.entries = dict(self.metadata.state_dict_metadata)
            self.storage = dict(self.metadata.storage_data)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{folder}: not a complete Megatron checkpoint (.metadata is missing)") from None
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{folder / '.metadata'}: damaged ({type(error).__name__}: {error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> global shape of every tensor (optimizer state too, if it was saved)."""
        return {k: tuple(v.size) for k, v in self.entries.items() if isinstance(v, TensorStorageMetadata)}

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor, put together from the pieces that the ranks wrote."""
        entry = self.entries[name]
        if isinstance(entry, BytesStorageMetadata):
            raise KeyError(f"{name} is not a tensor")
        tensor = None
        for _, where, piece in self.pieces(name):
            if piece.shape == entry.size:
                return piece
            if tensor is None:
                tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            tensor[where] = piece
        assert tensor is not None, "pieces that cover a tensor are at least one"
        return tensor

    def pieces(self, name: str) -> Iterator[tuple[Path, tuple[slice, ...], torch.Tensor]]:
        """(file, place in the whole tensor, content) of each piece of a tensor.

        Raises UserError, before the first piece, where they do not make up the whole tensor.
        """
        entry = self.entries[name]
        self._check_complete(name, entry)
        for chunk in entry.chunks:
            info = self._info(MetadataIndex(name, chunk.offsets))
            piece = self._load(info, name)
            file, found = self.folder / info.relative_path, tuple(getattr(piece, "shape", ()))
            if not isinstance(piece, torch.Tensor) or found != tuple(chunk.sizes):
                raise UserError(f"{file}: {name}: a piece of shape {found}, expected {tuple(chunk.sizes)}")
            if piece.dtype != entry.properties.dtype:
                raise UserError(f"{file}: {name}: a piece of {piece.dtype}, expected {entry.properties.dtype}")
            yield file, _place(chunk), piece

    def values(self) -> dict[str, Any]:
        """What was saved beside tensors: step, schedule, settings of the optimizer; empty where there is nothing."""
        for index, info in self.storage.items():
            if index.fqn.split("/")[0] == "common_state":
                (values,) = self._load(info, index.fqn)
                return values
        return {}

    def check_piece(self, index: MetadataIndex) -> None:
        """Raise UserError unless the bytes of one piece, of a tensor or not, are those that were written."""
        self._read(self._info(index), index.fqn)

    def _check_complete(self, name: str, entry: TensorStorageMetadata) -> None:
        """Pieces that lie inside the tensor, overlap nowhere and have its number of elements cover it."""
        places = [_place(chunk) for chunk in entry.chunks]
        count = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
        if any(p.stop > n for place in places for p, n in zip(place, entry.size, strict=True)):
            raise UserError(f"{self.folder}: {name}: a piece lies outside of shape {tuple(entry.size)}")
        for one, other in itertools.combinations(places, 2):
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True)):
                raise UserError(f"{self.folder}: {name}: two pieces overlap")
        if count != entry.size.numel():
            raise UserError(f"{self.folder}: {name}: {count} of {entry.size.numel()} elements are stored")
        stored = sum(self._info(MetadataIndex(name, chunk.offsets)).length for chunk in entry.chunks)
        if stored < count * entry.properties.dtype.itemsize:  # before there is memory for them
            raise UserError(f"{self.folder}: {name}: {stored} bytes are stored for {count} elements")

    def _info(self, index: MetadataIndex) -> Any:
        if index not in self.storage:
            raise UserError(f"{self.folder / '.metadata'}: does not say where a piece of {index.fqn} is")
        return self.storage[index]

    def _read(self, info: Any, name: str) -> _Window:
        """The bytes of one piece, a zip archive, after a look at its checksums: torch itself does not check them."""
        file = self.folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(f"{self.folder}: {info.relative_path!r} is not the name of a file in this folder")
        try:
            if info.relative_path not in self.maps:
                with file.open("rb") as stream:
                    self.maps[info.relative_path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            data = _Window(self.maps[info.relative_path], info.offset, info.length)
            wrong = data.first_damaged()
        except Exception as error:
            raise UserError(f"{file}: {name} cannot be read ({type(error).__name__}: {error})") from None
        if wrong is not None:
            raise UserError(f"{file}: {name} cannot be read (damaged: the checksum of its bytes differs)")
        return data

    def _load(self, info: Any, name: str) -> Any:
        data = self._read(info, name)
        try:
            data.seek(0)
            return torch.load(data, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{self.folder / info.relative_path}: {name} cannot be read ({reason})") from None


class _Window(io.RawIOBase):
    """Part of a mapped file as a file of its own, without a copy of it."""

    def __init__(self, mapped: mmap.mmap, offset: int, length: int) -> None:
        if min(offset, length) < 0 or offset + length > len(mapped):
            raise ValueError(f"{length} bytes from {offset} on, but the file has {len(mapped)}")
        page = offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, offset - page, length + page)
        self.view, self.at = memoryview(mapped)[offset : offset + length], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: len(self.view)}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "before the start")
        self.at = at
        return at

    def first_damaged(self) -> str | None:
        """The first file of this zip archive whose bytes are not those of its CRC-32: `testzip` without its copies.

        Raises various errors for what is no archive of uncompressed files.
        """
        with zipfile.ZipFile(self) as archive:
            for info in archive.infolist():
                archive.open(info).close()  # compares the file's own header with the archive's directory
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{info.filename} is compressed")
                lengths = struct.unpack_from("<HH", self.view, info.header_offset + NAME_LENGTH)
                start = info.header_offset + HEADER_LENGTH + sum(lengths)
                if zlib.crc32(self.view[start : start + info.file_size]) != info.CRC:
                    return info.filename
        return None

    def readinto(self, buffer: Any) -> int:
        data = self.view[self.at : self.at + len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _place(chunk: Any) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))


def check_coverage(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], step: Path) -> None:
    """Raise UserError for the first tensor of a step folder that is missing, mis-shaped or surplus for its model, whose
    matrices may have low-rank updates, and which may have an average beside it."""
    expected = with_adapters(expected, found)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{step}: tensor {name} is missing")
        if found[name] != shape:
            raise UserError(f"{step}: {name} has shape {found[name]}, config.json says {shape}")
    for name in found:
        if name not in expected and not name.startswith(BESIDE_MODEL):
            raise UserError(f"{step}: surplus tensor {name}: this architecture has none of that name")
    check_average(found, expected, step)


class _MetadataUnpickler(pickle.Unpickler):
    """Loads torch.distributed.checkpoint's index and refuses any type that is not a plain part of one."""

    ALLOWED = frozenset(
        [("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )]
        + [
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise UserError(f".metadata: refuses to load {module}.{name}")
