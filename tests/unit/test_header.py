"""Headers we write are the library's, byte for byte; headers we refuse are refused clearly."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from della_dist.errors import InputError
from della_dist.specs.dtypes import DTYPE_BITS, num_bytes
from della_dist.storage.header import MAX_HEADER_BYTES, Header, build_header, parse_header


def framed(header: str, num_data_bytes: int = 0) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + bytes(num_data_bytes)


def one(fields: str, num_data_bytes: int = 4) -> bytes:
    return framed('{"a":{' + fields + "}}", num_data_bytes)


def parse(data: bytes) -> Header:
    return parse_header(lambda a, b: data[a:b], len(data), where="dir/some.safetensors")


F32 = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'


def test_built_file_equals_save_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "a.weight": rng.standard_normal((2, 4)).astype(np.float32),
        "ä.half": rng.standard_normal(7).astype(np.float16),
        'z/quote"\\\n\t\x7f\u2028😀': np.arange(6, dtype=np.int64).reshape(1, 2, 3),
        "B.upper": np.arange(3, dtype=np.uint8),
        "\x00nul\x1f": np.array([True, False]),
        "scalar": np.array(1.5, np.float64),
        "empty": np.empty((0, 3), np.float32),
        "i32": np.arange(2, dtype=np.int32),
        "u64": np.arange(2, dtype=np.uint64),
        "c64": np.ones(2, np.complex64),
    }
    codes = {"f4": "F32", "f2": "F16", "i8": "I64", "u1": "U8", "b1": "BOOL", "f8": "F64"}
    codes |= {"i4": "I32", "u8": "U64", "c8": "C64"}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    entries = [(name, codes[a.dtype.str[1:]], a.shape) for name, a in arrays.items()]
    header, placed = build_header(entries, {"format": "pt"})
    data = header + b"".join(arrays[entry.name].tobytes() for entry in placed)
    assert data == path.read_bytes()


def test_built_file_equals_the_library_for_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = [
        (f"{kind}.{dtype}", dtype, shape)
        for dtype in reversed(list(DTYPE_BITS))
        for kind, shape in (("z", (2, 8)), ("a", (8,)))
    ]
    # The library writes what it reads: give it our file in another order and see what comes out.
    texts, stop = [], 0
    for name, dtype, shape in entries:
        start, stop = stop, stop + num_bytes(dtype, shape)
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        texts.append(f"{json.dumps(name)}:{json.dumps(fields)}")
    foreign = framed("{" + ",".join(texts) + "}", stop)
    deserialize: Any = safetensors.deserialize
    serialize_file: Any = safetensors.serialize_file
    found = {name: dict(tensor) for name, tensor in deserialize(foreign)}
    names = {
        "BOOL": "bool",
        "F4": "float4_e2m1fn_x2",
        "F8_E8M0": "float8_e8m0fnu",
        "C64": "complex64",
    }
    names |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BF16": "bfloat16"}
    names |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
    names |= {
        f"{k}{b}": f"{w}{b}" for k, w in (("U", "uint"), ("I", "int")) for b in (8, 16, 32, 64)
    }
    names |= {f"F{b}": f"float{b}" for b in (16, 32, 64)}
    entries = [entry for entry in entries if entry[1] in names]
    arrays = {name: np.frombuffer(found[name]["data"], np.uint8) for name, _, _ in entries}
    given = {}
    for name, dtype, shape in entries:
        # Its writer counts bytes: two F4 elements in one, so that it doubles the last axis.
        written = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        given[name] = safetensors.TensorSpec(
            dtype=names[dtype],
            shape=list(written),
            data_ptr=arrays[name].ctypes.data,
            data_len=arrays[name].nbytes,
        )
    serialize_file(given, str(path), {"format": "pt"})
    header, _ = build_header(entries, {"format": "pt"})
    assert path.read_bytes()[: len(header)] == header


def test_parse_what_save_file_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int8),
    }
    save_file(arrays, path, metadata={"format": "pt", "more": "ü"})
    data = path.read_bytes()
    header = parse(data)
    assert [(t.name, t.dtype, t.shape) for t in header.tensors] == [
        ("a", "F32", (2, 3)),
        ("b", "I8", (4,)),
    ]
    for t in header.tensors:
        assert data[t.start : t.stop] == arrays[t.name].tobytes()
    assert header.metadata == {"format": "pt", "more": "ü"}
    assert header.size_bytes == 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes, too few"),
        (b"\x01\0\0\0\0\0\0", "7 bytes, too few"),
        ((100).to_bytes(8, "little") + b"{}", "header alone should have 108"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        (b"PK\x03\x04" + bytes(40), "more than the|header alone"),
        (b"\xff" * 16, "more than the"),
        (framed('{"a":{' + F32 + '},"a":{' + F32 + "}}", 4), "'a' is there twice"),
        (one(F32, 3), "cut short"),
        (one(F32, 5), "written past its end"),
        (one(F32 + ',"x":' + "[" * 50_000), "nested deeper"),
        (one(F32 + ',"x":' + "1" * 10_000), "header of .* is wrong"),
        (one(F32 + ',"x":"\\ud800"'), "surrogate"),
        (one(F32.replace("F32", "Q4")), "dtype of 'a' is unknown: Q4"),
        (one(F32.replace("[1]", "[2]")), "has 4 bytes .* has 8"),
        (one(F32.replace("[1]", "[true]")), "not a list of whole numbers"),
        (one(F32.replace("[0,4]", "[-0,4]")), "not two whole numbers"),
        (one(F32.replace("[0,4]", "[1,5]"), 5), "the data before it ends at 0"),
        (one(F32.replace("[1]", "[4294967296,4294967296]")), "out of range"),
        (framed('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1), "not whole bytes"),
        (framed('{"__metadata__":{"a":1}}'), "__metadata__"),
        (framed("[]"), "not a JSON object"),
        (framed('{"a":{"dtype":"F32"}}'), "has no shape"),
    ],
)
def test_refused_with_one_paragraph(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        parse(data)
    message = str(caught.value)
    assert message.startswith("dir/some.safetensors")
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 1200


def test_nothing_is_read_before_it_is_known_to_be_there() -> None:
    data = MAX_HEADER_BYTES.to_bytes(8, "little") + b"{" + bytes(1000)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    with pytest.raises(InputError):
        parse_header(read, len(data), where="x")
    assert asked == [(0, len(data))]


def test_long_headers_are_read_in_two_requests() -> None:
    entries = [(f"tensor.{number:06}", "U8", (1,)) for number in range(10_000)]
    header, placed = build_header(entries, {})
    data = header + bytes(10_000)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    assert parse_header(read, len(data), where="x").tensors == placed
    assert len(asked) == 2
    assert asked[1][1] == len(header)


@pytest.mark.parametrize(
    "entries",
    [
        [("a", "F32", (1,)), ("a", "F16", (1,))],
        [("__metadata__", "F32", (1,))],
        [("a", "F4", (1,))],
    ],
)
def test_build_refuses(entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError, match=r"repeated|whole byte"):
        build_header(entries, {})


def test_hundred_thousand_tensors_are_quick_and_slim() -> None:
    entries = [
        (f"layers.{n // 9}.experts.{n % 9}.w", "BF16", (4096, 64 + n % 5)) for n in range(100_000)
    ]
    data, placed = build_header(entries, {"format": "pt"})
    size_bytes = placed[-1].stop
    took, json_took = [], []
    for _ in range(5):
        began = time.process_time()
        header = parse_header(lambda a, b: data[a:b], size_bytes, where="x")
        took.append(time.process_time() - began)
        began = time.process_time()
        json.loads(data[8:])
        json_took.append(time.process_time() - began)
    assert gc.isenabled()
    assert header.tensors == placed
    assert len({id(tensor.shape) for tensor in header.tensors}) == 5
    assert len({id(tensor.dtype) for tensor in header.tensors}) == 1
    assert min(took) < 6 * min(json_took)
