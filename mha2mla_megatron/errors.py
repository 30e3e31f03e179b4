"""Errors that are the user's to mend, and the frame that turns them into one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: the message names the file, key or tensor, what was found and what would be valid."""


def run_tool(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command: a `UserError` becomes one line on stderr and exit code 2, anything else keeps its traceback.

    Under torchrun every rank meets the same `UserError`; only rank 0 prints it.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
