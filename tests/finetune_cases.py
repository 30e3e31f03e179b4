"""What the fine-tuning tests share: three tiny models, a token file, and how to read what a run left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mha2mla_megatron.checkpoint.megatron import LATEST, TorchDistReader, iteration_folder
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.data.dataset import build_dataset
from tests.conftest import ROOT, make_llama, make_tokenizer, run_tool

MODELS = ("original", "partial", "mla")
"""As it was; partial RoPE alone; joint latents. The converted ones have another r and c in every layer."""
ROPE_DIMS = "partial_rope.qk_rope_head_dim=[0,4,16,8]"
EOD, VOCABULARY, LENGTH, BATCH = 2, 256, 32, 4
SETTINGS = (
    f"global_batch_size={BATCH}", "micro_batch_size=2", f"data.sequence_length={LENGTH}", "optimizer.lr=1e-3",
    "optimizer.weight_decay=0.1",
)  # fmt: skip


def write_tokens(prefix: Path, vocabulary: int = VOCABULARY, documents: int = 60) -> Path:
    """A .bin/.idx pair of random documents, each with one EOD token at its end and none inside."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(documents):
        length = int(torch.randint(5, 30, (1,), generator=generator))
        tokens = torch.randint(EOD + 1, vocabulary, (length,), generator=generator)
        builder.add_document(torch.cat((tokens, torch.tensor([EOD]))), [length + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def make_workspace(root: Path) -> Path:
    """root/<model> in Hugging Face form, root/<model>-megatron, root/text.bin and .idx, root/settings.yaml."""
    original = make_llama(root / "original", num_hidden_layers=4)
    make_tokenizer(original)
    run_tool("convert_mha_to_mla", original, root / "partial", ROPE_DIMS)
    words = ["low_rank.method=joint", "low_rank.kv_lora_rank=[24,16,20,8]"]
    run_tool("convert_mha_to_mla", original, root / "mla", ROPE_DIMS, *words)
    for model in MODELS:
        run_tool("convert_hf_to_megatron", root / model, root / f"{model}-megatron")
    write_tokens(root / "text")
    (root / "settings.yaml").write_text("")
    return root


def run_words(workspace: Path, model: str, save: Path, *words: str) -> list[str]:
    """The words of tools/finetune.py; later ones win."""
    return [
        str(workspace / "settings.yaml"), f"load={workspace / model}-megatron", f"save={save}",
        f"data.train={workspace / 'text'}", *SETTINGS, *words,
    ]  # fmt: skip


def finetune(workspace: Path, model: str, save: Path, *words: str, own_process: bool = False) -> Path:
    run_tool("finetune", *run_words(workspace, model, save, *words), own_process=own_process)
    return save


def read_log(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]


def log_text(save: Path) -> list[tuple[str, str, str, str]]:
    """(step, loss, gradient norm, learning rate) of each line, as written, to the last digit."""
    lines = (save / "log.jsonl").read_text().splitlines()
    values = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    return [(v["step"], v["loss"], v["grad_norm"], v["lr"]) for v in values]


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in read_log(save)]


def checkpoint_tensors(save: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a saved step: weights, master weights, both moments."""
    reader = TorchDistReader(iteration_folder(save, step))
    return {name: reader[name] for name in reader.shapes()}


def checkpoint_values(save: Path, step: int) -> dict[str, Any]:
    """What a saved step holds beside tensors: schedule, step counts."""
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    return load_common_state_dict(str(iteration_folder(save, step)))


def put_back(root: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was after this step."""
    shutil.copytree(root, target)
    for later in [found for found in saved_steps(target) if found > step]:
        shutil.rmtree(iteration_folder(target, later))
    (target / LATEST).write_text(f"{step}\n")
    return target


class Trap:
    """Its pickle makes a file, or whatever else a shell can do, in the process that loads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def terminate_at_step_3(command: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Run a training of its own, send SIGTERM to all its processes after step 3; the ended process and its stderr."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    return process, errors


def exported(root: Path, target: Path, *words: str) -> dict[str, torch.Tensor]:
    """The tensors of a run's latest step as a Hugging Face folder has them."""
    run_tool("convert_megatron_to_hf", root, target, *words)
    return load_file(target / "model.safetensors")


def steps_of(root: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(root) if "loss" in line]


def samples(prefix: Path, cache: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of a run's first samples, int64 [count, LENGTH] each."""
    dataset: Any = build_dataset(str(prefix), LENGTH, count, 1234, False, EOD, VOCABULARY, cache)
    rows = [dataset[index] for index in range(count)]
    return tuple(torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("tokens", "labels"))  # type: ignore[return-value]


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits.double()
