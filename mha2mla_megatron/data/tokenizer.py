"""A model's tokenizer: loaded with its errors made readable, and in the form that worker processes use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mha2mla_megatron.data.documents import Block
from mha2mla_megatron.errors import UnusableModel, UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UnusableModel if it has none that transformers can load."""
    from transformers import AutoTokenizer  # seconds of import, which the worker processes do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = first_line(error)
        raise UnusableModel(f"{folder}: its tokenizer cannot be loaded ({reason})") from None
    if len(tokenizer) == 0:
        raise UnusableModel(f"{folder}: holds no tokenizer")
    return tokenizer


class EncodedBatch(NamedTuple):
    """The tokens of a few documents, one after the other."""

    tokens: np.ndarray
    """[sum of lengths], of the dtype that is written."""

    lengths: list[int]
    """Tokens of each document that has any."""

    blank: int
    """Documents left out: empty, all white space, or nothing that the tokenizer keeps."""


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns documents into tokens: all that a worker needs, in a form that can be sent to it.

    tokenizer: the tokenizers library's JSON. prefix, suffix: ids put around each document. vocab_size: ids from this
    on are refused. dtype: numpy's name of the written type.

    Between prefix and suffix stand the ids of `tokenizer(text, add_special_tokens=False)`.
    """

    tokenizer: str
    split_special_tokens: bool
    text_key: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    vocab_size: int
    dtype: str

    def load(self) -> Tokenizer:
        """The tokenizer, set up for `encode`."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.split_special_tokens
        return tokenizer

    def encode(self, tokenizer: Tokenizer, blocks: Sequence[Block]) -> EncodedBatch:
        """Raises UserError for a document without valid text and for an id outside the vocabulary."""
        found = [document for block in blocks for document in block.documents(self.text_key)]
        documents = [document for document in found if document.text and not document.text.isspace()]
        # "fast" leaves out the offsets, which nobody asks for here; the ids are the same.
        encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
        ids: list[int] = []
        lengths: list[int] = []
        for document, encoding in zip(documents, encodings, strict=True):
            document_ids = encoding.ids
            if not document_ids:
                continue
            largest = max(document_ids)
            if largest >= self.vocab_size:
                raise UserError(
                    f"{document.where}: the tokenizer gives id {largest} "
                    f"({tokenizer.id_to_token(largest)!r}), beyond the vocabulary of {self.vocab_size}"
                )
            start = len(ids)
            ids += self.prefix
            ids += document_ids
            ids += self.suffix
            lengths.append(len(ids) - start)
        return EncodedBatch(np.array(ids, dtype=self.dtype), lengths, len(found) - len(lengths))
