"""A conversion's output folder: hidden while it is worked into, taken up again after an interrupt, named once complete.

Beside DST, the folder `.DST.partial` holds `new`, which becomes DST, and `journal.jsonl`: what the conversion is, then
a line for each part of the work that is done, with the pieces of files that it put there. On the next start of the same
conversion the journal is believed up to the first piece whose bytes are not those that were written, so that it does
not matter when, and by what, a conversion is ended. (`old` is a former DST while its name is passed on.)

Under torchrun each rank does some of the parts, writes their pieces into the same files, at places that are known
beforehand, and appends their lines to the same journal; rank 0 does what is done once. So what an interrupt leaves is
the same kind of folder, from which any number of ranks can go on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mha2mla_megatron import __version__
from mha2mla_megatron.checkpoint.heap import freed_memory_is_kept
from mha2mla_megatron.errors import LostProcess, UserError
from mha2mla_megatron.files import NO_ROOM
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.ranks import ALONE, Ranks

JOURNAL, NEW, OLD = "journal.jsonl", "new", "old"
STOPPED = "stopped"
"""A file that a rank makes where it fails, so that the others end after the part that they are at."""

BLOCK = 1 << 22
AGAIN = "the same command goes on from there"


class NoRoomLeft(UserError):
    """The disk is full; what is written is worth keeping."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file of the output folder, and their CRC-32."""

    file: str
    offset: int
    length: int
    crc: int


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


def partial_root(target: Path) -> Path:
    """Where the work for `target` is done."""
    return target.with_name(f".{target.name}.partial")


