"""Check a checkpoint's files by their sizes and by checksums computed while writing.

``complete.json`` lists every other file with its size, the CRC-32 of each block of ``block_bytes``,
so that ranks can divide the reading evenly between them, and the CRC-32 of each stored tensor
(``pieces``), with which ``verified.py`` checks loaded tensors. Version 1 of the format had one
CRC-32 per file; such files are read as a single block.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from typing_extensions import override

from allometry.configs.json_file import read_object
from allometry.parallel.agree import heartbeat_s
from allometry.parallel.mesh import Mesh
from allometry.trainer.state.folder import write_atomically

_log = logging.getLogger(__name__)

COMPLETE = "complete.json"
FACTS = "trainer.json"
METADATA = ".metadata"
SHARD_SUFFIX = ".distcp"
BLOCK_BYTES = 64 << 20
READ_BYTES = 4 << 20
TRIES = 2
"""Number of reads before bytes count as changed; the second read bypasses the page cache."""

Files = dict[str, dict[str, Any]]
"""By name: {"bytes": size, "crc32": [of each block], "pieces": CRC-32 of each tensor in hex}."""


class Checksum:
    """Size of the data passed to ``update``, CRC-32 of each block, and CRC-32 of each piece.

    A piece ends at a ``cut``.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._blocks: list[int] = []
        self._pieces: list[int] = []
        self._piece, self._begun = 0, 0

    def update(self, data: Any) -> None:
        """Add the next bytes, given as any object with a buffer."""
        rest = memoryview(data).cast("B")
        self._piece = zlib.crc32(rest, self._piece)
        while rest:
            used = self._bytes % BLOCK_BYTES
            if not used:
                self._blocks.append(0)
            part = rest[: BLOCK_BYTES - used]
            self._blocks[-1] = zlib.crc32(part, self._blocks[-1])
            self._bytes += len(part)
            rest = rest[len(part) :]

    def cut(self) -> None:
        """End a piece here, unless no bytes were added since the last cut."""
        if self._bytes > self._begun:
            self._pieces.append(self._piece)
        self._piece, self._begun = 0, self._bytes

    def entry(self) -> dict[str, Any]:
        """Return the file's entry in ``complete.json``."""
        entry: dict[str, Any] = {"bytes": self._bytes, "crc32": self._blocks or [0]}
        if self._pieces:
            entry["pieces"] = "".join(f"{crc:08x}" for crc in self._pieces)
        return entry


class _ChecksumFile(io.BufferedWriter):
    """A file written sequentially, with its checksum."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.checksum = Checksum()
        self.error: OSError | None = None

    @override
    def write(self, data: Any, /) -> int:
        self.checksum.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error  # torch's writer raises a different error
            raise

    @override
    def tell(self) -> int:
        """Return the position in the file; torch calls this before and after each tensor."""
        self.checksum.cut()
        return super().tell()


class _ChecksumFileSystem(FileSystem):
    """torch's file system access, with checksums of the written files."""

    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    @override
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        stream = _ChecksumFile(path)
        try:
            with stream:
                self.checksums[Path(path).name] = stream.checksum
                yield stream
        except Exception as error:
            raise stream.error or error from None

    @override
    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class ShardWriter(FileSystemWriter):
    """torch's writer of checkpoint shards, with checksums computed while writing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, overwrite=True)
        self.fs = self._files = _ChecksumFileSystem()

    @property
    def files(self) -> Files:
        """Size and checksums of each file that this rank has written."""
        return {name: checksum.entry() for name, checksum in self._files.checksums.items()}


def seal(
    path: Path,
    step: int,
    files: Files,
    facts: dict[str, Any],
    block_bytes: int | None = None,
    run: str | None = None,
) -> None:
    """Complete a checkpoint in a folder of shards: write the facts and, last, the list of files.

    ``run``: the identity of the run that writes the checkpoint (``identity.py``).
    """
    text = json.dumps(facts, indent=2) + "\n"
    write_atomically(path / FACTS, text)
    checksum = Checksum()
    checksum.update(text.encode())
    listed = dict(sorted((files | {FACTS: checksum.entry()}).items()))
    content = {"step": step, "block_bytes": block_bytes or BLOCK_BYTES, "files": listed}
    content |= {} if run is None else {"run": run}
    write_atomically(path / COMPLETE, json.dumps(content, indent=2) + "\n")


class Block(NamedTuple):
    """A range of bytes in a file, and its CRC-32."""

    name: str
    start: int
    size: int
    crc: int


def step_named(path: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for a folder with another name."""
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else None


class Listing(NamedTuple):
    """Contents of ``complete.json``: blocks of all files, and the CRC-32 of each piece of a file.

    Files are in numeric order (rank 2 before rank 10), pieces in the order of the file. Files
    without recorded pieces are missing in ``pieces``.
    """

    blocks: list[Block]
    pieces: dict[str, list[int]]


def listing(path: Path) -> Listing:
    """Return the contents of ``complete.json`` of the checkpoint ``path``.

    Raises OSError or ValueError if the file cannot be read.
    """
    content = read_object(path / COMPLETE)
    named = step_named(path)
    if named is not None and named != content.get("step"):
        raise ValueError(f"it is of step {content.get('step')}, and the folder has another name")
    try:
        files = content["files"].items()
        pieces = {n: bytes.fromhex(each["pieces"]) for n, each in files if "pieces" in each}
        crcs = {n: [crc for (crc,) in struct.iter_unpack(">I", text)] for n, text in pieces.items()}
        return Listing(list(_listed(content)), crcs)
    except (KeyError, TypeError, AttributeError, OverflowError, struct.error):
        raise ValueError("its list of files is none of a checkpoint") from None


