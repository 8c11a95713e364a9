"""The tensors of a file that ``torch.save`` wrote: names, dtypes, shapes, and where they lie.

A file is a zip archive with a pickle (``data.pkl``), which says what the tensors are, and a record
for every storage, which tensors are views of. Tensors that share bytes are tensors of their own
here. Of a trainer's file the dictionary under ``state_dict``, ``model`` or ``module`` is read, if
nothing else in it has tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from della_dist.errors import InputError
from della_dist.specs.checkpoint import Strided, TensorEntry
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.strides import reach
from della_dist.storage.strict_json import paused_gc
from della_dist.storage.torch_files.archive import Archive, Read, read_archive
from della_dist.storage.torch_files.machine import MAX_PICKLE_BYTES, read_pickle
from della_dist.storage.torch_files.records import (
    DTYPES,
    STORAGES,
    UNTYPED,
    Name,
    Table,
    View,
    kind_of,
    shown,
)

#: Of a tensor, in torch.
_MAX_AXES = 64
_MAX_I64 = (1 << 63) - 1
#: Where trainers keep the state dictionary of the model.
WRAPPERS = ("state_dict", "model", "module")
_HEAD_BYTES = 512
_LFS_POINTER = b"version https://git-lfs"
#: How the formats begin that torch wrote before version 1.6.
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TAR = slice(257, 262)
_CONVERT = (
    "where you trust its source, convert it: load it with transformers and save_pretrained it, "
    "which writes safetensors."
)


@dataclass(frozen=True, slots=True)
class TorchTable:
    """What one file says."""

    tensors: tuple[TensorEntry, ...]
    """In the order of their data; `start` and `stop` count from the beginning of the file."""
    sha256: str
    """Hexadecimal digest of the pickle and of the archive's directory."""


def parse_torch_file(
    read: Read, size_bytes: int, *, where: str, shard: int = 0, requests: int = 1
) -> TorchTable:
    """Read and validate the table of tensors of a file of ``torch.save``; no data is read.

    Nothing in the file is run or imported, whatever it holds.

    Parameters
    ----------
    read : callable
        ``read(start, stop)`` returns exactly those bytes of the file.
    size_bytes : int
        Size of the file.
    where : str
        Name of the file, for messages.
    shard : int
        Goes into the `TensorEntry.shard` of every tensor.
    requests : int
        Calls of `read` at once.

    Raises
    ------
    InputError
        If the file is of another format, is damaged, or holds anything but a dictionary of tensors.
        One paragraph: file, what is wrong, what to do.
    """
    _refuse_other_formats(read(0, min(size_bytes, _HEAD_BYTES)), where)
    try:
        with paused_gc():
            archive = read_archive(read, size_bytes)
            root = _root(archive)
            _refuse_byte_order(archive, read, root)
            pickle = _pickle(archive, read, root)
            views = _state(read_pickle(pickle))
            ranges = _ranges(archive, read, root, views.values(), requests)
            tensors = [
                _entry(name, view, ranges[view.storage.key], shard) for name, view in views.items()
            ]
    except ValueError as error:
        raise InputError(
            f"{where} is not read: {error}. Of files of torch.save only whole, plain dictionaries "
            f"of tensors are, and nothing in them is ever run. Download it again, or, {_CONVERT}"
        ) from error
    digest = hashlib.sha256(archive.directory)
    digest.update(pickle)
    ordered = sorted(tensors, key=lambda entry: (entry.start, entry.stop))
    return TorchTable(tuple(ordered), digest.hexdigest())


def _refuse_other_formats(head: bytes, where: str) -> None:
    if head.startswith(b"PK\3\4"):
        return
    if head.startswith(_LFS_POINTER):
        raise InputError(
            f"{where} holds no weights but a pointer of git-lfs to them. Run 'git lfs pull' in the "
            "checkpoint, or download it with 'hf download'."
        )
    if _LEGACY in head[:32] or head[_TAR] == b"ustar":
        raise InputError(
            f"{where} is in a format that torch wrote before version 1.6, which cannot be read "
            f"without running what is in it; {_CONVERT}"
        )
    raise InputError(
        f"{where} is no file of torch.save (a zip archive): it was cut short, is damaged, or is in "
        f"another format. Download it again, or, {_CONVERT}"
    )


