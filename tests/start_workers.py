"""Tokenise with COUNT workers, none of which has done its imports before all of them have been started.

    python -m tests.start_workers COUNT FOLDER

FOLDER: empty; each worker leaves a file there. The tokenizer is as large as those of real models, 3 MB. Prints how many
workers there were, after how many had been started if that was less than all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from mha2mla_megatron.data.documents import BLOCK_BYTES, Block
from mha2mla_megatron.data.tokenizer import DocumentEncoder
from mha2mla_megatron.data.workers import encode_in_order

PATIENCE = 20
"""Seconds after which a worker no longer waits for the others."""


class OneWordEach:
    """Block n is the word `wn`, over and over."""

    position = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Block]:
        for n in range(self.count):
            yield Block(f"w{n} ".encode() * BLOCK_BYTES, "text", 1, 0, "none")


def wait_for_the_others(count: int, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    give_up = time.monotonic() + PATIENCE
    while (started := len(os.listdir(folder))) < count:
        if time.monotonic() > give_up:
            # Its end would be no help: a parent that waits for it to read would wait for ever.
            print(f"{started} of {count} workers have been started", flush=True)
            for n in range(count):
                (folder / f"given up {n}").touch()
        time.sleep(0.01)


def main(count: int) -> None:
    words = models.WordLevel({f"w{n}": n for n in range(200_000)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    encoder = DocumentEncoder(tokenizer.to_str(), False, "text", (), (), 200_000, "int32")
    assert len(encoder.tokenizer) > 3_000_000
    found = [batch.tokens for batch, _ in encode_in_order(OneWordEach(count), encoder, count)]
    assert [set(tokens.tolist()) for tokens in found] == [{n} for n in range(count)]
    print(f"{count} workers")


if __name__ == "__mp_main__":  # a spawned process imports the file of the command before it reads what it is to do
    wait_for_the_others(int(sys.argv[1]), Path(sys.argv[2]))

if __name__ == "__main__":
    main(int(sys.argv[1]))