def _listed(content: dict[str, Any]) -> Iterator[Block]:
    numbers = re.compile(r"\d+")
    for name in sorted(content["files"], key=lambda name: [*map(int, numbers.findall(name))]):
        entry = content["files"][name]
        if Path(name).name != name or name == "..":
            raise ValueError(f"{name} is no name of a file")
        size, crcs = entry["bytes"], entry["crc32"]
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} has {size} bytes")
        if isinstance(crcs, int):  # format version 1
            yield Block(name, 0, size, crcs)
            continue
        each = content["block_bytes"]
        starts = range(0, max(1, size), each)
        for start, crc in zip(starts, crcs, strict=True):
            yield Block(name, start, min(each, size - start), crc)


def unreadable(name: str, error: OSError | ValueError) -> str:
    """Describe in words why ``name`` cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{name} cannot be read: {reason}"


def _present(path: Path) -> list[str]:
    """Return a checkpoint's files without its list and without hidden files (``.nfs...``)."""
    names = (file.name for file in path.iterdir())
    return sorted(n for n in names if n == METADATA or not (n == COMPLETE or n.startswith(".")))


def damage(path: Path, *, contents: bool) -> str | None:
    """Describe a checkpoint's damage in words; None for an undamaged checkpoint.

    File sizes and the checksum of ``trainer.json`` are always checked, without opening shards. With
    ``contents`` this process reads every byte; ``damage_of_contents`` divides this work over ranks.
    """
    try:
        blocks = listing(path).blocks
    except FileNotFoundError:
        return f"{COMPLETE} is missing: it was never finished"
    except (OSError, ValueError) as error:
        return unreadable(COMPLETE, error)
    ends = {block.name: block.start + block.size for block in blocks}
    unlisted = next((f for f in (FACTS, *_present(path)) if f not in ends), None)
    if unlisted is not None:
        return f"{COMPLETE} does not list {unlisted}"
    for name, size in ends.items():
        try:
            actual = (path / name).lstat().st_size
            if not (path / name).is_file() or (path / name).is_symlink():
                return f"{name} is no file of this folder but a link or a folder"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    checked = [block for block in blocks if contents or block.name == FACTS]
    return next((problem for problem in _check(path, checked) if problem is not None), None)


def damage_of_contents(path: Path, mesh: Mesh) -> str | None:
    """Return the first damage of a checkpoint's contents found by any rank, on all ranks.

    Every rank calls this and reads an equal share of the blocks. Ranks synchronize every few
    seconds, so that a slow disk causes no timeout and all ranks stop after the first damage.
    """
    try:
        steps = _check(path, share(listing(path).blocks, mesh.rank, mesh.world_size))
    except (OSError, ValueError) as error:
        steps = iter([unreadable(COMPLETE, error)])
    while True:
        problem, ended = None, True
        meeting = time.monotonic() + heartbeat_s(mesh)
        for problem in steps:
            if problem is not None or time.monotonic() > meeting:
                ended = False
                break
        answers = mesh.gather_objects((problem, ended))
        problem = next((problem for problem, _ in answers if problem is not None), None)
        if problem is not None or all(ended for _, ended in answers):
            return problem


def share(blocks: list[Block], rank: int, world_size: int) -> list[Block]:
    """Return the blocks that one of ``world_size`` ranks checks: equal bytes, to within a block.

    The blocks of a rank are contiguous, so that with an unchanged layout a rank mostly reads the
    file that it loads next, which is then still in the page cache. For example, of four equal
    blocks and two ranks rank 0 gets the first two.
    """
    total = max(1, sum(block.size for block in blocks))
    mine, before = [], 0
    for block in blocks:
        owner = (2 * before + block.size) * world_size // (2 * total)
        if min(owner, world_size - 1) == rank:
            mine.append(block)
        before += block.size
    return mine


def _check(path: Path, blocks: list[Block]) -> Iterator[str | None]:
    """Read blocks in parts of READ_BYTES; yield None after each part, or a damage in words."""
    for block in blocks:
        for left in reversed(range(TRIES)):
            try:
                crc = yield from _crc(path, block)
            except OSError as error:
                yield f"{block.name} cannot be read: {error.strerror}"
                break
            if crc == block.crc:
                if left < TRIES - 1:
                    say_healed(path / block.name)
                break
            if not left:
                yield f"{block.name} has changed since it was written"
            forget(path / block.name)


def _crc(path: Path, block: Block) -> Generator[None, None, int | None]:
    """Read a block, yielding after each part; return its CRC-32, None if the file is too short."""
    with open(path / block.name, "rb") as file:
        file.seek(block.start)
        crc, left = 0, block.size
        while left and (data := file.read(min(READ_BYTES, left))):
            crc, left = zlib.crc32(data, crc), left - len(data)
            yield None
    return None if left else crc


def say_healed(file: Path) -> None:
    """Log that a file was read incorrectly once, on the rank where this happened."""
    _log.error(
        "checkpoint %s: %s was read wrongly at first, and rightly from the disk; look at what lies "
        "between",
        *(file.parent, file.name),
    )


def forget(file: Path) -> None:
    """Drop a file from the page cache, which may contain the incorrect bytes."""
    with suppress(OSError, AttributeError), open(file, "rb") as opened:  # missing on some systems
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