def _root(archive: Archive) -> str:
    """Return the folder of all records, as part of their names."""
    found = [name for name in archive.records if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise ValueError(f"it is a zip archive with {len(found)} data.pkl, and should have one")
    root = found[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.records:
        raise ValueError("it is a program (TorchScript), not a dictionary of tensors")
    return root


def _refuse_byte_order(archive: Archive, read: Read, root: str) -> None:
    record = archive.records.get(f"{root}byteorder")
    if record is None:
        return
    start, stop = archive.data_range(read, record)
    order = read(start, min(stop, start + 16))
    if order != b"little":
        raise ValueError(f"its numbers have the byte order {order.decode('ascii', 'replace')!r}")


def _pickle(archive: Archive, read: Read, root: str) -> bytes:
    record = archive.records[f"{root}data.pkl"]
    if record.size_bytes > MAX_PICKLE_BYTES:
        raise ValueError(
            f"its data.pkl has {record.size_bytes} bytes, more than the {MAX_PICKLE_BYTES} that a "
            "table of tensors may have"
        )
    return read(*archive.data_range(read, record))


def _state(content: object) -> dict[str, View]:
    """Return the tensors of a state dictionary, which may be one entry of a trainer's."""
    entries = _named(content)
    if not any(isinstance(value, View) for value in entries.values()):
        wrapped = [key for key in WRAPPERS if isinstance(entries.get(key), Table)]
        if len(wrapped) == 1:
            (key,) = wrapped
            _refuse_tensors_beside(key, entries)
            entries = _named(entries[key])
    found = {}
    for name, value in entries.items():
        if not isinstance(value, View):
            raise ValueError(  # noqa: TRY004 - the file is wrong
                f"its entry {shown(name)!r} is {kind_of(value)}, not a tensor"
            )
        found[sys.intern(name)] = value
    return found


def _named(content: object) -> dict[str, object]:
    if not isinstance(content, Table):
        raise ValueError(f"it holds {kind_of(content)}, not a dictionary of tensors")  # noqa: TRY004
    found: dict[str, object] = {}
    for name, value in content.pairs:
        if not isinstance(name, str):
            raise ValueError(f"one of its entries is called by {kind_of(name)}")  # noqa: TRY004
        if name == "__metadata__":
            raise ValueError(f"one of its entries is called {name}, as no tensor can be")
        if name in found:
            raise ValueError(f"its entry {shown(name)!r} is there twice")
        found[name] = value
    return found


def _refuse_tensors_beside(key: str, entries: Mapping[str, object]) -> None:
    """Refuse tensors outside of the one dictionary that is read."""
    seen: set[int] = set()
    for name, value in entries.items():
        pending = [] if name == key else [value]
        while pending:
            item = pending.pop()
            if isinstance(item, View):
                raise ValueError(  # noqa: TRY004
                    f"it holds tensors under {shown(name)!r} beside those under {key!r}: which of "
                    "them are the model is not known"
                )
            if isinstance(item, Table | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                pending += item if not isinstance(item, Table) else [v for _, v in item.pairs]


def _ranges(
    archive: Archive, read: Read, root: str, views: Iterable[View], requests: int
) -> dict[str, tuple[int, int]]:
    """Return first and last byte of every storage that is viewed, by its key."""
    kinds: dict[str, tuple[Name, int]] = {}
    for view in views:
        kind = view.storage.kind, view.storage.num_elements
        if kinds.setdefault(view.storage.key, kind) != kind:
            raise ValueError(f"its record data/{shown(view.storage.key)} is of two kinds")
    keys = list(kinds)

    def place(key: str) -> tuple[int, int]:
        record = archive.records.get(f"{root}data/{key}")
        if record is None:
            raise ValueError(f"it has no record data/{shown(key)}, in which a tensor should lie")
        return archive.data_range(read, record)

    if requests == 1:
        return {key: place(key) for key in keys}
    with ThreadPoolExecutor(requests) as pool:
        return dict(zip(keys, pool.map(place, keys), strict=True))


def _entry(name: str, view: View, place: tuple[int, int], shard: int) -> TensorEntry:
    """Return what is known of one tensor."""
    try:
        return _placed(name, view, place, shard)
    except ValueError as error:
        raise ValueError(f"its tensor {shown(name)!r} {error}") from None


def _placed(name: str, view: View, place: tuple[int, int], shard: int) -> TensorEntry:
    storage, (first, last) = view.storage, place
    is_untyped = str(storage.kind) in UNTYPED
    stored = "U8" if is_untyped else STORAGES.get(str(storage.kind))
    dtype = stored if view.dtype is None else DTYPES.get(str(view.dtype))
    if stored is None or dtype is None or (view.dtype is not None and not is_untyped):
        raise ValueError(f"has numbers of the kind {view.dtype or storage.kind}")
    if storage.num_elements * itemsize(stored) != last - first:
        raise ValueError(
            f"lies in a storage of {storage.num_elements} {stored}, whose record has "
            f"{last - first} bytes"
        )
    shape, strides = _numbers(view.shape), _numbers(view.strides)
    (offset,) = _numbers((view.offset,))
    if len(shape) != len(strides):
        raise ValueError(f"has {len(shape)} axes and {len(strides)} strides")
    size = itemsize(dtype)
    count = num_elements(shape)
    if count * size > _MAX_I64:
        raise ValueError("has more elements than any file")
    begin = end = first
    if count:
        begin += offset * size
        end = begin + reach(shape, strides) * size
    if end > last:
        raise ValueError(
            f"has elements up to byte {end - first} of a storage of {last - first} bytes"
        )
    is_plain = not count or _is_row_major(shape, strides)
    strided = None if is_plain else Strided(shape, strides)
    return TensorEntry(name, dtype, shape, shard, begin, end, strided)


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether the elements of a tensor follow each other without a gap."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def _numbers(value: object) -> tuple[int, ...]:
    """Return a shape, strides or an offset, if it is one."""
    if not isinstance(value, tuple | list) or len(value) > _MAX_AXES:
        raise ValueError(f"has a shape or strides that are {kind_of(value)}")
    if not all(type(n) is int and 0 <= n <= _MAX_I64 for n in value):
        raise ValueError("has a shape, strides or an offset that are no whole numbers from 0 on")
    return tuple(value)
