"""Files of torch.save: the tensors that torch itself would load, and nothing run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from della_dist.errors import InputError
from della_dist.ops.tensor import merge_tensor
from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.storage.opening import open_store
from della_dist.storage.shard_headers import open_shard
from della_dist.storage.strided import gather
from della_dist.storage.torch_files import machine
from della_dist.storage.torch_files.machine import read_pickle
from tests.tensors import from_raw, recipe_of
from tests.torch_files import (
    archive_of,
    opcode_ints,
    opcode_tensor,
    opcode_text,
    raw_bytes,
    state_of,
)

MIB = 1 << 20


def table(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file."""
    shard, entries = open_shard(open_store(str(path.parent)), path.name)
    assert shard.size_bytes == path.stat().st_size
    return {entry.name: entry for entry in entries}


def bytes_of(path: Path, entry: TensorEntry) -> bytes:
    """Return the bytes of a tensor, read as the engine reads them."""
    data = path.read_bytes()
    if entry.strided is None:
        return data[entry.start : entry.stop]

    def read(first: int, last: int) -> bytes:
        assert entry.start + last <= entry.stop
        return data[entry.start + first : entry.start + last]

    count = num_elements(entry.shape)
    return gather(entry.strided, itemsize(entry.dtype), 0, count, read).tobytes()


