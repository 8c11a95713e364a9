"""Whatever is done to a file of torch.save: torch's own tensors come out, or one clear error."""

from __future__ import annotations

import io
import zipfile
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from della_dist.errors import InputError
from della_dist.specs.checkpoint import Strided, TensorEntry
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.storage.strided import gather
from della_dist.storage.torch_files.tensors import parse_torch_file
from tests.torch_files import archive_of, opcode_tensor, opcode_text, raw_bytes, state_of

MUTATED = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def parsed(data: bytes) -> dict[str, TensorEntry]:
    """Return the tensors that we see, checking that nothing but these bytes is read."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(data)
        return data[start:stop]

    table = parse_torch_file(read, len(data), where="m.bin")
    for entry in table.tensors:
        assert 0 <= entry.start <= entry.stop <= len(data)
    return {entry.name: entry for entry in table.tensors}


def bytes_of(data: bytes, entry: TensorEntry) -> bytes:
    if entry.strided is None:
        return data[entry.start : entry.stop]
    view = memoryview(data)[entry.start : entry.stop]
    size = itemsize(entry.dtype)
    return gather(
        entry.strided, size, 0, num_elements(entry.shape), lambda a, b: view[a:b]
    ).tobytes()


def loaded(data: bytes) -> dict[str, Any] | None:
    """Return what torch itself loads, if it does and if it is a dictionary of tensors."""
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        return None
    return content if isinstance(content, dict) else None


def check(data: bytes) -> bool:
    """Check one file; return whether it was read."""
    try:
        entries = parsed(data)
    except InputError:
        return False
    if max((num_elements(e.shape) for e in entries.values()), default=0) > 1 << 20:
        return True  # repeated without end: no more numbers than those are compared
    ours = {name: bytes_of(data, entry) for name, entry in entries.items()}
    theirs = loaded(data)
    if theirs is None:
        return True
    for key in ("state_dict", "model", "module"):
        if isinstance(theirs.get(key), dict):
            theirs = theirs[key]
            break
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == entries[name].shape
        assert raw_bytes(tensor) == ours[name]
    return True


@cache
def sound_file(protocol: int) -> bytes:
    """Return a file with tensors of several kinds."""
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    content = {
        "plain": base,
        "part": base[1:3, 2:5],
        "turned": base.t(),
        "half": torch.arange(6).bfloat16(),
        "many": torch.nn.Parameter(torch.ones(3)),
        "counter": torch.tensor(7),
    }
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return file.getvalue()


def test_sound_files_are_read() -> None:
    for protocol in (2, 3, 4, 5):
        assert check(sound_file(protocol))


@MUTATED
@given(
    protocol=st.sampled_from([2, 4]),
    position=st.integers(0, 1 << 20),
    value=st.integers(0, 255),
    more=st.binary(max_size=6),
)
def test_bytes_that_change_anywhere(protocol: int, position: int, value: int, more: bytes) -> None:
    data = bytearray(sound_file(protocol))
    at = position % len(data)
    changed = bytes([value]) + more
    data[at : at + len(changed)] = changed[: len(data) - at]
    check(bytes(data))


def with_pickle(pickled: bytes) -> bytes:
    """Return a sound archive whose pickle is another one, and whose checksums are right."""
    with zipfile.ZipFile(io.BytesIO(sound_file(2))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            content = pickled if name.endswith("/data.pkl") else data
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


@cache
def sound_pickle(protocol: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(sound_file(protocol))) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


@MUTATED
@given(
    protocol=st.sampled_from([2, 4]),
    edits=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.integers(0, 3), st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    ),
)
def test_pickles_that_change_anywhere(protocol: int, edits: list[tuple[int, int, bytes]]) -> None:
    data = sound_pickle(protocol)
    for position, removed, put in edits:
        at = position % len(data)
        data = data[:at] + put + data[at + removed :]
    check(with_pickle(data))


INSTRUCTIONS = st.one_of(
    st.sampled_from(
        [
            *(b"]", b"}", b")", b"(", b"N", b"\x88", b"0", b"1", b"2", b"a", b"e", b"s", b"u"),
            *(b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"\x81", b"\x93", b"\x94"),
            *(b"q\0", b"q\1", b"h\0", b"h\1", b"K\0", b"K\1", b"J\xff\xff\xff\xff"),
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch._utils\n_rebuild_parameter\n",
            b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"ccollections\nOrderedDict\n",
            b"ctorch\nFloatStorage\n",
            b"ctorch\nSize\n",
            b"cos\nsystem\n",
            opcode_text("storage"),
            opcode_text("_metadata"),
            opcode_text("model"),
            opcode_tensor(),
            opcode_tensor((1, 2), (5, 1)),
        ]
    ),
    st.binary(min_size=1, max_size=3),
)


@MUTATED
@given(st.lists(INSTRUCTIONS, max_size=30))
def test_programs_of_any_instructions(instructions: list[bytes]) -> None:
    check(archive_of(b"\x80\x02" + b"".join(instructions) + b"."))
    check(archive_of(state_of(b"".join(instructions))))


@st.composite
def views(draw: st.DrawFn, least_axes: int = 0) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return a shape, strides and an offset that may not fit a storage of 64 numbers."""
    axes = draw(st.integers(least_axes, 4))
    shape = tuple(draw(st.integers(0, 6)) for _ in range(axes))
    strides = tuple(draw(st.sampled_from([0, 1, 2, 3, 6, 7, 36, 1 << 60])) for _ in range(axes))
    return shape, strides, draw(st.integers(0, 66))


@MUTATED
@given(views())
def test_views_as_torch_sees_them(view: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    shape, strides, offset = view
    numbers = torch.arange(64, dtype=torch.float32)
    pickled = state_of(opcode_tensor(shape, strides, offset, key="x", num_elements=64))
    data = archive_of(pickled, more={"data/x": raw_bytes(numbers)})
    fits = num_elements(shape) == 0 or (
        offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < 64
    )
    assert check(data) == fits
    if fits:
        expected = torch.as_strided(numbers, shape, strides, offset) if all(shape) else None
        assert bytes_of(data, parsed(data)["a"]) == (
            b"" if expected is None else raw_bytes(expected)
        )


@MUTATED
@given(view=views(least_axes=1), data=st.data())
def test_any_part_of_a_view(
    view: tuple[tuple[int, ...], tuple[int, ...], int], data: st.DataObject
) -> None:
    """Blocks in pieces of any size are the blocks of the whole."""
    shape, strides = view[0], tuple(min(s, 40) for s in view[1])
    count = num_elements(shape)
    numbers = torch.arange(1000, dtype=torch.int16)
    whole = raw_bytes(torch.as_strided(numbers, shape, strides)) if count else b""
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    piece_bytes = data.draw(st.sampled_from([2, 6, 50, 1 << 20]))
    raw = raw_bytes(numbers)
    held: list[tuple[int, int]] = []

    def read(first: int, last: int) -> bytes:
        assert 0 < last - first <= piece_bytes
        assert not held
        held.append((first, last))
        return raw[first:last]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("della_dist.storage.strided.PIECE_BYTES", piece_bytes)
        got = gather(
            Strided(shape, strides),
            2,
            start,
            stop,
            read,
            lambda first, last: held.remove((first, last)),
        )
    assert got.tobytes() == whole[2 * start : 2 * stop]
    assert not held
