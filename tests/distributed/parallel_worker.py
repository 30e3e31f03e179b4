"""One forward and backward pass of a saved model at several parallel layouts, put together to whole tensors.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed.parallel_worker FOLDER

runs every case FOLDER/*/ (config.json, the torch_dist folder `weights`) in one world and leaves CASE/LAYOUT.pt there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mha2mla_megatron.architecture import Architecture, read_architecture
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel, shut_down_parallel
from mha2mla_megatron.model.provider import build_model, sharded_weights, transformer_config

LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
}
BATCHES, BATCH_SIZE, LENGTH = 2, 2, 12


def load_weights(model: Any, folder: Path) -> None:
    """The weights that `dist_checkpointing` saved from this model at any layout."""
    state = dist_checkpointing.load(sharded_weights(model), str(folder))
    model.load_state_dict(state)


def logits_and_gradients(model: Any, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Logits [batches * B, S, V] and the gradient of every parameter, all whole, on rank 0; name -> tensor.

    Gradients are taken as training takes them: pipeline schedule, vocabulary-parallel loss, Megatron's DDP and its
    `finalize_model_grads`.
    """
    ids = torch.randint(
        architecture.vocab_size, (BATCHES, BATCH_SIZE, LENGTH + 1), generator=torch.Generator().manual_seed(5)
    )
    positions = torch.arange(LENGTH).expand(BATCH_SIZE, LENGTH)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()

    def run(with_labels: bool, **settings: Any) -> Any:
        def step(batches: Any, stage: Any) -> Any:
            batch = next(batches)
            labels = batch[:, 1:] if with_labels else None
            output = stage(batch[:, :-1], positions, None, labels=labels)
            return output, lambda output, non_loss_data=False: output if non_loss_data else (output.mean(), {})

        return get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter(ids), model=[wrapped], num_microbatches=BATCHES,
            seq_length=LENGTH, micro_batch_size=BATCH_SIZE, **settings,
        )  # fmt: skip

    logits = run(with_labels=False, forward_only=True, collect_non_loss_data=True)
    run(with_labels=True, forward_only=False)

    mine: dict[str, tuple[torch.Tensor, int | None, int]] = {}
    if logits:
        mine["logits"] = (torch.cat(logits).detach(), 2, 1)
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(int(words[2]) + offset)
        split = getattr(parameter, "tensor_model_parallel", False)
        dim, stride = (parameter.partition_dim, parameter.partition_stride) if split else (None, 1)
        name = ".".join(words)
        if name == "output_layer.weight" and architecture.tie_word_embeddings:
            name = "embedding.word_embeddings.weight"  # the last stage's copy
        mine[name] = (parameter.main_grad, dim, stride)
    return _put_together(mine)


def _put_together(mine: dict[str, tuple[torch.Tensor, int | None, int]]) -> dict[str, torch.Tensor]:
    """Every process's (tensor, split dim, stride) as whole tensors; copies must be equal on all processes."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    whole: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for one in everyone for name in one):
        parts = [one[name] for one in everyone if name in one]
        tensors, dim, stride = [tensor for tensor, _, _ in parts], parts[0][1], parts[0][2]
        if dim is None or tensor_parallel == 1:
            whole[name] = tensors[0]
            for other in tensors[1:]:
                assert torch.equal(other, tensors[0]), f"copies of {name} differ"
        else:
            # A stride of 2: each process holds its rows of the gate, then its rows of the up-projection.
            pieces = [tensor.chunk(stride, dim) for tensor in tensors]
            whole[name] = torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)
    return whole


def main(folder: Path) -> None:
    for name, parallel in LAYOUTS.items():
        initialize_parallel(parallel)
        for case in sorted(path for path in folder.iterdir() if path.is_dir()):
            architecture = read_architecture(case)
            model = build_model(architecture, transformer_config(architecture, parallel, torch.float32))
            load_weights(model, case / "weights")
            result = logits_and_gradients(model, architecture)
            if torch.distributed.get_rank() == 0:
                torch.save(result, case / f"{name}.pt")
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
