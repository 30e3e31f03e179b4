"""One process of a world of multi_gpu.py, which starts it: `multi_gpu_worker.py FOLDER`, with torchrun's variables."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parent))
import multi_gpu_agreement as agreement
import multi_gpu_speed as speed
import numpy
from job_worlds import serve_jobs
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from shapes import SHAPES
from train_step import make_folder

from mha2mla_megatron.checkpoint.convert_hf_megatron import ToMegatronSettings, hf_to_megatron
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel, shut_down_parallel


def join() -> str:
    """Meet the other processes; what they run on."""
    device = initialize_parallel(ParallelConfig(timeout_minutes=5))
    torch.distributed.all_reduce(torch.zeros(1, device=device))
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def make_run(folder: str) -> None:
    """What tools/finetune.py needs for a tiny converted model: folder/megatron, folder/text.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    model = make_folder(Path(folder), SHAPES["tiny"], "mla-68.75", torch.float32)
    hf_to_megatron(model, Path(folder) / "megatron", ToMegatronSettings())
    builder = IndexedDatasetBuilder(f"{folder}/text.bin", dtype=numpy.uint16)
    for _ in range(200):
        builder.add_document(torch.randint(3, 49152, (500,)), [500])
    builder.finalize(f"{folder}/text.idx")


def make_original(folder: str, shape: str, layers: int) -> None:
    """A Hugging Face folder of random weights and a tokenizer of single bytes, folder/original; folder/text.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = make_folder(Path(folder), replace(SHAPES[shape], layers=layers), "original", torch.bfloat16)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    text = "".join(chr(97 + int(n)) for n in torch.randint(26, (64 * 1024,), generator=generator))
    (Path(folder) / "text.txt").write_text(text)


JOBS: dict[str, Any] = {
    "join": join,
    "make_run": make_run,
    "make_original": make_original,
    "gradients": agreement.gradients,
    "save_training": agreement.save_training,
    "load_training": agreement.load_training,
    "train": speed.train,
    "save_stall": speed.save_stall,
}


def free_memory() -> None:
    """Give back what the last job's model took, since other processes need room too.

    Its wrappers refer to each other; and Megatron's rotary embedding keeps each of its modules with the angles that it
    remembers, whose hooks hold the model where `overlap_param_gather` is on.
    """
    forward: Any = RotaryEmbedding.forward
    forward.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    serve_jobs(Path(sys.argv[1]), JOBS, free_memory)
    shut_down_parallel()
