"""Throughput of a running server (examples/serve.py): requests one after the other, then together.

python tools/benchmarks/serve.py http://127.0.0.1:8000 [requests=8] [key=value ...]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import UserError, require_at_least, run_tool
from mha2mla_megatron.settings import load_settings

USAGE = "serve.py URL [key=value ...]"


@dataclass(frozen=True)
class Settings:
    requests: int = 8
    """How many, each time; all of them run together only where the server has as many slots."""

    prompt_tokens: int = 64
    max_tokens: int = 64
    """Of each answer; end tokens end some of them earlier."""

    rounds: int = 3
    """Repetitions, of which the fastest counts."""

    def __post_init__(self) -> None:
        for key in ("requests", "prompt_tokens", "max_tokens", "rounds"):
            require_at_least(key, getattr(self, key), 1)


def main(argv: list[str]) -> None:
    (url,), overrides, file = split_words(argv, USAGE, 1, 1, schema=Settings)
    settings = load_settings(Settings, overrides, file)
    try:
        with httpx.Client(base_url=url, timeout=3600, limits=httpx.Limits(max_connections=settings.requests)) as client:
            rates = {}
            for workers in (1, settings.requests):
                with ThreadPoolExecutor(workers) as pool:
                    rates[workers] = max(measure(client, pool, settings, i) for i in range(settings.rounds))
                print(f"{workers} at a time: {rates[workers]:.1f} tokens/s", flush=True)
    except httpx.HTTPError as error:
        raise UserError(f"{url}: {error}") from None
    print(f"ratio: {rates[settings.requests] / rates[1]:.2f}")


def measure(client: httpx.Client, pool: ThreadPoolExecutor, settings: Settings, seed: int) -> float:
    """Answered tokens per second."""

    def ask(prompt: list[int]) -> int:
        body = {"prompt": prompt, "max_tokens": settings.max_tokens, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise UserError(f"the server answers {answer.status_code}: {answer.text}")
        return answer.json()["usage"]["completion_tokens"]

    start = time.monotonic()
    tokens = sum(pool.map(ask, prompts(settings, seed)))
    return tokens / (time.monotonic() - start)


def prompts(settings: Settings, seed: int) -> Iterator[list[int]]:
    """Token ids from 3 to 249, which every vocabulary has; no two prompts begin alike."""
    for request in range(settings.requests):
        yield [3 + (7 * request + 31 * seed + i * i) % 247 for i in range(settings.prompt_tokens)]


if __name__ == "__main__":
    run_tool(main)
