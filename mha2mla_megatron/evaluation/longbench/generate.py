"""Greedy continuations of batches of prompts, padded on the left, through any of the caches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.cache import stored_bytes
from mha2mla_megatron.evaluation.cached_perplexity import make_cache


class Answer(NamedTuple):
    """The continuation of one prompt, and what the cache held of it at the end."""

    text: str

    cache_bytes: float
    """An equal part of what the batch's cache stored."""

    cached_tokens: int
    """Padding included, for it is stored, too."""

    decoded_tokens: int
    """Tokens after the first, which comes from the prompt's pass; padding behind the answer included, as it takes the
    same time."""

    decode_seconds: float
    """An equal part of what the batch took for them."""


class Generator:
    """A model with its tokenizer and the cache that it generates through.

    cache: one of `cached_perplexity.KINDS`, or None for the cache that transformers makes by itself.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, cache: str | None, options: Mapping[str, int]) -> None:
        self.name, self.model, self.tokenizer, self.cache, self.options = name, model, tokenizer, cache, options
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.newline: int = tokenizer.encode("\n", add_special_tokens=False)[-1]

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops_at_newline: bool) -> list[Answer]:
        """The continuation of each prompt, special tokens left out; where `stops_at_newline`, of one line.

        Out of memory, it goes on with half as many at a time. Raises UserError if one alone does not fit, and for
        logits that are not finite.
        """
        # As in the benchmark: only where a line ends the answer must it not be empty.
        ends, least = ([*self.ends, self.newline], 1) if stops_at_newline else (self.ends, 0)
        answers: list[Answer] = []
        size = len(prompts)
        while len(answers) < len(prompts):
            batch = prompts[len(answers) : len(answers) + size]
            found = _unless_out_of_memory(lambda batch=batch: self._generate(batch, max_new_tokens, least, ends))
            if found is not None:
                answers += found
                continue
            longest = max(map(len, batch))
            if len(batch) == 1:
                raise UserError(
                    f"{self.name}: out of memory with one prompt of {longest} tokens; a smaller max_tokens or a "
                    "quantised cache takes less"
                )
            size = len(batch) // 2
            print(
                f"out of memory with {len(batch)} prompts of up to {longest} tokens; going on with {size} at a time",
                file=sys.stderr,
                flush=True,
            )
        return answers

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, min_new_tokens: int, ends: list[int]
    ) -> list[Answer]:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        more: dict[str, Any] = {}
        steps = _Steps(self.model.device)
        if self.cache is not None:
            more["past_key_values"] = make_cache(self.name, self.model.config, self.cache, self.options)
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends or None,
                pad_token_id=0,
                logits_processor=[steps],
                return_dict_in_generate=True,
                use_cache=True,
                **more,
            )
        decoded, seconds = steps.decoding()
        if not steps.finite:
            raise UserError(f"{self.name}: gives logits that are not finite, dtype {self.model.dtype}")
        held, tokens = stored_bytes(made.past_key_values) / len(prompts), made.past_key_values.get_seq_length()
        texts = (
            self.tokenizer.decode(_until(row, ends), skip_special_tokens=True)
            for row in made.sequences[:, longest:].tolist()
        )
        return [Answer(text, held, tokens, decoded, seconds / len(prompts)) for text in texts]


class _Steps:
    """A logits processor that changes nothing. It sees whether every row has a largest logit that is a number, and the
    time from the first step's logits on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._count = device, 0
        self._finite: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Stays on the device: a look at each step would wait for the GPU.
        now = scores.amax(-1).isfinite().all()
        self._finite = now if self._finite is None else self._finite & now
        if self._count == 0:
            self._first = self._now()
        self._count += 1
        return scores

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def decoding(self) -> tuple[int, float]:
        """(steps after the first, their seconds); waits for the GPU."""
        if self._count < 2:
            return 0, 0.0
        end = self._now()
        if isinstance(end, float):
            return self._count - 1, end - self._first
        end.synchronize()
        return self._count - 1, self._first.elapsed_time(end) / 1000

    @property
    def finite(self) -> bool:
        return self._finite is None or bool(self._finite)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends the generation; after it comes padding."""
    stop = next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return tokens[:stop]


def _unless_out_of_memory(work: Callable[[], list[Answer]]) -> list[Answer] | None:
    """What `work` returns; None if the GPU's memory is too small, with whatever it held given back."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # leaves the block first: the exception holds the frames, and they the tensors
    torch.cuda.empty_cache()
    return None
