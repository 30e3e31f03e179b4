"""A model of either format, Hugging Face folder or Megatron checkpoint, read under its Hugging Face names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.checkpoint.adapters import with_adapters
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.checkpoint.hf import HFReader
from mha2mla_megatron.checkpoint.manifest import check_manifest
from mha2mla_megatron.checkpoint.mapping import megatron_shapes, parameter_map
from mha2mla_megatron.checkpoint.megatron import BESIDE_MODEL, LATEST, locate_checkpoint
from mha2mla_megatron.checkpoint.merged import MergedReader


class ModelTensors(ABC):
    """Any tensors that a folder holds, without a comparison with what it should hold.

    Raises UserError for a config that cannot be read; `open` for files that cannot.
    """

    kind: str
    """For people: the format."""

    hf: Path
    """The folder of config.json and the tokenizer."""

    def __init__(self, hf: Path) -> None:
        self.hf = hf
        self.architecture = read_architecture(hf)
        self.names = list(self.architecture.tensor_shapes())
        """In Hugging Face terms, those that the model needs."""

    @abstractmethod
    def open(self) -> None:
        """Look at the files; everything below works after this."""

    @abstractmethod
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the format's own names, of what the model needs."""

    @abstractmethod
    def found(self) -> dict[str, tuple[int, ...]]:
        """The same of what is there, without what no model needs."""

    @abstractmethod
    def stored_name(self, name: str) -> str:
        """The format's own name of the tensor that holds a Hugging Face one."""

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor:
        """By Hugging Face name. Raises UserError for damaged bytes."""


class HFTensors(ModelTensors):
    kind = "Hugging Face"

    def open(self) -> None:
        self.reader = HFReader(self.hf, self.architecture, check=False)

    def expected(self) -> dict[str, tuple[int, ...]]:
        return self.architecture.tensor_shapes()

    def found(self) -> dict[str, tuple[int, ...]]:
        expected = set(self.names)
        return {
            name: shape
            for name, shape in self.reader.shapes().items()
            if name in expected or not self.architecture.droppable(name)
        }

    def stored_name(self, name: str) -> str:
        return name

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.reader[name]


class MegatronTensors(ModelTensors):
    """The latest step of a checkpoint root, or a step folder; low-rank updates are merged."""

    def __init__(self, path: Path) -> None:
        hf, self.step = locate_checkpoint(path)
        super().__init__(hf)
        self.kind = f"Megatron, {self.step.name}"
        self.rows = {name: row for row in parameter_map(self.architecture) for name in row.hf}
        self._read = lru_cache(maxsize=4)(lambda name: self.reader[name])  # q, k and v come from one tensor

    def open(self) -> None:
        check_manifest(self.step)
        self.reader = MergedReader(self.step)

    def expected(self) -> dict[str, tuple[int, ...]]:
        return with_adapters(megatron_shapes(self.architecture), self.found())

    def found(self) -> dict[str, tuple[int, ...]]:
        return {k: v for k, v in self.reader.shapes().items() if not k.startswith(BESIDE_MODEL)}

    def stored_name(self, name: str) -> str:
        return self.rows[name].megatron

    def __getitem__(self, name: str) -> torch.Tensor:
        row = self.rows[name]
        return row.layout.unpack(self._read(row.megatron), self.architecture)[row.hf.index(name)]


def model_tensors(name: str) -> ModelTensors:
    """The model of a Megatron checkpoint root or step folder, a Hugging Face folder, or a hub id.

    Raises UserError where it is none of these, or its config is not one of a model that we know.
    """
    path = Path(name)
    if (path / LATEST).exists() or (path / "metadata.json").exists():
        return MegatronTensors(path)
    return HFTensors(resolve_model(name))
