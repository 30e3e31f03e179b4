"""Serve a converted model, or its original, with OpenAI's completion interface and continuous batching.

    python examples/serve.py MODEL [key=value ...]

MODEL is the folder of an export (or a hub id). Needs torch, transformers, fastapi and uvicorn, and this file and the
folder `serving` beside it; mha2mla_megatron need not be installed. Code in MODEL's folder is run: serve what you trust.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USAGE = "usage: serve.py MODEL [key=value ...]"
CUT_OFF_SECONDS = 10
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """Bad words on the command line, or a model that cannot be served."""


@dataclass(frozen=True)
class Settings:
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every one of the machine. There is no authentication."""

    port: int = 8000
    """0: a free one, which is printed."""

    name: str = ""
    """What clients call the model; empty: MODEL's last part."""

    slots: int = 8
    """Requests that are decoded together."""

    max_length: int = 2048
    """Tokens of a slot: prompt and answer."""

    queue: int = 256
    """Requests that may wait for a slot; more are answered with 429."""

    dtype: str = "auto"
    """Of weights and cache: float32, bfloat16, float16; auto: as stored."""

    device: str = "auto"
    """cpu, cuda, cuda:1; auto: cuda where there is one."""

    shutdown_seconds: int = 30
    """How long running and waiting requests may take to end after SIGTERM; the others end with an error then."""


def main() -> None:
    # Also what uvicorn raises again when it has shut down; without it the exit code would be the signal's.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{USAGE}\n\n{inspect.cleandoc(__doc__ or '')}\n\n{describe()}")
        return
    try:
        serve(*parse_words(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_words(words: list[str]) -> tuple[str, Settings]:
    """(MODEL, settings) of a command line."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    models, values = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            models.append(word)
        elif key not in fields:
            raise UserError(f"'{word}': unknown key '{key}'; known: {', '.join(fields)}")
        else:
            values[key] = value if fields[key].type == "str" else whole_number(key, value)
    if len(models) != 1:
        raise UserError(f"one MODEL is needed, {len(models)} given; {USAGE}")
    if values.get("dtype", "auto") not in DTYPES:
        raise UserError(f"dtype: unknown value '{values['dtype']}'; valid: {', '.join(DTYPES)}")
    for key, minimum in (("port", 0), ("slots", 1), ("max_length", 2), ("queue", 0), ("shutdown_seconds", 0)):
        if values.get(key, minimum) < minimum:
            raise UserError(f"{key}: {values[key]} is too small; at least {minimum}")
    return models[0], Settings(**values)


def whole_number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{key}: '{value}' is not a whole number") from None


def describe() -> str:
    """The settings as one types them, each above what the string under its field says."""
    lines = [line.strip() for line in inspect.getsource(Settings).splitlines() if line.startswith("    ")]
    return "\n".join(
        f"      {line.strip('"')}" if line.startswith('"') else "  {}={}".format(*re.split(": .* = ", line))
        for line in lines
    )


def serve(model: str, settings: Settings) -> None:
    """Load, listen, and run until a signal comes."""
    listener = listen(settings)  # before the model is loaded: that takes long, and the port may be taken
    import uvicorn
    from serving.api import make_app

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Accept nothing more, wait for the requests, and let those end that take too long."""
            asyncio.get_running_loop().call_later(settings.shutdown_seconds, engine.stop)
            await super().shutdown(sockets)

    engine = make_engine(model, settings)
    name = settings.name or Path(model).resolve().name
    # A client that does not read its answer is cut off a little later.
    grace = settings.shutdown_seconds + CUT_OFF_SECONDS
    config = uvicorn.Config(make_app(engine, name), log_level="warning", timeout_graceful_shutdown=grace)
    listener.listen(config.backlog)
    host, port = listener.getsockname()[:2]
    print(f"serving {name} at http://{host}:{port}: {engine.status()}", flush=True)
    try:
        Server(config).run(sockets=[listener])
    finally:
        engine.close()


def listen(settings: Settings) -> socket.socket:
    """A socket that has the address, and does not listen yet."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"{settings.host}:{settings.port}: cannot listen there ({error})") from None
    return listener


def make_engine(model: str, settings: Settings) -> Any:
    import torch
    from serving.engine import Engine
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=True, dtype=settings.dtype, attn_implementation="sdpa"
        )
    except Exception as error:  # a damaged file raises whatever its reader happens to do with it
        raise UserError(f"{model}: cannot be loaded ({first_line(error)})") from None
    try:
        return Engine(loaded.to(device).eval(), tokenizer, settings.slots, settings.max_length, settings.queue)
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{model}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    main()
