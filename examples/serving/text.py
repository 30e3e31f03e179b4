"""Text out of tokens, one by one: whole characters only, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: a tokenizer may drop the space before a first word."""


class TextStream:
    """What a request's tokens say, cut before the first of its stop strings.

    The pieces that `push` and `finish` return are, joined, the difference between the text of prompt and answer and
    that of the prompt. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._window = list(prompt[-CONTEXT:])
        self._said = len(self._window)
        self._text = self._decode()
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; "" for half a character, and after a stop string."""
        self._window.append(token)
        text = self._decode()
        piece = text[len(self._text) :]
        if not piece or text.endswith("\ufffd"):  # bytes of a character whose others come with later tokens
            return ""
        # The next tokens are decoded after this piece's, not after all: the time per token does not grow.
        self._window = self._window[self._said :]
        self._said, self._text = len(self._window), self._decode()
        return self._release(piece)

    def finish(self) -> str:
        """What is still held: half a character, or the beginning of a stop string that did not come."""
        piece = self._release(self._decode()[len(self._text) :])
        rest, self._held = self._held, ""
        return piece + rest

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        open_at = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[:open_at], self._held[open_at:]
        return certain

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop begins with."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))
