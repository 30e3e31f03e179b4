"""Errors that are the user's to mend, and the frame that turns them into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

LINGER = 10.0
"""Seconds that other ranks leave rank 0 to print the error: torchrun ends all as soon as one has ended."""


class UserError(Exception):
    """Bad input: the message names the file, key or tensor, what was found and what would be valid."""


class UnusableModel(UserError):
    """A folder that is a model by its config.json, but that transformers cannot load."""


class LostProcess(UserError):
    """Another process of the run has died or hangs: each of the others says so, for none can tell for all."""


class FoundAlone(UserError):
    """Bad input that only some processes of a run read: they say so themselves, for rank 0 may not be among them."""


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to the one line that a `UserError` has room for."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require_one_of(key: str, value: str, valid: Sequence[str]) -> None:
    """Raise UserError for a setting that is none of the `valid` words."""
    if value not in valid:
        raise UserError(f"{key}: unknown value '{value}'; valid: {', '.join(valid)}")


def require_at_least(key: str, value: int, minimum: int) -> None:
    """Raise UserError for a setting below `minimum`."""
    if value < minimum:
        raise UserError(f"{key}: {value} is too small; at least {minimum}")


def require_entries(key: str, values: Sequence[object] | None, entry: str) -> None:
    """Raise UserError for a list of no entries, or of lists; None, the default, stands for all that there are."""
    if values is not None and not values:
        raise UserError(f"{key}: an empty list; give one {entry} or more, or leave it out")
    for value in values or ():
        if isinstance(value, list | dict):
            raise UserError(f"{key}: {value!r} is not a {entry}")


def run_tool(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command: a `UserError` becomes one line on stderr and exit code 2, anything else keeps its traceback.

    Under torchrun every rank meets the same `UserError` or Ctrl-C, which only rank 0 prints, but for `LostProcess` and
    `FoundAlone`.
    """
    first = os.environ.get("RANK", "0") == "0"
    _quiet_libraries()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if first or isinstance(error, LostProcess | FoundAlone):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(LINGER)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if first:
            print(str(interrupt) or "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _quiet_libraries() -> None:
    """Leave out what megatron-core and torch say on import and on every save about packages and switches not in use."""
    for module in ("megatron", "torch", "apex", "transformer_engine"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
