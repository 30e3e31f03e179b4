"""The words of a command line: `key=value` settings, `config=FILE.yaml`, and the rest, which are positional."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mha2mla_megatron.errors import UserError

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def _show(page: str) -> None:
    """Print a page of which a pager, or `head`, may read only the beginning."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends


def split_words(
    argv: Sequence[str], usage: str, minimum: int, maximum: int | None = None, schema: type | None = None
) -> tuple[list[str], list[str], Path | None]:
    """Split a command line into (positional words, `key=value` words, the file of `config=FILE.yaml` or None).

    A word is a setting if what stands before its first `=` is spelt like a key (a file named `a=b` is `./a=b`), so
    that a misspelt key reaches `load_settings` and is refused there. usage: one line, "tool.py WORDS [key=value ...]".
    minimum, maximum: how many positional words there may be. schema: the settings to describe under the usage.

    -h or --help prints the usage and exits with 0. Raises UserError for another count, after printing the usage, for an
    empty word, and for anything that starts with a dash.
    """
    if "-h" in argv or "--help" in argv:
        _show(_help(usage, schema))
        sys.exit(0)
    positionals: list[str] = []
    overrides: list[str] = []
    file: Path | None = None
    for word in argv:
        key, equals, value = word.partition("=")
        if not word:  # such as of a shell's variable that is not set; as a folder it would be the current one
            raise UserError(f"an empty word among the arguments; usage: {usage}")
        if word.startswith("-"):
            raise UserError(f"'{word}': there are no dashed options but --help; settings are given as key=value")
        if not equals or not _KEY.fullmatch(key):
            positionals.append(word)
        elif key != "config":
            overrides.append(word)
        elif not value or file is not None:
            raise UserError(f"'{word}': config=FILE.yaml names one settings file, once")
        else:
            file = Path(value)
    if len(positionals) < minimum or (maximum is not None and len(positionals) > maximum):
        if os.environ.get("RANK", "0") == "0":
            print(_help(usage, schema), file=sys.stderr)
        wanted = f"{minimum}" if maximum == minimum else f"{minimum} to {maximum}" if maximum else f"at least {minimum}"
        raise UserError(f"{wanted} positional word(s) needed, {len(positionals)} given; usage: {usage}")
    return positionals, overrides, file


def describe_settings(schema: type) -> str:
    """Every key of a settings dataclass as `key=default`, each with the docstring that stands under its field."""
    lines: list[str] = []
    for key, default, text in _rows(schema, None, ""):
        lines.append(f"  {key}={_yaml_word(default)}")
        lines.extend(textwrap.wrap(text, 116, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _help(usage: str, schema: type | None) -> str:
    if schema is None:
        return f"usage: {usage}"
    heading = "settings and their defaults, given as key=value or in config=FILE.yaml:"
    return f"usage: {usage}\n\n{heading}\n{describe_settings(schema)}"


def _rows(schema: type, values: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, docstring) of each field; `values` is the enclosing dataclass's default for this one."""
    docs = _field_docs(schema)
    for field in dataclasses.fields(schema):
        if values is not None:
            default = getattr(values, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = None if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            yield from _rows(type(default), default, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", default, docs.get(field.name, "")


def _field_docs(schema: type) -> dict[str, str]:
    """Field -> the string literal that follows it in the class body, inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _yaml_word(value: Any) -> str:
    """As one would type it after `key=`."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
