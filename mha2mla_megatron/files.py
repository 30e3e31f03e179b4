"""Output files that appear only when they are complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mha2mla_megatron.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_files(targets: Sequence[Path], overwrite: bool) -> Iterator[list[Path]]:
    """Scratch files beside `targets` that take their places when the block ends well, and vanish when it does not.

    The block must write every one of them. Of several, the last is the seal: an old one goes first and the new one
    comes last, so that it never stands beside a mixture of old and new.

    Raises UserError if a target exists and `overwrite` is false, or cannot be written, or is being written by another
    process, or the disk fills up.
    """
    for target in targets:
        if target.is_dir():
            raise UserError(f"{target}: exists and is a folder")
        if target.exists() and not overwrite:
            raise UserError(f"{target}: exists; give overwrite=true to replace it")
    scratch = [target.with_name(f".{target.name}.partial") for target in targets]
    own: list[Path] = []
    with ExitStack() as locks:
        try:
            try:
                for target, file in zip(targets, scratch, strict=True):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(_locked(file, target))
                    own.append(file)
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
            yield scratch
            for target in reversed(targets[1:]):
                target.unlink(missing_ok=True)
            for target, file in zip(targets, scratch, strict=True):
                os.replace(file, target)
                own.remove(file)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise UserError(f"{targets[0]}: cannot be written ({error.strerror})") from None
        finally:
            for file in own:
                file.unlink(missing_ok=True)


def _locked(scratch: Path, target: Path) -> IO[bytes]:
    """The scratch file, emptied and locked until it is closed. Two processes that wrote the same one would mix."""
    stream = scratch.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UserError(f"{target}: another process is writing it") from None
    except OSError:  # a file system without locks
        pass
    stream.truncate(0)
    return stream


def make_writable(folder: Path) -> None:
    """Make the folder, if it is not there, and write a file in it to see that it can be done. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("yes")
    probe.unlink()


def require_file(file: Path, key: str = "", hint: str = "") -> None:
    """Raise UserError for an input that is a folder, or that is not there.

    key: the setting that names the file. hint: what a user can do where there is none.
    """
    where = f"{key}: {file}" if key else str(file)
    if file.is_dir():
        raise UserError(f"{where}: a folder, not a file")
    if not file.exists():  # a pipe is there, though no regular file
        raise UserError(f"{where}: no such file" + (f"; {hint}" if hint else ""))


def replace_text(file: Path, text: str) -> None:
    """Write a small file that changes all at once, also where the machine stops in between."""
    scratch = scratch_of(file)
    with scratch.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(file)


def scratch_of(file: Path) -> Path:
    """Where `replace_text` writes; it is left there if the process ends meanwhile."""
    return file.with_name(f".{file.name}")


def file_sha256(file: Path) -> str:
    """Hex digest of a file's contents. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def sampled_sha256(file: Path, pieces: int = 64, size: int = 1 << 16) -> str:
    """Hex digest of a file's length and of some pieces of it at equal distances: for files of which it is enough to
    tell one from another, and that take minutes to read. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            length = stream.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(length).encode())
            for start in sorted({max(0, length - size) * i // (pieces - 1) for i in range(pieces)}):
                stream.seek(start)
                digest.update(stream.read(size))
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def read_json_object(file: Path, missing: str) -> dict[str, Any]:
    """A config as a dict. Raises UserError, with `missing` for its message where there is no such file."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}, not a config")
    return values


def write_json(file: Path, values: Any) -> None:
    """Write indented JSON; NaN and infinities, which JSON has not, are an error."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
