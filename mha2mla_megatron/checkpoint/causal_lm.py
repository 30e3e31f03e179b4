"""A model folder as a running transformers model, or one line that says why not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mha2mla_megatron.errors import UnusableModel, UserError, first_line


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise UserError(f"device: unknown value '{device}'; valid: auto, cpu, cuda, cuda:N")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: there are {torch.cuda.device_count()} GPUs here")
    return picked


def rank_device(device: str) -> torch.device:
    """As `pick_device`; under torchrun, `auto` and `cuda` are the rank's own GPU, which there must be for each."""
    picked = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and picked.type == "cuda" and picked.index is None:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"device={device}: {here} processes on this machine, which has {gpus} GPUs; one each")
        picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(picked)
    return picked


def load_causal_lm(name: str, folder: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    """The model in evaluation mode, its weights of `dtype` ("auto": as they are stored) on `device`.

    A converted model runs the code in its folder; weights are read from safetensors alone, as they are everywhere here,
    never from a pickle. Raises UnusableModel if that fails, or its weights are not all in the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        tensors = sorted(map(str, report.get(problem, ())))
        if tensors:  # transformers fills them with random numbers
            found = f"{problem.replace('_', ' ')} in its weights: {tensors[0]} ({len(tensors)} in all)"
            raise UnusableModel(f"{name}: {found}")
    return model.to(device).eval()


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What transformers says of a bad folder, in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UnusableModel(f"{name}: cannot be loaded ({first_line(error)})") from None
