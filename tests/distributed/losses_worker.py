"""One of four processes that share a vocabulary; it imports little, since four of them do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed

from mha2mla_megatron.training.vocab_parallel_losses import vocab_parallel_losses

TEMPERATURE = 2.0


def split_losses(rank: int, folder: Path) -> None:
    """Both losses of inputs.pt and their gradient, the vocabulary over 1, 2 and 4 processes, into SIZE.RANK.pt."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 4)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    student, teacher, labels, upstream = torch.load(folder / "inputs.pt")
    for size in (1, 2, 4):
        group, _ = torch.distributed.new_subgroups(size)
        mine = student.chunk(size, -1)[rank % size].clone().requires_grad_()
        found = torch.stack(
            vocab_parallel_losses(mine, teacher.chunk(size, -1)[rank % size], labels, TEMPERATURE, group)
        )
        (found * upstream).sum().backward()
        torch.save((found.detach(), mine.grad), folder / f"{size}.{rank}.pt")
    torch.distributed.destroy_process_group()
