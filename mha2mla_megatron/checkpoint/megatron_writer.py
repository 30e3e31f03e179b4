"""A new Megatron checkpoint from the tensors of a Hugging Face model: nothing but names and layouts."""

from __future__ import annotations

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.manifest import seal_step
from mha2mla_megatron.checkpoint.mapping import parameter_map
from mha2mla_megatron.checkpoint.megatron import HF_FOLDER, iteration_folder, write_latest
from mha2mla_megatron.checkpoint.resume import PartialFolder
from mha2mla_megatron.checkpoint.torch_dist_writer import TorchDistWriter
from mha2mla_megatron.model.parallel import ParallelConfig


class MegatronWriter:
    """Writes a model as step 0 of a checkpoint root, as `HFWriter` does into a Hugging Face folder.

    tensors: every tensor of the model on the meta device, by its Hugging Face name. Those that one Megatron tensor is
    made of have to be added in one part of the work: it is written with the last of them.
    hf: the folder of config.json and the tokenizer.
    """

    def __init__(self, partial: PartialFolder, tensors: dict[str, torch.Tensor], architecture: Architecture) -> None:
        self.partial, self.tensors, self.architecture = partial, tensors, architecture
        self.hf = partial.path / HF_FOLDER
        self.step = iteration_folder(partial.path, 0)
        rows = parameter_map(architecture)
        self.rows = {name: row for row in rows for name in row.hf}
        self.waiting: dict[str, torch.Tensor] = {}
        packed = {row.megatron: row.layout.pack([tensors[name] for name in row.hf], architecture) for row in rows}
        self.writer = TorchDistWriter(partial, self.step, packed)
        self.hf.mkdir(exist_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which must not change after that."""
        row = self.rows[name]
        self.waiting[name] = tensor
        if all(part in self.waiting for part in row.hf):
            parts = [self.waiting.pop(part) for part in row.hf]
            self.writer.add(row.megatron, row.layout.pack(parts, self.architecture))

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is written."""
        row = self.rows[name]
        return row.layout.unpack(self.writer.read(row.megatron), self.architecture)[row.hf.index(name)]

    def close(self) -> None:
        """Complete the step, and make it the checkpoint's latest."""
        self.writer.close()
        seal_step(self.step, 0, ParallelConfig().sizes(1))
        write_latest(self.partial.path, 0)
