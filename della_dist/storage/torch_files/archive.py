"""The zip archives that ``torch.save`` writes: which bytes of the file each record is.

Records are stored as they are, so that a record is a range of the file. Whatever else a zip archive
can be (encrypted, with records over each other or outside of it, in several pieces) is refused, and
so is a record that is compressed, once it is needed.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Read = Callable[[int, int], bytes]
"""Returns exactly those bytes of a file."""

#: A record takes about 80 bytes of it.
MAX_DIRECTORY_BYTES = 64 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ZIP64_EXTRA = 1
_IN_ZIP64 = 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_FOLDER = 1 << 4
_AGAIN = "it was cut short, or is damaged"


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the directory."""

    name: str
    size_bytes: int
    """In the file."""
    header: int
    """Where its own header begins, before its data."""
    problem: str
    """Why its bytes are not in the file as they are; empty if they are."""


@dataclass(frozen=True, slots=True)
class Archive:
    """The directory of an archive."""

    records: Mapping[str, Record]
    directory: bytes
    """As it lies in the file."""
    directory_start: int
    _headers: tuple[int, ...]
    """Where records begin, ascending."""

    def data_range(self, read: Read, record: Record) -> tuple[int, int]:
        """Return the first byte of a record's data, and one past the last.

        Raises
        ------
        ValueError
            If the record is compressed or encrypted, or its own header does not fit the directory.
        """
        if record.problem:
            raise ValueError(f"its record {record.name!r} is {record.problem}")
        name = record.name.encode()
        head_stop = record.header + _LOCAL.size + len(name)
        after = bisect_right(self._headers, record.header)
        limit = self._headers[after] if after < len(self._headers) else self.directory_start
        if head_stop > limit:
            raise ValueError(f"its record {record.name!r} lies over another")
        head = read(record.header, head_stop)
        signature, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack_from(head)
        if signature != b"PK\3\4" or head[_LOCAL.size :] != name or name_length != len(name):
            raise ValueError(f"its record {record.name!r} is not where its directory says")
        if problem := _problem(flags, method):
            raise ValueError(f"its record {record.name!r} is {problem}")
        start = head_stop + extra_length
        if start + record.size_bytes > limit:
            raise ValueError(f"its record {record.name!r} lies over another")
        return start, start + record.size_bytes


def read_archive(read: Read, size_bytes: int) -> Archive:
    """Return the directory of a zip archive of `size_bytes`.

    Raises
    ------
    ValueError
        If it has none, or one that ``torch.save`` does not write: what is wrong with it.
    """
    count, start, stop = _directory_place(read, size_bytes)
    if stop - start > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory has {stop - start} bytes, more than any model's")
    directory = read(start, stop)
    records: dict[str, Record] = {}
    position = 0
    while position < len(directory):
        record, position = _record(directory, position)
        if record.name in records:
            raise ValueError(f"its record {record.name!r} is there twice")
        if record.header + _LOCAL.size + record.size_bytes > start:
            raise ValueError(f"its record {record.name!r} lies outside of the file")
        records[record.name] = record
    if len(records) != count:
        raise ValueError(f"its directory has {len(records)} records and should have {count}")
    headers = tuple(sorted(record.header for record in records.values()))
    return Archive(records, directory, start, headers)


def _directory_place(read: Read, size_bytes: int) -> tuple[int, int, int]:
    """Return how many records the directory has, where it begins and where it ends."""
    tail_start = max(0, size_bytes - _END.size - _END64_LOCATOR.size - _END64.size)
    tail = read(tail_start, size_bytes)
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise ValueError(f"it does not end as a zip archive does: {_AGAIN}")
    _, disk, first_disk, here, count, directory_bytes, start, comment = _END.unpack(end)
    stop = size_bytes - _END.size
    locator = tail[: -_END.size][-_END64_LOCATOR.size :]
    if locator.startswith(b"PK\6\7"):
        _, _, position, disks = _END64_LOCATOR.unpack(locator)
        stop -= _END64_LOCATOR.size + _END64.size
        wide = tail[: _END64.size]
        if position != stop or stop != tail_start or disks > 1 or not wide.startswith(b"PK\6\6"):
            raise ValueError(f"the end of its zip archive is not where it should be: {_AGAIN}")
        _, _, _, _, disk, first_disk, here, count, directory_bytes, start = _END64.unpack(wide)
    if comment or disk or first_disk or here != count:
        raise ValueError("it is a zip archive in several pieces, or with a comment")
    if start + directory_bytes != stop:
        raise ValueError(f"the directory of its zip archive is not where it should be: {_AGAIN}")
    return count, start, stop


def _record(directory: bytes, position: int) -> tuple[Record, int]:
    """Return the record at a position of the directory, and the position of the next."""
    names = position + _CENTRAL.size
    if names > len(directory) or not directory.startswith(b"PK\1\2", position):
        raise ValueError(f"its directory is wrong at byte {position}: {_AGAIN}")
    found = _CENTRAL.unpack_from(directory, position)
    flags, method, stored, size, name_length, extra_length, comment_length, disk = (
        *(found[3], found[4], found[8], found[9], found[10], found[11], found[12], found[13]),
    )
    extras = names + name_length
    stop = extras + extra_length + comment_length
    if stop > len(directory):
        raise ValueError(f"its directory is wrong at byte {position}: {_AGAIN}")
    name = _checked_name(directory[names:extras])
    problem = _problem(flags, method)
    if found[15] & _FOLDER:  # torch returns memory that was never set for such a record
        problem = problem or "marked as a folder"
    extra = directory[extras : extras + extra_length]
    size, stored, header = _wide(name, extra, (size, stored, found[16]))
    if disk or (stored != size and not problem):
        raise ValueError(f"its record {name!r} has {stored} bytes and says that it has {size}")
    return Record(name, stored, header, problem), stop


def _problem(flags: int, method: int) -> str:
    if flags & _ENCRYPTED:
        return "encrypted"
    return "compressed, which torch.save never does" if method else ""


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name of its record {raw[:100]!r} is not UTF-8") from None
    parts = name.removesuffix("/").replace("\\", "/").split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"its record {name[:100]!r} has a name that leads out of the archive")
    return name


def _wide(name: str, extra: bytes, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return size, stored size and offset, those that need it from the field of 64 bits."""
    needed = sum(size == _IN_ZIP64 for size in sizes)
    if not needed:
        return sizes
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == _ZIP64_EXTRA and len(field) >= 8 * needed:
            found = iter(struct.unpack_from(f"<{needed}Q", field))
            size, stored, header = (next(found) if s == _IN_ZIP64 else s for s in sizes)
            return size, stored, header
    raise ValueError(f"its record {name!r} has no size of 64 bits where one is needed")
