"""Text, JSON lines, parquet or a data set -> Megatron's .bin/.idx, tokenised by several processes; nanosets too.

The bytes written depend on the documents, the tokenizer and the settings, not on the number of workers.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mha2mla_megatron.architecture import read_config
from mha2mla_megatron.checkpoint.folders import resolve_folder
from mha2mla_megatron.data.documents import SEPARATORS
from mha2mla_megatron.data.inputs import Inputs
from mha2mla_megatron.data.nanosets import NanosetReader, is_nanoset
from mha2mla_megatron.data.tokenizer import DocumentEncoder, EncodedBatch, load_tokenizer
from mha2mla_megatron.data.workers import encode_in_order
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.files import file_sha256, new_files, write_json
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import require_keys


@dataclass(frozen=True)
class PreprocessSettings:
    """Settings of tools/preprocess_data.py."""

    tokenizer: str | None = None
    """The model whose tokenizer is used: a folder or a hub id."""

    document_separator: str = "none"
    """What ends a document of a plain text file: none (a file is one document), newline (a line is), blank_line."""

    text_key: str = "text"
    """The field or column that holds the text, in all but plain text."""

    subset: str | None = None
    """Of a data set of the `datasets` library: which of its configurations."""

    split: str = "train"
    """Of a data set: which of its splits, in that library's notation (train, train[:10%] without streaming)."""

    streaming: bool = True
    """Read a data set as it comes, without downloading all of it first."""

    max_tokens: int | None = None
    """Stop after the document that brings the tokens to this many. null: all documents."""

    max_document_mb: int = 16
    """Refuse a longer document: tokenising takes ~120 bytes of memory for each of its bytes."""

    append_eod: bool = True
    """Put the tokenizer's eos token after each document."""

    prepend_bos: bool = False
    """Put the tokenizer's bos token before each document. No other special token is ever added."""

    workers: int | None = None
    """Tokenising processes. null: as many as there are CPU cores."""

    overwrite: bool = False
    """Replace OUT.bin, OUT.idx and OUT.json if they exist."""

    def __post_init__(self) -> None:
        require_one_of("document_separator", self.document_separator, SEPARATORS)
        require_at_least("max_document_mb", self.max_document_mb, 1)
        if self.max_tokens is not None:
            require_at_least("max_tokens", self.max_tokens, 1)
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers: {self.workers} is too few; at least 1")