def assert_as_torch(path: Path, content: dict[str, Any] | None = None) -> dict[str, TensorEntry]:
    """Check a file against what torch loads, or what was saved where torch would not."""
    if content is None:
        content = torch.load(path, weights_only=True)
    entries = table(path)
    assert set(entries) == set(content)
    for name, tensor in content.items():
        assert entries[name].shape == tuple(tensor.shape), name
        assert bytes_of(path, entries[name]) == raw_bytes(tensor), name
    return entries


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        table(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def many_kinds() -> dict[str, Any]:
    base = torch.arange(3 * 40 * 7, dtype=torch.float32).reshape(3, 40, 7)
    return {
        "plain": torch.randn(5, 9),
        "bf16": torch.randn(7, 3).bfloat16(),
        "f16": torch.randn(2, 2).half(),
        "f64": torch.randn(3, dtype=torch.float64),
        "i64": torch.arange(5),
        "i32": torch.arange(6, dtype=torch.int32),
        "i16": torch.arange(6, dtype=torch.int16),
        "i8": torch.arange(3, dtype=torch.int8),
        "u8": torch.arange(3, dtype=torch.uint8),
        "u32": torch.ones(3, dtype=torch.uint32),
        "bool": torch.tensor([True, False, True]),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 5),
        "empty.inside": torch.zeros(3, 0, 2).transpose(0, 2),
        "one": torch.zeros(1, 1, 1).expand(1, 1, 1),
        "parameter": torch.nn.Parameter(torch.randn(4, 2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "shared": base,
        "same": base,
        "second": base[1],
        "rows": base[0, 10:20],
        "columns": base[:, :, 2:5],
        "transposed": base[0].t(),
        "permuted": base.permute(2, 0, 1),
        "strided": base[::2, ::3, ::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 6),
        "repeated": torch.tensor(3.0).expand(4, 4),
        "unfolded": torch.arange(10.0).unfold(0, 4, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_tensor(tmp_path: Path, protocol: int) -> None:
    content = many_kinds()
    torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    entries = assert_as_torch(tmp_path / "pytorch_model.bin", content)
    dtypes = {name: entries[name].dtype for name in ("bf16", "f64", "u32", "bool", "fp8", "scalar")}
    assert [*dtypes.values()] == ["BF16", "F64", "U32", "BOOL", "F8_E4M3", "F32"]
    gathered = {name for name, entry in entries.items() if entry.strided is not None}
    assert gathered == {
        *("columns", "transposed", "permuted", "strided", "expanded", "repeated", "unfolded"),
        "channels_last",
    }
    assert entries["shared"].place == entries["same"].place
    assert entries["shared"].place != entries["transposed"].place


def test_a_square_and_its_transpose_are_no_twins(tmp_path: Path) -> None:
    square = torch.randn(6, 6)
    torch.save({"a": square, "b": square.t()}, tmp_path / "m.pt")
    entries = assert_as_torch(tmp_path / "m.pt")
    assert entries["a"].start == entries["b"].start
    assert entries["a"].place != entries["b"].place


def test_modules(tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7), torch.nn.BatchNorm1d(7)
    )
    module[1].weight = module[0].weight  # tied
    path = tmp_path / "pytorch_model.bin"
    torch.save(module.state_dict(), path)
    entries = assert_as_torch(path)
    assert entries["0.weight"].place == entries["1.weight"].place
    torch.save(OrderedDict(module.named_parameters()), path)
    assert_as_torch(path)
    with_state = torch.nn.Parameter(torch.ones(2))
    with_state.note = "an attribute"
    tensor = torch.ones(3)
    tensor.note = "another"
    torch.save({"a": with_state, "b": tensor}, path)
    assert_as_torch(path)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_trainers_file(tmp_path: Path, key: str) -> None:
    path = tmp_path / "model.pt"
    state = torch.nn.Linear(3, 4).state_dict()
    torch.save({"epoch": 3, "best": None, key: state, "arguments": {"lr": [0.1, 1]}}, path)
    entries = table(path)
    assert set(entries) == {"weight", "bias"}
    assert bytes_of(path, entries["weight"]) == raw_bytes(state["weight"])
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}}
    torch.save({key: state, "optimizer": optimizer}, path)
    assert "tensors under 'optimizer' beside those under" in refusal(path)
    torch.save({key: {"inner": state}}, path)
    assert "entry 'inner' is a dictionary" in refusal(path)
    torch.save({"other": state}, path)
    assert "entry 'other' is a dictionary" in refusal(path)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a module": (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "a list": (lambda: [torch.ones(2)], "holds a list, not a dictionary"),
    "one tensor": (lambda: torch.ones(2), "holds a tensor, not a dictionary"),
    "a number": (lambda: {"a": torch.ones(2), "step": 3}, "entry 'step' is a int"),
    "text": (lambda: {"a": torch.ones(2), "note": "b"}, "entry 'note' is text"),
    "nothing": (lambda: {"a": torch.ones(2), "b": None}, "entry 'b' is None"),
    "numbers as names": (lambda: {1: torch.ones(2)}, "is called by a int"),
    "a reserved name": (lambda: {"__metadata__": torch.ones(2)}, "called __metadata__"),
    "complex": (lambda: {"a": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    "quantised": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        "torch._utils._rebuild_qtensor",
    ),
    "sparse": (
        lambda: {"a": torch.sparse_coo_tensor([[0]], [1.0], (3,))},
        "torch._utils._rebuild_sparse_tensor",
    ),
    "negated": (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "negated"),
    "an array": (lambda: {"a": np.ones(2)}, "numpy"),
    "a path": (lambda: {"a": torch.ones(2), "b": Path("x")}, "pathlib"),
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("what", REFUSED)
def test_other_contents_are_refused(tmp_path: Path, what: str) -> None:
    content, words = REFUSED[what]
    torch.save(content(), tmp_path / "m.bin")
    assert words in refusal(tmp_path / "m.bin")


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "before version 1.6" in refusal(path)
    assert "save_pretrained" in refusal(path)
    path.write_bytes(bytes(257) + b"ustar" + bytes(300))
    assert "before version 1.6" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(path)
    for data in (b"", b"P", b"<html>", pickle.dumps({"a": 1}), bytes(1000)):
        path.write_bytes(data)
        assert "no file of torch.save" in refusal(path)


@pytest.mark.filterwarnings("ignore:.*")
def test_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    assert "TorchScript" in refusal(tmp_path / "m.pt")


def test_the_digest_tells_tables_apart(tmp_path: Path) -> None:
    digests = set()
    for content in (
        {"a": torch.ones(2)},
        {"b": torch.ones(2)},
        {"a": torch.ones(3)},
        {"a": torch.ones(2).half()},
    ):
        torch.save(content, tmp_path / "m.bin")
        digests.add(open_shard(open_store(str(tmp_path)), "m.bin")[0].header_sha256)
    assert len(digests) == 4


@pytest.mark.parametrize("shift", range(1, 9))
def test_numbers_that_are_not_aligned(tmp_path: Path, shift: int) -> None:
    """An archive need not pad its records, as torch does."""
    path = tmp_path / "m.bin"
    path.write_bytes(archive_of(state_of(opcode_tensor()), root="r" * shift))
    data = bytearray(path.read_bytes())
    entry = table(path)["a"]
    data[entry.start : entry.stop] = struct.pack("<2f", 1.5, -2.0)
    path.write_bytes(data)
    with open_store(str(tmp_path)).open_reader("m.bin") as reader:
        view = reader.view(entry.start, entry.stop)
        assert view.ctypes.data % 8 == entry.start % 8
        recipe = recipe_of((2,), base=None, experts=("F32",), drop="none", elect=False)
        for backend in ("numba", "torch"):
            merged, _ = merge_tensor(recipe, None, [view], backend=backend)
            assert from_raw(merged, "F32").tolist() == [1.5, -2.0]


def touch(path: Path) -> bytes:
    """Return the instructions of a pickle that makes a file."""
    return b"cos\nsystem\n(" + opcode_text(f"touch {path}") + b"tR"


def hostile_pickles(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Return pickles that run something, or would take time or memory without end."""
    text = opcode_text(f"open({str(sentinel)!r}, 'w')")
    call = b"(" + text + b"tR"
    tensor = opcode_tensor()
    head = b"\x80\x04"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    nested = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    doubled = b"]" + b"q\0h\0\x86" * 60
    return {
        "os.system": (state_of(touch(sentinel)), "names os.system"),
        "posix.system": (state_of(b"cposix\nsystem\n" + call), "names posix.system"),
        "eval": (state_of(b"cbuiltins\neval\n" + call), "names builtins.eval"),
        "exec": (state_of(b"c__builtin__\nexec\n" + call), "names __builtin__.exec"),
        "getattr": (state_of(b"cbuiltins\ngetattr\n" + call), "names builtins.getattr"),
        "torch.load": (state_of(b"ctorch\nload\n" + call), "names torch.load"),
        "torch.hub": (state_of(b"ctorch.hub\nload\n" + call), "names torch.hub.load"),
        "torch.serialization": (
            state_of(b"ctorch.serialization\nload\n" + call),
            "names torch.serialization.load",
        ),
        "load_library": (state_of(b"ctorch.ops\nload_library\n" + call), "torch.ops.load_library"),
        "compile": (state_of(b"ctorch._dynamo\noptimize\n" + call), "torch._dynamo.optimize"),
        "numpy": (state_of(b"cnumpy.core.multiarray\n_reconstruct\n" + call), "_reconstruct"),
        "dotted": (state_of(b"ctorch\n_utils._rebuild_tensor_v2\n"), "plain tensors do not need"),
        "a name of spaces": (state_of(b"c os \n system \n" + call), "names  os . system "),
        "stack global": (
            head + opcode_text("os") + opcode_text("system") + b"\x93" + call + b".",
            "names os.system",
        ),
        "stack global of a number": (head + b"K\x01K\x02\x93.", "what is no text"),
        "stack global that is dotted": (
            head + opcode_text("torch") + opcode_text("nn.parameter.Parameter") + b"\x93.",
            "plain tensors do not need",
        ),
        "global of bytes": (state_of(b"c\xff\n\xfe\n"), "plain tensors do not need"),
        "inst": (head + b"(" + text + b"ios\nsystem\n.", "instruction INST"),
        "obj": (head + b"(cos\nsystem\n" + text + b"o.", "names os.system"),
        "obj of a known name": (head + b"(ctorch\nSize\n" + text + b"o.", "instruction OBJ"),
        "newobj": (head + b"ctorch\nSize\n)\x81.", "instruction NEWOBJ"),
        "newobj_ex": (head + b"ctorch\nSize\n)}\x92.", "instruction NEWOBJ_EX"),
        "ext1": (head + b"\x82\x01.", "instruction EXT1"),
        "ext2": (head + b"\x83\x01\x00.", "instruction EXT2"),
        "ext4": (head + b"\x84\x01\x00\x00\x00.", "instruction EXT4"),
        "persid": (head + b"Pos.system\n.", "instruction PERSID"),
        "buffer": (head + b"\x97.", "instruction NEXT_BUFFER"),
        "unknown": (head + b"\xff.", "instruction 0xff"),
        "text numbers": (head + b"I" + b"9" * 100_000 + b"\n.", "instruction INT"),
        "build": (state_of(tensor + b"}" + opcode_text("x") + b"K\x01sb"), "sets the state of"),
        "build of a dictionary": (
            head + b"ccollections\nOrderedDict\n)R}" + opcode_text("x") + b"K\x01sb.",
            "sets the state of",
        ),
        "setstate": (
            state_of(b"ctorch\nSize\n}" + opcode_text("_metadata") + b"]sb"),
            "sets the state of torch.Size",
        ),
        "calls a list": (state_of(b"](K\x01tR"), "calls a list"),
        "calls a tensor": (state_of(tensor + b")R"), "calls a tensor"),
        "calls a storage": (state_of(b"ctorch\nFloatStorage\n)R"), "calls torch.FloatStorage"),
        "too many arguments": (state_of(rebuild + b"(K\1K\2tR"), "with 2 arguments"),
        "no tuple of arguments": (state_of(rebuild + b"]R"), "with no arguments"),
        "a tensor of no storage": (
            state_of(rebuild + b"(K\0K\0))\x89}tR"),
            "makes a tensor of no storage",
        ),
        "a rebuild of a rebuild": (
            state_of(nested + b"(" + nested + b"ctorch\nTensor\n)}tR"),
            "no plain tensor",
        ),
        "a rebuild of another type": (
            state_of(nested + b"(" + rebuild + b"ctorch\nSize\n)}tR"),
            "no plain tensor",
        ),
        "ordered dictionary of something": (
            state_of(b"ccollections\nOrderedDict\n(]tR"),
            "with 1 arguments",
        ),
        "persistent id": (head + b"(" + opcode_text("module") + b"tQ.", "no storage"),
        "persistent id of text": (head + opcode_text("0") + b"Q.", "no storage"),
        "doubled tuples": (head + doubled + b".", "holds a tuple"),
        "doubled tuples as a name": (
            head + b"}" + doubled + tensor + b"s.",
            "called by a tuple",
        ),
        "doubled tuples as a shape": (
            state_of(tensor.replace(opcode_ints((2,)), doubled)),
            "no whole numbers",
        ),
        "doubled tuples called": (state_of(doubled + b")R"), "calls a tuple"),
        "doubled tuples as a type": (
            state_of(nested + b"(" + rebuild + doubled + b")}tR"),
            "no plain tensor",
        ),
        "a list in itself": (head + b"]q\0h\0a.", "holds a list"),
        "a dictionary in itself": (head + b"}q\0" + opcode_text("a") + b"h\0s.", "a dictionary"),
        "a long chain": (
            head + b"]q\0(" + b"}K\0h\0sq\0" * 9_000 + b"t\x86.",
            "holds a tuple",
        ),
        "deep tuples": (head + b"]" + b"\x85" * 200_000 + b".", "holds a tuple"),
        "deep lists": (head + b"]" * 30_000 + b"a" * 29_999 + b".", "nested deeper"),
        "deep marks": (head + b"(" * 1000 + b".", "nested deeper"),
        "a memo of billions": (head + b"]r\xff\xff\xff\xff.", "a list"),
        "text of exabytes": (head + b"\x8d" + b"\xff" * 7 + b"\x0f.", "damaged or cut short"),
        "bytes of exabytes": (head + b"\x8e" + b"\xff" * 7 + b"\x0f.", "damaged or cut short"),
        "a frame of exabytes": (head + b"\x95" + b"\xff" * 7 + b"\x0f.", "damaged or cut short"),
        "a large number": (head + b"\x8b\xff\xff\xff\x7f.", "instruction LONG4"),
        "a byte array": (head + b"\x96" + bytes(8) + b".", "instruction BYTEARRAY8"),
        "protocol 0": (b"(dp0\n.", "instruction DICT"),
        "protocol 99": (b"\x80\x63}.", "no protocol"),
        "protocol in the middle": (b"\x80\x02\x80\x02}.", "no protocol"),
        "no end": (head + b"}", "damaged or cut short"),
        "empty": (b"", "damaged or cut short"),
        "after the end": (head + b"}.}", "damaged or cut short"),
        "a mark that stays": (head + b"(}.", "damaged or cut short"),
        "two values": (head + b"}}.", "damaged or cut short"),
        "an empty stack": (head + b"R.", "damaged or cut short"),
        "no mark": (head + b"}u.", "damaged or cut short"),
        "below a mark": (head + b"}(K\1K\2s.", "damaged or cut short"),
        "a memo that is not there": (head + b"h\x05.", "damaged or cut short"),
        "half an entry": (head + b"}(" + opcode_text("a") + b"u.", "no dictionary"),
        "appended to a dictionary": (head + b"}K\1a.", "no list"),
        "an entry of a list": (head + b"]K\1K\2s.", "no dictionary"),
        "half a surrogate": (head + b"}" + opcode_text("\ud800") + tensor + b"s.", "UTF-8"),
        "a storage of two kinds": (
            head
            + (b"}(" + opcode_text("a") + tensor + opcode_text("b"))
            + (opcode_tensor(kind="torch IntStorage") + b"u."),
            "data/0 is of two kinds",
        ),
        "a name twice": (
            head + b"}(" + (opcode_text("a") + tensor) * 2 + b"u.",
            "entry 'a' is there twice",
        ),
    }


@pytest.mark.parametrize("what", hostile_pickles(Path("sentinel")))
def test_hostile_pickles(tmp_path: Path, what: str) -> None:
    sentinel = tmp_path / "sentinel"
    pickled, words = hostile_pickles(sentinel)[what]
    path = tmp_path / "m.bin"
    path.write_bytes(archive_of(pickled))
    started_s = time.monotonic()
    tracemalloc.start()
    try:
        message = refusal(path)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert words in message
    assert len(message) < 900
    assert peak_bytes < 16 * MIB
    assert time.monotonic() - started_s < 10
    assert not sentinel.exists()


def test_the_sentinel_would_be_made(tmp_path: Path) -> None:
    """What the test above refuses does run where Python's own reader runs it."""
    pickle.loads(hostile_pickles(tmp_path / "sentinel")["os.system"][0])
    assert (tmp_path / "sentinel").exists()


HOSTILE_VIEWS: dict[str, tuple[dict[str, Any], str]] = {
    "too many elements": ({"shape": (3,)}, "up to byte 12 of a storage of 8"),
    "behind its end": ({"offset": 1}, "up to byte 12 of a storage of 8"),
    "a far offset": ({"offset": 1 << 62}, "of a storage of 8 bytes"),
    "an offset of 65 bits": ({"offset": 1 << 64}, "no whole numbers"),
    "a negative offset": ({"offset": -1}, "no whole numbers"),
    "a negative shape": ({"shape": (-1,)}, "no whole numbers"),
    "a negative stride": ({"strides": (-1,)}, "no whole numbers"),
    "a long stride": ({"strides": (2,)}, "up to byte 12"),
    "an endless repetition": ({"shape": (1 << 40, 1 << 40), "strides": (0, 0)}, "than any file"),
    "fewer strides": ({"shape": (2, 1)}, "2 axes and 1 strides"),
    "many axes": ({"shape": (1,) * 65, "strides": (1,) * 65}, "shape or strides"),
    "another size": ({"num_elements": 3}, "whose record has 8 bytes"),
    "a huge size": ({"num_elements": 1 << 80}, "whose record has 8 bytes"),
    "another kind": ({"kind": "torch DoubleStorage"}, "whose record has 8 bytes"),
    "a kind that is none": ({"kind": "torch Size"}, "numbers of the kind torch.Size"),
    "no record": ({"key": "1"}, "no record data/1"),
    "a path as a key": ({"key": "../data.pkl"}, "no record data/../data.pkl"),
}


@pytest.mark.parametrize("what", HOSTILE_VIEWS)
def test_hostile_views(tmp_path: Path, what: str) -> None:
    how, words = HOSTILE_VIEWS[what]
    path = tmp_path / "m.bin"
    path.write_bytes(archive_of(state_of(opcode_tensor())))
    assert table(path)["a"].shape == (2,)
    path.write_bytes(archive_of(state_of(opcode_tensor(**how))))
    assert words in refusal(path)


def test_many_instructions_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match="more than 1000 instructions"):
        read_pickle(b"\x80\x02" + b"]q\0" * 1000 + b".")


@pytest.mark.parametrize("instruction", [b"]", b"}", b")", b"N", b"K\1", b"]\x94", b"X\0\0\0\0"])
def test_memory_is_in_proportion_to_the_instructions(
    monkeypatch: pytest.MonkeyPatch, instruction: bytes
) -> None:
    """Four million, which are allowed, therefore take half a gigabyte at most."""
    monkeypatch.setattr(machine, "MAX_INSTRUCTIONS", 50_000)
    bomb = b"\x80\x04](" + (instruction * 900 + b"e(") * 100 + b"t."
    tracemalloc.start()
    with pytest.raises(ValueError, match="instructions"):
        read_pickle(bomb)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50_000 * 140


# Archives.

GOOD = state_of(opcode_tensor())


def zipped(change: Callable[[zipfile.ZipFile], None]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", GOOD)
        archive.writestr("archive/data/0", bytes(8))
        change(archive)
    return file.getvalue()


def compressed(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, content in (("archive/data.pkl", GOOD), ("archive/data/0", bytes(8))):
            if key != name:
                archive.writestr(key, content)
        archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def patched(position: Callable[[bytes], int], value: bytes) -> bytes:
    data = archive_of(GOOD)
    at = position(data)
    return data[:at] + value + data[at + len(value) :]


def central(name: bytes, field: int) -> Callable[[bytes], int]:
    """Return the position of a field of the directory's record of a name."""
    return lambda data: data.rindex(name) - 46 + field


def local(name: bytes, field: int) -> Callable[[bytes], int]:
    """Return the position of a field of a record's own header."""
    return lambda data: data.index(name) - 30 + field


def end(field: int) -> Callable[[bytes], int]:
    return lambda data: len(data) - 22 + field


@pytest.mark.filterwarnings("ignore:Duplicate name")
def hostile_archives() -> dict[str, tuple[bytes, str]]:
    good = archive_of(GOOD)
    first = struct.pack("<L", 0)
    return {
        "absolute name": (zipped(lambda z: z.writestr("/etc/passwd", b"")), "leads out of"),
        "name with ..": (zipped(lambda z: z.writestr("archive/../../x", b"")), "leads out of"),
        "windows name": (zipped(lambda z: z.writestr("archive\\..\\x", b"")), "leads out of"),
        "no root": (zipped(lambda z: z.writestr("other/data.pkl", b"")), "with 2 data.pkl"),
        "no pickle": (archive_of(GOOD).replace(b"data.pkl", b"data.pkx"), "with 0 data.pkl"),
        "compressed pickle": (compressed("archive/data.pkl", GOOD), "data.pkl' is compressed"),
        "zip bomb": (compressed("archive/data.pkl", bytes(50 * MIB)), "is compressed"),
        "compressed storage": (compressed("archive/data/0", bytes(8)), "data/0' is compressed"),
        "encrypted": (patched(central(b"archive/data/0", 8), b"\1\0"), "is encrypted"),
        "encrypted in itself": (
            patched(local(b"archive/data/0", 6), b"\1\0"),
            "is encrypted",
        ),
        "compressed in itself": (
            patched(local(b"archive/data/0", 8), b"\x08\0"),
            "is compressed",
        ),
        "another name in itself": (
            patched(lambda d: d.index(b"archive/data/0"), b"archive/data/9"),
            "not where its directory says",
        ),
        "large pickle": (
            patched(central(b"archive/data.pkl", 20), struct.pack("<2L", *[1 << 31] * 2)),
            "outside of the file",
        ),
        "larger by one": (
            patched(central(b"archive/data/0", 20), struct.pack("<2L", 9, 9)),
            "lies over another",
        ),
        "sizes that differ": (
            patched(central(b"archive/data/0", 24), struct.pack("<L", 4)),
            "has 8 bytes and says that it has 4",
        ),
        "64 bits without a field": (
            patched(central(b"archive/data/0", 20), b"\xff" * 8),
            "no size of 64 bits",
        ),
        "over another": (
            patched(central(b"archive/data/0", 42), first),
            "not where its directory says",
        ),
        "out of the file": (
            patched(central(b"archive/data/0", 42), b"\xff\xff\xff\x7f"),
            "outside of the file",
        ),
        "long extra field": (
            patched(local(b"archive/data/0", 28), b"\xff\x7f"),
            "lies over another",
        ),
        "a folder": (patched(central(b"archive/data/0", 38), b"\x10"), "marked as a folder"),
        "another disk": (patched(central(b"archive/data/0", 34), b"\1\0"), "8 bytes"),
        "several pieces": (patched(end(4), b"\1\0"), "several pieces"),
        "a comment": (good[:-2] + b"\5\0hello", "does not end as a zip archive"),
        "a wrong count": (patched(end(8), b"\5\0\5\0"), "should have 5"),
        "directory elsewhere": (patched(end(16), first), "not where it should be"),
        "directory out of the file": (
            patched(end(16), b"\xff\xff\xff\x7f"),
            "not where it should be",
        ),
        "something before": (b"PK\3\4" + good, "not where it should be"),
        "something behind": (good + b"\0", "does not end as a zip archive"),
        "big endian": (
            archive_of(GOOD, more={"byteorder": b"big"}),
            "byte order 'big'",
        ),
        "constants": (archive_of(GOOD, more={"constants.pkl": b""}), "TorchScript"),
    }


@pytest.mark.parametrize("what", hostile_archives())
def test_hostile_archives(tmp_path: Path, what: str) -> None:
    data, words = hostile_archives()[what]
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        message = refusal(path)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert words in message
    assert peak_bytes < 16 * MIB


def test_duplicated_records(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(zipped(lambda z: z.writestr("archive/data/0", bytes(8))))
    assert "'archive/data/0' is there twice" in refusal(path)


def test_a_pickle_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from della_dist.storage.torch_files import tensors

    monkeypatch.setattr(tensors, "MAX_PICKLE_BYTES", 10)
    (tmp_path / "m.bin").write_bytes(archive_of(GOOD))
    assert "data.pkl has" in refusal(tmp_path / "m.bin")


def test_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": torch.ones(40), "b": torch.ones(3)}, path)
    size = path.stat().st_size
    data = path.read_bytes()
    for length in {*range(0, size, 17), *range(size - 120, size)}:
        path.write_bytes(data[:length])
        refusal(path)


def test_more_than_four_gibibytes(tmp_path: Path) -> None:
    """Sizes and offsets of 64 bits, in a sparse file that torch wrote the ends of."""
    path = tmp_path / "m.bin"
    num = (4 << 30) // 2 + 1000
    with torch.serialization.skip_data():
        torch.save({"large": torch.empty(num, dtype=torch.float16), "b": torch.ones(2)}, path)
    entries = table(path)
    assert entries["large"].stop - entries["large"].start == 2 * num
    assert entries["b"].start > 4 << 30
    assert entries["b"].start % 64 == 0
    os.truncate(path, 0)


def test_a_table_of_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    one = torch.ones(2)
    torch.save({f"model.layers.{i}.weight": one for i in range(20_000)}, path)
    started_s = time.monotonic()
    assert len(table(path)) == 20_000
    assert time.monotonic() - started_s < 60
