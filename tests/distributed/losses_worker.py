"""One of four processes that share a vocabulary; it imports little, since four of them do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed

from mha2mla_megatron.training.top_k_divergence import TopK, top_k
from mha2mla_megatron.training.vocab_parallel_losses import vocab_parallel_losses

TEMPERATURE = 2.0


def split_losses(rank: int, folder: Path) -> None:
    """The losses of inputs.pt and their gradient, with the teacher, without, and with some of its tokens, into
    SIZE.RANK.pt; into SIZE.RANK.top.pt those tokens as `top_k` finds them.

    The vocabulary is over 1, 2 and 4 processes.
    """
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 4)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    student, teacher, known, labels, upstream = torch.load(folder / "inputs.pt")
    for size in (1, 2, 4):
        group, _ = torch.distributed.new_subgroups(size)
        found = []
        part = teacher.chunk(size, -1)[rank % size]
        for other in (part, None, *(TopK(*tokens) for tokens in known)):
            mine = student.chunk(size, -1)[rank % size].clone().requires_grad_()
            losses = torch.stack(vocab_parallel_losses(mine, other, labels, TEMPERATURE, group))
            (losses * upstream).sum().backward()
            found.append((losses.detach(), mine.grad))
        torch.save(found, folder / f"{size}.{rank}.pt")
        most = [top_k(part.flatten(0, 1), ids.shape[-1], TEMPERATURE, group) for ids, _ in known]
        torch.save([(found.ids, found.log_probs) for found in most], folder / f"{size}.{rank}.top.pt")
    torch.distributed.destroy_process_group()
