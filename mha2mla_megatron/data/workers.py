"""Processes that tokenise: documents in, tokens out in the same order, with bounded memory.

A worker imports this module, the tokenizers library and, as every spawned process does, the file of the command that
is running. None of these imports torch or transformers, so that it starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import Array, c_char
from multiprocessing.context import SpawnContext
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from mha2mla_megatron.data.documents import BLOCK_BYTES, Block
from mha2mla_megatron.data.tokenizer import DocumentEncoder, EncodedBatch
from mha2mla_megatron.errors import UserError

BYTES_IN_FLIGHT = 8 << 20
"""Per worker: no more text is read while this much is being tokenised. Tokenising takes ~120 bytes of memory per byte
of text, so this bounds it at ~1 GB per worker, or ~120 times the largest document."""


class BlockReader(Protocol):
    """Blocks in order. position: bytes read so far, as they are on disk."""

    position: int

    def __iter__(self) -> Iterator[Block]: ...


def encode_in_order(reader: BlockReader, encoder: DocumentEncoder, workers: int) -> Generator[tuple[EncodedBatch, int]]:
    """(tokens, bytes read from disk for them) of a few documents at a time, in order, while later ones are at work.

    Raises UserError for the first bad document. Closing the generator early ends the processes.
    """
    # Not fork: this process has threads (torch's, the tokenizers') that a forked child would find dead.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    shared = _in_shared_memory(encoder, context)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(shared,))
    waiting: deque[tuple[Future[EncodedBatch], _Batch]] = deque()
    in_flight = 0
    finished = False

    def first() -> tuple[EncodedBatch, int]:
        nonlocal in_flight
        future, batch = waiting.popleft()
        in_flight -= batch.size
        return future.result(), batch.bytes_read

    try:
        for batch in _batches(reader):
            while waiting and in_flight >= workers * BYTES_IN_FLIGHT:
                yield first()
            with _interrupts_held_back():  # submitting starts a worker where none is idle
                future = pool.submit(_encode_in_worker, batch.blocks)
            waiting.append((future, batch._replace(blocks=[])))
            in_flight += batch.size
            while waiting and waiting[0][0].done():
                yield first()
        while waiting:
            yield first()
        finished = True
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, most likely for want of memory; give fewer workers") from None
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)
        if not finished:  # what the workers are at may take minutes, and nobody wants it
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()


class _Batch(NamedTuple):
    """What a worker is given at a time: a block, or the small files that make up one."""

    blocks: list[Block]
    size: int
    """Bytes of text."""
    bytes_read: int
    """Bytes on disk since the batch before."""


def _batches(reader: BlockReader) -> Iterator[_Batch]:
    blocks: list[Block] = []
    size = position = 0
    for block in reader:
        blocks.append(block)
        size += len(block.data)
        if size >= BLOCK_BYTES:
            yield _Batch(blocks, size, reader.position - position)
            blocks, size, position = [], 0, reader.position
    if blocks or reader.position > position:
        yield _Batch(blocks, size, reader.position - position)


_worker: tuple[DocumentEncoder, Tokenizer] | None = None
"""In a worker process: its encoder and tokenizer."""


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block is over. Processes started in it never see one, though it is sent to the whole
    group: the parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_shared_memory(encoder: DocumentEncoder, context: SpawnContext) -> Array[c_char]:
    """The pickled encoder, in memory that has no name and ends with the processes that hold it.

    What a process is started with goes through a pipe, and a tokenizer of megabytes does not fit in: each start would
    wait for its process to have imported all and read it.
    """
    pickled = pickle.dumps(encoder)
    shared = context.RawArray(c_char, len(pickled))
    shared.raw = pickled
    return shared


def _start_worker(pickled_encoder: Array[c_char]) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encoder: DocumentEncoder = pickle.loads(pickled_encoder)
    _worker = encoder, encoder.load()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they would wait for more work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(blocks: list[Block]) -> EncodedBatch:
    assert _worker is not None
    encoder, tokenizer = _worker
    return encoder.encode(tokenizer, blocks)
