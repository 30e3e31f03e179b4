"""Writing whole tensors as a Megatron `torch_dist` checkpoint, one at a time and at the disk's speed.

Megatron's own writer wants the whole model in memory at once. What it puts into the folder is simple, though, and made
here in the same way: `__0_0.distcp`, one archive of `torch.save` after the other; `.metadata`, torch's pickled index of
what is where; and `metadata.json`, which says that it is `torch_dist`. Nothing in it depends on time or place.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mha2mla_megatron.checkpoint.resume import PartialFolder

DATA = "__0_0.distcp"
VALUES = "common_state/shard_0_1"
"""Megatron's name for what is saved beside the tensors, here nothing."""


class TorchDistWriter:
    """Writes the tensors of one step into a folder under `partial`.

    tensors: every tensor of the step on the meta device, in the order in which they are in the file.
    """

    def __init__(self, partial: PartialFolder, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.partial, self.folder, self.tensors = partial, folder, tensors
        self.file = str((folder / DATA).relative_to(partial.path))
        self.lengths = {VALUES: archive_length([{}])} | {
            name: archive_length(torch.empty_like(tensor, device="cpu")) for name, tensor in tensors.items()
        }
        self.offsets = dict(zip(self.lengths, accumulate(self.lengths.values(), initial=0), strict=False))
        folder.mkdir(exist_ok=True)
        if VALUES not in partial.done and partial.ranks.rank == 0:
            self._save(VALUES, [{}])
            partial.finish(VALUES)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which must not change after that."""
        planned = self.tensors[name]
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), f"{name} is not as it was planned"
        self._save(name, tensor.contiguous())

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is written."""
        return torch.load(io.BytesIO(self.partial.read(name)), weights_only=True)

    def close(self) -> None:
        """Write the index, after which the step is complete."""
        self.partial.wait()
        missing = self.tensors.keys() - self.partial.pieces.keys()
        assert not missing, f"not written: {missing}"
        longer = [name for name, length in self.lengths.items() if self.partial.pieces[name].length != length]
        assert not longer, f"not of the length that was planned: {longer}"
        entries: dict[str, Any] = {name: _entry(tensor) for name, tensor in self.tensors.items()}
        storage = {}
        for name in (VALUES, *self.tensors):
            piece = self.partial.pieces[name]
            start = None if name == VALUES else [0] * self.tensors[name].dim()
            storage[MetadataIndex(name, start)] = _StorageInfo(DATA, piece.offset, piece.length)
        index = Metadata({**entries, VALUES: BytesStorageMetadata()}, storage_data=storage, storage_meta=StorageMeta())
        index.version = "1.0.0"
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(config))

    def _save(self, name: str, value: Any) -> None:
        self.partial.write(name, self.file, self.offsets[name], lambda stream: torch.save(value, stream))


def archive_length(value: Any) -> int:
    """Bytes that `torch.save` makes of a value. Tensors are not read, so that empty ones cost no memory."""
    counted = _Counted()
    with torch.serialization.skip_data():
        torch.save(value, counted)  # pyright: ignore[reportArgumentType]
    return counted.length


class _Counted:
    """A stream that keeps nothing but the length of what is written to it or, for a tensor's data, passed over."""

    def __init__(self) -> None:
        self.length = 0

    def write(self, data: memoryview | bytes) -> int:
        size = memoryview(data).nbytes
        self.length += size
        return size

    def seek(self, offset: int, whence: int) -> None:
        assert whence == os.SEEK_CUR
        self.length += offset

    def flush(self) -> None:
        pass


def _entry(tensor: torch.Tensor) -> TensorStorageMetadata:
    """One chunk, the whole tensor."""
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk])