def preprocess(inputs: Sequence[str | Path], output: Path, settings: PreprocessSettings) -> dict[str, Any]:
    """Tokenise the documents of `inputs`, in order, into OUT.bin and OUT.idx, with their origin in OUT.json.

    inputs: files, or folders and hub ids of data sets. Returns what OUT.json holds. Blank documents are left out and
    counted. Raises UserError for bad input; nothing is left behind then.
    """
    require_keys(settings, "tokenizer")
    assert settings.tokenizer is not None
    reader = _reader([str(name) for name in inputs], settings)
    if output.is_file():
        raise UserError(f"{output}: a file; the last word is the prefix of the output files")
    targets = [Path(f"{output}{suffix}") for suffix in (".bin", ".idx", ".json")]
    with new_files(targets, settings.overwrite) as (bin_file, idx_file, json_file):
        folder = resolve_folder(settings.tokenizer)
        encoder = _document_encoder(folder, settings)
        if isinstance(reader, NanosetReader):
            results: Any = reader.batches(encoder)
        else:
            results = encode_in_order(reader, encoder, settings.workers or _cpu_count())
        documents, tokens, blank = _write(reader, results, encoder.dtype, settings.max_tokens, bin_file, idx_file)
        tokenizer_json = folder / "tokenizer.json"
        report = {
            "tokenizer": settings.tokenizer,
            "tokenizer_json_sha256": file_sha256(tokenizer_json) if tokenizer_json.is_file() else None,
            "vocab_size": encoder.vocab_size,
            "dtype": encoder.dtype,
            "documents": documents,
            "blank_documents_left_out": blank,
            "tokens": tokens,
            "eod_id": encoder.suffix[0] if encoder.suffix else None,
            "bos_id": encoder.prefix[0] if encoder.prefix else None,
            "inputs": reader.described,
            "max_tokens": settings.max_tokens,
            "document_separator": settings.document_separator,
            "text_key": settings.text_key,
            "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        }
        write_json(json_file, report)
    return report


def _reader(names: list[str], settings: PreprocessSettings) -> Inputs | NanosetReader:
    tokenised = [name for name in names if is_nanoset(name)]
    if tokenised and len(tokenised) < len(names):
        raise UserError(
            f"{tokenised[0]}: holds tokens, other inputs text; make token files of each and blend these (data.train)"
        )
    if tokenised and settings.prepend_bos:
        raise UserError(f"prepend_bos: not possible with {tokenised[0]}, whose tokens are taken as they are")
    if tokenised:
        return NanosetReader(names)
    return Inputs(
        names,
        separator=settings.document_separator,
        max_document=settings.max_document_mb * 1_000_000,
        column=settings.text_key,
        subset=settings.subset,
        split=settings.split,
        streaming=settings.streaming,
    )


def _document_encoder(folder: Path, settings: PreprocessSettings) -> DocumentEncoder:
    """The encoder; the tokenizer's vocabulary size (largest id + 1) decides the dtype, whatever the model's is."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer is not one of the tokenizers library's (tokenizer.json)")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    limit = vocab_size
    if (folder / "config.json").is_file():
        # A tokenizer can know more ids than its model has embeddings; training would crash on them.
        rows = read_config(folder).get("vocab_size")
        limit = min(limit, rows) if isinstance(rows, int) else limit

    def special(name: str, wanted: bool) -> tuple[int, ...]:
        if not wanted:
            return ()
        token = getattr(tokenizer, f"{name}_token_id")
        key = "append_eod" if name == "eos" else "prepend_bos"
        if token is None:
            raise UserError(f"{folder}: its tokenizer has no {name}_token; set {key}=false or use another tokenizer")
        if token >= limit:
            raise UserError(f"{folder}: {name}_token_id {token} is beyond the vocabulary of {limit}")
        return (token,)

    backend: Any = tokenizer.backend_tokenizer
    return DocumentEncoder(
        tokenizer=backend.to_str(),
        split_special_tokens=bool(tokenizer.split_special_tokens),
        text_key=settings.text_key,
        prefix=special("bos", settings.prepend_bos),
        suffix=special("eos", settings.append_eod),
        vocab_size=limit,
        dtype=_indexed_dataset().DType.optimal_dtype(vocab_size).__name__,
    )


def _write(
    reader: Inputs | NanosetReader,
    results: Generator[tuple[EncodedBatch, int]],
    dtype: str,
    max_tokens: int | None,
    bin_file: Path,
    idx_file: Path,
) -> tuple[int, int, int]:
    """Write the two files. Returns the numbers of documents, of tokens and of blank documents."""
    limit = math.inf if max_tokens is None else max_tokens
    builder = _indexed_dataset().IndexedDatasetBuilder(str(bin_file), dtype=np.dtype(dtype).type)
    documents = tokens = blank = 0
    started = time.monotonic()
    progress = Progress("tokenise", reader.size, "MB", 1e6)
    with closing(results):
        for encoded, bytes_read in results:
            start = 0
            for length in encoded.lengths:
                if tokens >= limit:
                    break
                builder.add_document(encoded.tokens[start : start + length], [length])
                start += length
                documents += 1
                tokens += length
            blank += encoded.blank
            rate = tokens / max(time.monotonic() - started, 1e-9)
            progress.what = f"tokenise: {tokens / 1e6:.4g} M tokens, {rate / 1e6:.3g} M tokens/s"
            progress.advance(bytes_read)
            if tokens >= limit:
                break
    if documents == 0:
        raise UserError(f"{', '.join(reader.names)}: no text: {blank} documents, all of them blank")
    progress.close()
    builder.finalize(str(idx_file))
    return documents, tokens, blank


def _indexed_dataset() -> Any:
    """Megatron's module, imported late (it takes seconds, which the workers do without) and without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0))
