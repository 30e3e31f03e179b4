"""A conversion's output folder: hidden while it is worked into, taken up again after an interrupt, named once complete.

Beside DST, the folder `.DST.partial` holds `new`, which becomes DST, and `journal.jsonl`: what the conversion is, then
a line for each part of the work that is done, with the pieces of files that it put there. On the next start of the same
conversion the journal is believed up to the first piece whose bytes are not those that were written, so that it does
not matter when, and by what, a conversion is ended. (`old` is a former DST while its name is passed on.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mha2mla_megatron import __version__
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.files import NO_ROOM
from mha2mla_megatron.progress import Progress

JOURNAL, NEW, OLD = "journal.jsonl", "new", "old"
BLOCK = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Bytes of a file of the output folder, and their CRC-32."""

    file: str
    offset: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def identity(command: str, settings: Any, inputs: Iterable[Path]) -> dict[str, Any]:
    """What a conversion's result depends on. inputs: files, or folders for all the files in them."""
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = {str(file.absolute()): file.stat() for file in files if file.is_file()}
    return {
        "command": command,
        "settings": asdict(settings),
        "inputs": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "versions": [__version__, torch.__version__],
    }


class PartialFolder:
    """The folder that a conversion works into, at `path`.

    done: the parts of the work that are done, each with its result if that is not in the files (a JSON value);
    pieces: what was written, in order. Both hold what is on its way too: pieces are written by a thread of their own,
    so that the next one can be made meanwhile, and no signal strikes in the middle of one.
    """

    def __init__(self, root: Path, what: dict[str, Any]) -> None:
        self.root, self.path = root, root / NEW
        self.done: dict[str, Any] = {}
        self.pieces: dict[str, Piece] = {}
        self.unrecorded: list[str] = []
        self.path.mkdir(parents=True, exist_ok=True)
        self.journal = (root / JOURNAL).open("ab", buffering=0)
        self.writer = ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []
        self.failed = False
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.journal.close()
            raise UserError(f"{root}: another process is working in it") from None
        self._take_up(what)

    def write(self, name: str, file: str, offset: int | None, save: Callable[[Any], Any]) -> None:
        """Put a piece into a file, at a place or (None) after the last piece; returns while it is being written.

        save: writes the bytes to the stream that it is given; it runs later, so what it writes must not change.

        Raises what went wrong with the piece before.
        """
        self.wait()  # so that no more than two pieces are in memory
        self._submit(lambda: self._write(name, file, offset, save))

    def finish(self, part: str, result: Any = None) -> None:
        """A part of the work is done, and the pieces since the one before belong to it: they count together."""
        self.done[part] = result
        self._submit(lambda: self._record(part, result))

    def wait(self) -> None:
        """Return when all is written."""
        pending, self.pending = self.pending, []
        for work in pending:
            work.result()

    def close(self) -> None:
        """Finish the piece that is being written, and let others work in the folder."""
        self.writer.shutdown()
        self.journal.close()

    def publish(self, target: Path) -> None:
        """Give the complete folder its name, in the place of what has it."""
        self.wait()
        for file in self.path.rglob("*"):
            _sync(file)
        if target.exists():
            shutil.rmtree(self.root / OLD, ignore_errors=True)
            target.rename(self.root / OLD)
        self.path.rename(target)
        _sync(target.parent)
        shutil.rmtree(self.root, ignore_errors=True)

    def _submit(self, work: Callable[[], None]) -> None:
        def run() -> None:
            if self.failed:  # a part whose piece could not be written is not done
                return
            self.failed = True
            work()
            self.failed = False

        self.pending.append(self.writer.submit(run))

    def _write(self, name: str, file: str, offset: int | None, save: Callable[[Any], Any]) -> None:
        if offset is None:
            offset = max((piece.end for piece in self.pieces.values() if piece.file == file), default=0)
        path = self.path / file
        with path.open("r+b" if path.exists() else "w+b") as stream:
            stream.seek(offset)
            summed = _Summed(stream)
            save(summed)
        self.pieces[name] = Piece(file, offset, summed.length, summed.crc)
        self.unrecorded.append(name)

    def _record(self, part: str, result: Any) -> None:
        pieces = {name: astuple(self.pieces[name]) for name in self.unrecorded}
        self.journal.write(_line({"part": part, "result": result, "pieces": pieces}))
        self.unrecorded.clear()

    def _take_up(self, what: dict[str, Any]) -> None:
        """Read what the journal says is there, and believe it as far as it is true."""
        lines = (self.root / JOURNAL).read_bytes().splitlines(keepends=True)
        good = len(_line(what))
        if lines[:1] != [_line(what)]:
            if lines:
                print(f"{self.root}: left by another conversion; starting anew", file=sys.stderr)
            shutil.rmtree(self.path)
            self.path.mkdir()
            self.journal.truncate(0)
            self.journal.write(_line(what))
            return
        progress = Progress("checking what is there", self._size(), "MB", 1e6)
        for line in lines[1:]:
            try:
                record = json.loads(line)
                pieces = {name: Piece(*values) for name, values in record["pieces"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # the machine stopped while it was written
                break
            if not line.endswith(b"\n"):
                break
            if any(_crc(self.path / piece.file, piece) != piece.crc for piece in pieces.values()):
                break
            self.done[record["part"]] = record["result"]
            self.pieces.update(pieces)
            progress.advance(sum(piece.length for piece in pieces.values()))
            good += len(line)
        self.journal.truncate(good)
        if self.pieces:
            progress.close()

    def _size(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


class _Summed:
    """A stream that is written to, with the length and the CRC-32 of what was."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.length, self.crc = stream, 0, 0

    def write(self, data: memoryview) -> int:
        self.stream.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.length += data.nbytes
        return data.nbytes

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def resumable_folder(target: Path, overwrite: bool, what: dict[str, Any]) -> Iterator[PartialFolder]:
    """A folder that takes `target`'s place when the block ends well, and else waits for the same conversion.

    what: the conversion's `identity`. Only a UserError, which would come again, removes the folder.

    Raises UserError if `target` exists, is not empty and `overwrite` is false, or cannot be written, or the disk fills
    up.
    """
    target = Path(os.path.abspath(target))
    root = target.with_name(f".{target.name}.partial")
    if (root / OLD).is_dir() and not target.exists():  # killed between the two renames of `publish`
        (root / OLD).rename(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: exists and is not empty; give overwrite=true to replace it")
    again = "the same command goes on from there"
    try:
        partial = PartialFolder(root, what)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target}: interrupted; {again}") from None
    try:
        yield partial
        partial.publish(target)
    except UserError:
        partial.close()
        shutil.rmtree(root, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"{target}: cannot be written ({error.strerror}); with more room {again}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target}: interrupted; {again}") from None
    finally:
        partial.close()


def parts_to_do(partial: PartialFolder, what: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """The parts of the work that no earlier run has done, with the progress of all of them, whose sizes are bytes.

    What is asked for next is done: the caller has written it and called `finish`.
    """
    progress = Progress(what, sum(sizes.values()), "MB", 1e6)
    for part, size in sizes.items():
        if part in partial.done:
            progress.skip(size)
        else:
            yield part
            progress.advance(size)
    progress.close()


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _crc(file: Path, piece: Piece) -> int | None:
    """Of the bytes that are in the piece's place; None if it is not all there."""
    crc, left = 0, piece.length
    try:
        with file.open("rb") as stream:
            stream.seek(piece.offset)
            while left and (block := stream.read(min(left, BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    return None if left else crc


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
