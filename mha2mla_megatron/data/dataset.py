"""Training samples from .bin/.idx token files, through Megatron's own datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from mha2mla_megatron.errors import UserError


class _TokenIds:
    """What GPTDataset asks of a tokenizer."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod, self.vocab_size = eod, vocab_size
        self.pad = -1  # no token stands for padding, so none is masked by accident
        self.unique_identifiers = {"class": "TokenIds", "eod": eod}


def build_dataset(
    train: str | dict[str, float],
    sequence_length: int,
    num_samples: int,
    seed: int,
    eod_mask_loss: bool,
    eod: int,
    vocab_size: int,
    cache: Path,
) -> torch.utils.data.Dataset:
    """`num_samples` shuffled samples of packed documents, over as many epochs as it takes.

    A sample is a dict of int64 tokens, labels and position_ids [sequence_length] and a float32 loss_mask.

    Raises UserError for a missing file or tokens of a larger vocabulary.
    """
    weights = {train: 1.0} if isinstance(train, str) else train
    for prefix in weights:
        _check_files(Path(prefix), vocab_size)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=(list(weights), list(weights.values())),
        split="1,0,0",
        tokenizer=_TokenIds(eod, vocab_size),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
        path_to_cache=str(cache),
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]
    assert dataset is not None  # it was asked for on every rank
    return dataset


def sample_batches(
    dataset: torch.utils.data.Dataset,
    first_sample: int,
    total_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    workers: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro batches in order, from `first_sample` on: tensors [micro_batch_size, s].

    The samples of one step do not depend on how many ranks share it.
    """
    stride = micro_batch_size * data_size
    starts = range(first_sample + data_rank * micro_batch_size, total_samples, stride)
    batches = [list(range(start, start + micro_batch_size)) for start in starts]
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available()
    )
    return iter(loader)


def _check_files(prefix: Path, vocab_size: int) -> None:
    for suffix in (".bin", ".idx"):
        file = prefix.with_name(prefix.name + suffix)
        if not file.is_file():
            raise UserError(f"data.train: {file}: no such file; make it with tools/preprocess_data.py")
    provenance = prefix.with_name(prefix.name + ".json")
    if provenance.is_file():
        tokens_of = json.loads(provenance.read_text()).get("vocab_size", 0)
        if tokens_of > vocab_size:
            raise UserError(f"data.train: {prefix}: made with a vocabulary of {tokens_of}, the model has {vocab_size}")
