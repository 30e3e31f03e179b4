"""Continuous batching: one thread that owns the model, and decodes all running requests in one forward a step.

A step lets at most one waiting request in (its prompt is one forward of its own, so the others wait for no more than
one prompt between two of their tokens) and then adds one token to each that runs. A request leaves, and its slot is
free, in the step in which it ends or its client goes away.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .slots import SlotCache
from .text import TextStream

MODEL_TYPES = ("mha2mla_llama", "llama", "qwen2", "mistral")
"""Models that the slots are known to fit: full attention in every layer, a cache of two tensors a layer."""

log = logging.getLogger("serving")


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0
    """0: the most likely token."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest whose probabilities reach this sum."""
    seed: int | None = None
    """None: another answer every time."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a request's step gave."""

    text: str
    tokens: int
    """Tokens of the answer so far, the one that ended it included."""
    finish: str | None = None
    """At the end: "stop", "length" or "error"."""


@dataclass(eq=False)
class Job:
    """A request in the engine. `emit` gets its pieces, from the engine's thread; it must neither block nor raise."""

    prompt: list[int]
    sampling: Sampling
    emit: Callable[[Piece], None]
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    text: Any = None
    generator: torch.Generator | None = None


class Engine:
    """Runs jobs on `model` with `slots` of `max_length` tokens (prompt and answer); `queue` more may wait.

    Raises ValueError for a model that it cannot serve and for lengths that the model does not have. The cache is
    allocated, and both kinds of forward have run once, when it is made.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int, max_length: int, queue: int) -> None:
        check_model(model.config, max_length)
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.cache = SlotCache(model.config.num_hidden_layers, slots, max_length)
        self._queue = queue
        self._ends = end_tokens(model)
        self._running: list[Job] = []
        """The job in slot i is the i-th."""
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        with torch.inference_mode():
            for lengths in ([0], [1] * slots):
                self._forward([[0]] * len(lengths), 0, lengths)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises QueueFull; ValueError for what would not fit a slot."""
        if len(job.prompt) + job.sampling.max_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {len(job.prompt)} tokens and max_tokens is {job.sampling.max_tokens}: together more "
                f"than the {self.max_length} tokens of a slot"
            )
        job.text = TextStream(self.tokenizer, job.prompt, job.sampling.stop)
        job.generator = torch.Generator(self.model.device)
        if job.sampling.seed is None:
            job.generator.seed()
        else:
            job.generator.manual_seed(job.sampling.seed)
        with self._changed:
            if self._closed or len(self._waiting) + len(self._running) >= self.cache.slots + self._queue:
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Let go of a job, wherever it is; nothing happens to one that has ended."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def status(self) -> dict[str, Any]:
        return {
            "status": "ok" if self._thread.is_alive() else "stopped",
            "slots": self.cache.slots,
            "active": len(self._running),
            "waiting": len(self._waiting),
            "max_length": self.max_length,
            "cache_bytes": self.cache.nbytes,
        }

    def stop(self) -> None:
        """Let the current step be the last; jobs that are left end with "error"."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """`stop`, and wait until it has."""
        self.stop()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait():
                for slot in reversed(range(len(self._running))):
                    if self._running[slot].cancelled:
                        self._free(slot)
                if self._admit():
                    self._advance(len(self._running) - 1, prefill=True)
                if self._running:
                    self._advance(0, prefill=False)
        finally:
            with self._changed:
                self._closed = True
            for job in (*self._running, *self._waiting):
                job.emit(Piece("", len(job.tokens), "error"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _admit(self) -> bool:
        """Give the first waiting job a slot, where there are both."""
        with self._changed:
            if not self._waiting or len(self._running) == self.cache.slots:
                return False
            self._running.append(self._waiting.popleft())
            return True

    def _advance(self, first: int, prefill: bool) -> None:
        """One forward of the jobs from slot `first` on, and their next tokens. If it fails, so do they."""
        jobs = self._running[first:]
        try:
            if prefill:
                tokens, lengths = [job.prompt for job in jobs], [0]
            else:
                tokens = [job.tokens[-1:] for job in jobs]
                lengths = [len(job.prompt) + len(job.tokens) - 1 for job in jobs]
            chosen = choose_tokens(self._forward(tokens, first, lengths), jobs)
            finished = [self._append(job, token) for job, token in zip(jobs, chosen, strict=True)]
        except Exception:
            log.exception("a forward of %d request(s) failed", len(jobs))
            finished = [True] * len(jobs)
            for job in jobs:
                job.emit(Piece("", len(job.tokens), "error"))
        for slot in reversed(range(len(jobs))):
            if finished[slot]:
                self._free(first + slot)

    def _forward(self, tokens: list[list[int]], first: int, lengths: list[int]) -> torch.Tensor:
        """Logits [b, vocabulary], float32, after tokens [b, s] that follow lengths[i] cached ones of slot first + i."""
        inputs = self.cache.inputs(torch.tensor(tokens, device=self.model.device), first, lengths)
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    def _append(self, job: Job, token: int) -> bool:
        """Add a token to a job's answer; True if that ends it."""
        job.tokens.append(token)
        text = "" if token in self._ends else job.text.push(token)
        finish = None
        if token in self._ends or job.text.stopped:
            finish = "stop"
        elif len(job.tokens) >= job.sampling.max_tokens:
            finish = "length"
        if finish:
            text += job.text.finish()
            finish = "stop" if job.text.stopped else finish
        if text or finish:
            job.emit(Piece(text, len(job.tokens), finish))
        return finish is not None

    def _free(self, slot: int) -> None:
        """Take a job out; the last one moves to its slot."""
        last = self._running.pop()
        if slot < len(self._running):
            self.cache.move(len(self._running), slot, len(last.prompt) + len(last.tokens) - 1)
            self._running[slot] = last


def choose_tokens(logits: torch.Tensor, jobs: list[Job]) -> list[int]:
    """The next token of each job from logits [b, vocabulary], drawn from its own generator."""
    best = logits.argmax(dim=-1).tolist()
    return [
        draw(row, job.sampling, job.generator) if job.sampling.temperature > 0 else token
        for row, job, token in zip(logits, jobs, best, strict=True)
    ]


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One token from logits [vocabulary]."""
    # Against the largest, and no smaller temperature: quotients stay finite.
    probabilities = ((logits - logits.max()) / max(sampling.temperature, 1e-6)).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        ordered[1:][ordered.cumsum(dim=-1)[:-1] >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def check_model(config: Any, max_length: int) -> None:
    """Raise ValueError for a model that slots do not fit, and for more positions than it has."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        raise ValueError("a sliding window: slots are for full attention")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"rope_type {rope}: frequencies that depend on the length of a batch's sequences")
    if max_length > config.max_position_embeddings:
        raise ValueError(f"max_length: {max_length} is more than the model's {config.max_position_embeddings}")
