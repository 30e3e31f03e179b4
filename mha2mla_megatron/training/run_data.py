"""The datasets of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mha2mla_megatron.architecture import read_config
from mha2mla_megatron.data.dataset import build_dataset, end_of_first_document
from mha2mla_megatron.data.sample_indices import own_indices
from mha2mla_megatron.data.teacher_cache import TeacherCache
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.training.config import FinetuneSettings


def end_of_document(settings: FinetuneSettings, side: Path) -> int:
    """The id of the token that ends a document, -1 where the model has none. Of several, which a chat model has, the
    one that the text has."""
    found = read_config(side).get("eos_token_id")
    known = [token for token in (found if isinstance(found, list) else [found]) if type(token) is int]
    there = end_of_first_document(settings.data.train) if len(known) > 1 else None
    eod = there if there in known else next(iter(known), None)
    for key in ("eod_mask_loss", "reset_attention_mask"):
        if getattr(settings.data, key) and eod is None:
            raise UserError(
                f"data.{key}: {side / 'config.json'}: eos_token_id {found!r} is no token that ends documents"
            )
    return -1 if eod is None else eod


@dataclass(frozen=True)
class RunData:
    """The run's datasets."""

    settings: FinetuneSettings
    eod: int
    vocab_size: int
    root: Path

    def samples(
        self,
        blend: str | dict[str, float],
        count: int,
        shares: tuple[float, ...],
        part: int,
        predictions: TeacherCache | None = None,
    ) -> torch.utils.data.Dataset:
        data = self.settings.data
        cache = Path(data.cache) if data.cache else self.root / "cache"
        with own_indices(cache):
            return build_dataset(
                blend,
                data.sequence_length,
                count,
                self.settings.seed,
                data.eod_mask_loss,
                self.eod,
                self.vocab_size,
                cache,
                shares,
                part,
                data.reset_attention_mask,
                predictions,
            )

    def held_out(self) -> dict[str, torch.utils.data.Dataset]:
        """The samples for validation and for the test after the last step, where there are any."""
        wanted, shares = self.settings.validation, self.settings.data.shares
        found = {}
        if wanted.data is not None:
            found["validation"] = self.samples(wanted.data, wanted.samples, (1.0, 0.0, 0.0), 0)
        elif shares[1] > 0:
            found["validation"] = self.samples(self.settings.data.train, wanted.samples, shares, 1)
        if shares[2] > 0:
            found["test"] = self.samples(self.settings.data.train, wanted.samples, shares, 2)
        return found
