"""The write side of Xet, by which newer clients upload large files: chunks in xorbs, and shards that say which
chunks make up which file.

Every file is rebuilt, checked and filed under its sha256 as soon as its shard is here, and its xorbs are dropped:
downloads are plain HTTP, since no answer of ours mentions a Xet hash.
"""

import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import lz4.frame

from .errors import HubError
from .files import Files, Incoming

MAX_XORB, MAX_SHARD = 72 << 20, 64 << 20  # bytes; clients cut both at 64 MiB
# Clients send one shard after all xorbs of an upload, unless it would get larger than MAX_SHARD. A shard under this
# size is the only one, so the xorbs can go with it.
_LAST_SHARD = 32 << 20
_MAX_CHUNK = 1 << 18  # bytes, raw; clients cut at 128 KiB
_MAX_SEGMENTS = 1 << 18  # of a file, some 230 bytes of memory each; clients make far fewer, however large it is
_SHARD_TAG, _END_OF_FILES, _RECORD = b"HFRepoMetaData\0", b"\xff" * 32, 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Segment:
    """Some chunks of a xorb, one after another: from `first` up to, not including, `last`."""

    xorb: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class ShardFile:
    segments: tuple[Segment, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


class XetUploads:
    """Xorbs of uploads under way, in a folder per upload, so that no upload can use (or spoil) another's."""

    def __init__(self, root: Path, files: Files, *, max_file_bytes: int) -> None:
        self._root, self._files, self._max_file = root / "xorbs", files, max_file_bytes
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()

    def add_xorb(self, session: str, name: str, received: Incoming) -> bool:
        """Take a received xorb in; False where it was here already.

        Raises:
            HubError: 400, it is no xorb.
        """
        with received.reopen() as file:
            _check_chunks(file, received.size)
        target = self._root / session / name
        is_new = not target.exists()
        target.parent.mkdir(exist_ok=True)
        received.move(target)
        return is_new

    def ingest(self, session: str, shard: Incoming, is_held: Callable[[str], bool]) -> list[str]:
        """Rebuild all files of a shard.

        Args:
            is_held: whether the caller has the content of a hash already, as after an answer that got lost.

        Returns:
            the sha256 of each file.

        Raises:
            HubError: 400, the shard is malformed, names xorbs that are not here, or a file is not what it says.
        """
        with shard.reopen() as file:
            hashes = [self._rebuild(session, described, is_held) for described in _shard_files(file)]
        if shard.size < _LAST_SHARD:
            shutil.rmtree(self._root / session, ignore_errors=True)
        return hashes

    def sweep(self, seconds: float) -> None:
        """Drop uploads that nothing was added to for so long."""
        before = time.time() - seconds
        for folder in self._root.iterdir():
            if folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)

    def _rebuild(self, session: str, file: ShardFile, is_held: Callable[[str], bool]) -> str:
        if file.size > self._max_file:
            raise HubError(413, f"A file of {file.size} bytes is larger than this hub takes ({self._max_file}).")
        if file.sha256 is not None and is_held(file.sha256):
            return file.sha256
        with self._files.receive() as incoming:
            for segment in file.segments:
                self._copy(self._root / session / segment.xorb, segment, incoming)
            return incoming.keep(sha256=file.sha256)

    def _copy(self, xorb: Path, segment: Segment, to: Incoming) -> None:
        before = to.size
        try:
            with xorb.open("rb") as file:
                for scheme, size, data in _chunks(file, segment.first, segment.last):
                    if to.size - before + size > segment.size:
                        raise HubError(400, f"A segment of xorb {segment.xorb} has more than {segment.size} bytes.")
                    to.write(_unpack(scheme, size, data))
        except FileNotFoundError:
            raise HubError(400, f"The shard names the xorb {segment.xorb}, which was not uploaded with it.") from None
        if to.size - before != segment.size:
            raise HubError(400, f"A segment of xorb {segment.xorb} has {to.size - before} bytes, not {segment.size}.")


def _chunks(file: BinaryIO, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Compression scheme, raw size and packed bytes of the chunks of a xorb, up to its footer or to `last`."""
    index = 0
    while last is None or index < last:
        head = file.read(8)
        if len(head) < 8 or head.startswith(b"XETBLOB"):
            return
        packed, raw = int.from_bytes(head[1:4], "little"), int.from_bytes(head[5:8], "little")
        if head[0] != 0 or raw > _MAX_CHUNK or packed > _MAX_CHUNK:
            raise HubError(400, f"Malformed xorb: chunk {index} has a header that no chunk has.")
        if index < first:
            file.seek(packed, os.SEEK_CUR)
        else:
            data = file.read(packed)
            if len(data) != packed:
                raise HubError(400, f"Malformed xorb: chunk {index} is cut short.")
            yield head[4], raw, data
        index += 1


def _check_chunks(file: BinaryIO, size: int) -> None:
    """Raises:
    HubError: 400, the last chunk ends after the file does.
    """
    for _ in _chunks(file, first=sys.maxsize):
        pass
    if file.tell() > size:
        raise HubError(400, "Malformed xorb: its last chunk is cut short.")


def _unpack(scheme: int, size: int, data: bytes) -> bytes:
    """The raw bytes of a chunk: plain (0), LZ4 (1), or LZ4 of its bytes sorted by their position modulo 4 (2)."""
    if scheme == 0:
        raw = data
    elif scheme in (1, 2):
        raw = _unpack_lz4(data, size)
    else:
        raise HubError(400, f"Unknown chunk compression {scheme}: this hub knows none, LZ4 and grouped LZ4.")
    if len(raw) != size:
        raise HubError(400, f"A chunk has {len(raw)} bytes, not {size}.")
    return _ungroup(raw) if scheme == 2 else raw


def _unpack_lz4(data: bytes, size: int) -> bytes:
    try:
        return lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1)
    except RuntimeError as error:
        raise HubError(400, f"Malformed chunk: {error}") from None


def _ungroup(raw: bytes) -> bytes:
    result, at = bytearray(len(raw)), 0
    for position in range(4):
        count = len(range(position, len(raw), 4))
        result[position::4] = raw[at : at + count]
        at += count
    return bytes(result)


def _shard_files(file: BinaryIO) -> Iterator[ShardFile]:
    """The files that a shard describes. Its other half, what is in the xorbs, is not needed."""
    if not file.read(_RECORD).startswith(_SHARD_TAG):
        raise HubError(400, "Malformed shard: it does not start as one.")
    while not (head := _record(file)).startswith(_END_OF_FILES):
        flags, count = struct.unpack_from("<II", head, 32)
        if count > _MAX_SEGMENTS:
            raise HubError(413, f"A file in {count} segments: this hub takes {_MAX_SEGMENTS}.")
        segments = tuple(_segment(_record(file)) for _ in range(count))
        if flags & _HAS_VERIFICATION:
            file.seek(_RECORD * count, os.SEEK_CUR)
        yield ShardFile(segments, _hash(_record(file)) if flags & _HAS_SHA256 else None)


def _segment(record: bytes) -> Segment:
    _, size, first, last = struct.unpack_from("<IIII", record, 32)
    return Segment(_hash(record), size, first, last)


def _record(file: BinaryIO) -> bytes:
    record = file.read(_RECORD)
    if len(record) != _RECORD:
        raise HubError(400, "Malformed shard: it is cut short.")
    return record


def _hash(record: bytes) -> str:
    """A hash as the API writes it: four little-endian words in hex."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", record))