class PartialFolder:
    """The folder that a conversion works into, at `path`; rank 0 makes it before the others do.

    done: the parts of the work that are done, each with its result if that is not in the files (a JSON value);
    pieces: what was written, in order. Both hold what is on its way too: pieces are written by a thread of their own,
    so that the next one can be made meanwhile, and no signal strikes in the middle of one. What other ranks do is in
    both after `together`.
    """

    def __init__(self, target: Path, what: dict[str, Any], ranks: Ranks) -> None:
        self.target, self.root, self.ranks = target, partial_root(target), ranks
        self.path = self.root / NEW
        self.done: dict[str, Any] = {}
        self.pieces: dict[str, Piece] = {}
        self.unrecorded: list[str] = []
        self.path.mkdir(parents=True, exist_ok=True)
        self.journal = (self.root / JOURNAL).open("a+b", buffering=0)
        self.writer = ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []
        self.failed = False
        if ranks.rank == 0:
            self._lock(fcntl.LOCK_EX)
            self._take_up(what)
        if ranks.world > 1:
            self._lock(fcntl.LOCK_SH)  # by each, so that none of them outlives the lock
            self._read()

    def together(self, work: Callable[[], None]) -> None:
        """Have every rank do its parts of the work, and know of all of them after that.

        Raises, on all ranks, the UserError of the first that failed; the others then end early.
        """

        def do() -> None:
            try:
                with _names_full_disk(self.target):
                    work()
                    self.wait()
            except BaseException:
                with suppress(OSError):
                    (self.root / STOPPED).touch()
                raise

        self.ranks.every(do)
        if self.ranks.world > 1:
            self.ranks.every(self._read)  # before any of them goes on and adds to it: they share out what is left alike

    def first(self, work: Callable[[], None]) -> None:
        """As `together`, for work that rank 0 does while the others wait."""
        self.together(work if self.ranks.rank == 0 else lambda: None)

    def parts_to_do(self, what: str, sizes: Mapping[str, int], slow: Container[str] = ()) -> Iterator[str]:
        """This rank's share of the parts that no earlier run has done, with the progress of it; sizes are bytes.

        slow: parts that take much longer than to write them; each rank gets as many of them.

        What is asked for next is done: the caller has written it and called `finish`.
        """
        left = {part: size for part, size in sizes.items() if part not in self.done}
        chosen = {*self.ranks.share({part: 1 for part in left if part in slow})}
        chosen |= {*self.ranks.share({part: size for part, size in left.items() if part not in slow})}
        mine = {part: size for part, size in left.items() if part in chosen}
        before = sum(sizes.values()) - sum(left.values())
        title = what if self.ranks.world == 1 else f"{what}, rank 0 of {self.ranks.world}"
        progress = Progress(title, before + sum(mine.values()), "MB", 1e6)
        progress.skip(before)
        for part, size in mine.items():
            if (self.root / STOPPED).exists():
                return
            yield part
            progress.advance(size)
        progress.close()

    def write(self, name: str, file: str, offset: int, save: Callable[[Any], Any]) -> None:
        """Put a piece into a file; returns while it is being written.

        save: writes the bytes to the stream that it is given; it runs later, so what it writes must not change.

        Raises what went wrong with the piece before.
        """
        self.wait()  # so that no more than two pieces are in memory
        self._submit(lambda: self._write(name, file, offset, save))

    def read(self, name: str) -> bytearray:
        """The bytes of a piece that is written."""
        self.wait()
        piece = self.pieces[name]
        with (self.path / piece.file).open("rb") as stream:
            stream.seek(piece.offset)
            return bytearray(stream.read(piece.length))

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

    def publish(self) -> None:
        """Give the complete folder its name, in the place of what has it.

        A Ctrl-C at that moment is ignored: all is done, so that there is nothing for the same command to go on with.
        """
        self.wait()
        for file in self.path.rglob("*"):
            _sync(file)
        with _interrupts_ignored():
            if self.target.exists():
                shutil.rmtree(self.root / OLD, ignore_errors=True)
                self.target.rename(self.root / OLD)
            self.path.rename(self.target)
            _sync(self.target.parent)
            shutil.rmtree(self.root, ignore_errors=True)

    def _submit(self, work: Callable[[], None]) -> None:
        def run() -> None:
            if self.failed:  # a part whose piece could not be written is not done
                return
            self.failed = True
            work()
            self.failed = False

        self.pending.append(self.writer.submit(run))

    def _write(self, name: str, file: str, offset: int, save: Callable[[Any], Any]) -> None:
        path = self.path / file
        # Not cut where it exists, as another rank may have made it a moment ago.
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
            stream.seek(offset)
            summed = _Summed(stream)
            save(summed)
        self.pieces[name] = Piece(file, offset, summed.length, summed.crc)
        self.unrecorded.append(name)

    def _record(self, part: str, result: Any) -> None:
        pieces = {name: astuple(self.pieces[name]) for name in self.unrecorded}
        self.journal.write(_line({"part": part, "result": result, "pieces": pieces}))
        self.unrecorded.clear()

    def _lock(self, kind: int) -> None:
        try:
            fcntl.flock(self.journal, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.journal.close()
            raise UserError(f"{self.root}: another process is working in it") from None

    def _read(self) -> None:
        """Believe all of the journal: rank 0 has checked what earlier runs wrote."""
        self.journal.seek(0)
        for line in self.journal.readall().splitlines()[1:]:
            record = json.loads(line)
            self.done[record["part"]] = record["result"]
            self.pieces.update({name: Piece(*values) for name, values in record["pieces"].items()})

    def _take_up(self, what: dict[str, Any]) -> None:
        """Read what the journal says is there, and believe it as far as it is true."""
        (self.root / STOPPED).unlink(missing_ok=True)
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
        for start in range(0, data.nbytes, BLOCK):  # a block is in the processor's cache when it is read again
            block = data[start : start + BLOCK]
            self.stream.write(block)
            self.crc = zlib.crc32(block, self.crc)
        self.length += data.nbytes
        return data.nbytes

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def resumable_folder(
    target: Path, overwrite: bool, what: dict[str, Any], ranks: Ranks = ALONE
) -> Iterator[PartialFolder]:
    """A folder that takes `target`'s place when the block ends well, and else waits for the same conversion.

    what: the conversion's `identity`. ranks: those that work into it, each in a block of its own. Only a UserError that
    would come again removes the folder.

    Raises UserError if `target` exists, is not empty and `overwrite` is false, or holds an input, or cannot be written,
    or the disk fills up, and for ranks on several machines.
    """
    target = Path(os.path.realpath(target))  # of a link, what it points to, and so on the disk that is meant
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if here != ranks.world:  # several machines need not see one file alike while all of them write it
        raise UserError(f"{ranks.world} processes, {here} of them on this machine: a conversion runs on one")
    opened: list[PartialFolder] = []

    def open_folder() -> None:
        try:
            opened.append(PartialFolder(target, what, ranks))
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror})") from None

    def open_first() -> None:
        _check_target(target, overwrite)
        _check_inputs(target, what["inputs"])
        open_folder()

    try:
        ranks.first(open_first)
        ranks.every(lambda: None if opened else open_folder())
        partial = opened[0]
        try:
            with _interrupts_stay_interrupts(), freed_memory_is_kept():
                with _names_full_disk(target):
                    yield partial
                ranks.first(_names_full_disk(target)(partial.publish))
        except (LostProcess, NoRoomLeft):
            raise
        except UserError:
            partial.close()
            if ranks.rank == 0:
                shutil.rmtree(partial.root, ignore_errors=True)
            raise
    except KeyboardInterrupt:
        if not partial_root(target).exists():  # it has not begun, or is complete
            raise
        raise KeyboardInterrupt(f"{target}: interrupted; {AGAIN}") from None
    finally:
        for partial in opened:
            partial.close()


def _check_target(target: Path, overwrite: bool) -> None:
    if (partial_root(target) / OLD).is_dir() and not target.exists():  # killed between the two renames of `publish`
        (partial_root(target) / OLD).rename(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: exists and is not empty; give overwrite=true to replace it")


def _check_inputs(target: Path, inputs: Iterable[str]) -> None:
    """Raise UserError where replacing the target would delete what is read."""
    for name in inputs:
        if Path(os.path.realpath(os.path.dirname(name))).is_relative_to(target):
            raise UserError(f"{target}: holds {name}, which is read; give a DST that holds none of the inputs")


@contextmanager
def _names_full_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise NoRoomLeft(f"{target}: cannot be written ({error.strerror}); with more room {AGAIN}") from None


@contextmanager
def _interrupts_stay_interrupts() -> Iterator[None]:
    """Within the block, what is raised after a Ctrl-C is a KeyboardInterrupt.

    Where that strikes while torch's C++ code calls Python, torch makes another error of it.
    """
    struck = False

    def strike(number: int, frame: object) -> None:
        nonlocal struck
        struck = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, strike)
    try:
        yield
    except Exception as error:
        if struck:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


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
