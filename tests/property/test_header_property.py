"""Whatever the bytes, our verdict on a header is the safetensors library's."""

from __future__ import annotations

import json
from typing import Any

import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from della_dist.errors import InputError
from della_dist.specs.dtypes import DTYPE_BITS
from della_dist.storage.header import Header, build_header, parse_header

CHECK = settings(
    max_examples=1000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

deserialize: Any = safetensors.deserialize  # it has no types
Tensors = dict[str, tuple[str, list[int], bytes]]


def theirs(data: bytes) -> Tensors | None:
    try:
        found: Any = deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


def ours(data: bytes) -> Header | str:
    """Return the header, or the message; every read must lie in the file."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(data)
        return data[start:stop]

    try:
        return parse_header(read, len(data), where="some.safetensors")
    except InputError as error:
        message = str(error)
        assert message.startswith("some.safetensors")
        assert len(message) < 1500
        assert "\n" not in message
        return message


def has_repeated_name(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    pairs = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=tuple)
    return len({name for name, _ in pairs}) < len(pairs)


def check(data: bytes) -> None:
    expected, header = theirs(data), ours(data)
    if isinstance(header, Header):
        assert expected is not None, "we accept what the library refuses"
        assert {
            t.name: (t.dtype, list(t.shape), data[t.start : t.stop]) for t in header.tensors
        } == (expected)
        assert header.size_bytes == 8 + int.from_bytes(data[:8], "little")
    elif expected is not None:
        # The one exception: the library keeps the last of several tensors of one name.
        assert "is there twice" in header, header
        assert has_repeated_name(data)


def framed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


# Fragments of JSON, and of what is almost JSON, that parsers disagree about.
NUMBERS = st.one_of(
    st.integers(-2, 40).map(str),
    st.sampled_from(
        ["-0", "-1", "0.0", "1.0", "1e0", "1E+2", "1e400", "-1e400", "0e999", "1e-999"]
    ),
    st.sampled_from(["00", "01", "1.", ".5", "+1", "0x1", "NaN", "Infinity", "-Infinity", "true"]),
    st.sampled_from([2**32, 2**59, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64]).map(str),
    st.sampled_from([300, 308, 310, 4300, 5000, 20_000]).map(lambda n: "1" * n),
)
ESCAPES = ["\\ud800", "\\uDC00", "\\uD83D\\uDE00", "\\u0000", "\\u12", "\\/", "\\x", "\\", "\\\\"]
ESCAPES += ["\t", "\x7f", "\ufeff", "é", "a", "ud800", "\\n", "\\u00e9", "\\uD83D\\u0041"]
STRINGS = st.one_of(
    st.text(max_size=5).map(json.dumps),
    st.text(max_size=5).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.lists(st.sampled_from(ESCAPES), max_size=4).map(lambda parts: '"' + "".join(parts) + '"'),
)
NESTED = st.tuples(
    st.sampled_from([1, 2, 60, 122, 123, 124, 125, 126, 127, 128, 900, 5000]),
    st.sampled_from([("[", "]"), ('{"a":', "}"), ("[1,", "]")]),
    st.sampled_from(["", "1", '"x"', "1e999", "null"]),
).map(lambda n: n[1][0] * n[0] + n[2] + n[1][1] * n[0])
VALUES = st.one_of(
    NUMBERS, STRINGS, NESTED, st.sampled_from(["[]", "{}", "[0]", "[0,0]", "[0,4,4]"])
)
DTYPE_TOKENS = st.one_of(
    st.sampled_from([json.dumps(dtype) for dtype in DTYPE_BITS]),
    st.sampled_from([f'{{"{dtype}":null}}' for dtype in DTYPE_BITS]),
    st.sampled_from(['"f32"', '"I4"', '{"F32":{}}', '{"F32":null,"F32":null}', "11", '["F32"]']),
    VALUES,
)
FIELD_NAMES = st.sampled_from(
    ['"dtype"', '"shape"', '"data_offsets"', '"x"', '"\\u0064type"', '""']
)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """Draw a valid file as fragments of JSON, change some of them, and put them together."""
    entries: list[tuple[str, list[tuple[str, Any]]]] = []
    stop = 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(list(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        bits = DTYPE_BITS[dtype]
        for dim in shape:
            bits *= dim
        start, stop = stop, stop + bits // 8
        fields: list[tuple[str, Any]] = [
            ('"dtype"', json.dumps(dtype)),
            ('"shape"', [str(dim) for dim in shape]),
            ('"data_offsets"', [str(start), str(stop)]),
        ]
        entries.append((f'"t{number}"', fields))
    entries = draw(st.permutations(entries))
    size = stop
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        which = draw(st.integers(0, len(entries) - 1))
        name, fields = entries[which]
        kind = draw(st.integers(0, 10))
        spot = draw(st.integers(0, len(fields) - 1)) if fields else 0
        if kind == 0:
            entries[which] = (draw(STRINGS), fields)
        elif kind == 1:
            entries.append((name, draw(st.sampled_from([fields, entries[0][1]]))))
        elif kind == 2:
            fields.insert(spot, (draw(FIELD_NAMES), draw(VALUES)))
        elif kind == 3 and fields:
            del fields[spot]
        elif kind == 4 and fields:
            fields[spot] = (fields[spot][0], draw(VALUES))
        elif kind == 5 and fields:
            fields.append(fields[spot])
        elif kind == 6 and fields:
            entries[which] = (name, draw(st.permutations(fields)))
        elif kind == 7 and fields:
            fields[spot] = ('"dtype"', draw(DTYPE_TOKENS))
        elif kind == 8:
            entries[which] = (name, [("", value) for _, value in fields])
        elif fields and isinstance(fields[spot][1], list):
            tokens = fields[spot][1]
            tokens.insert(draw(st.integers(0, len(tokens))), draw(NUMBERS))
            if kind == 10:
                tokens.pop(draw(st.integers(0, len(tokens) - 1)))
    space = draw(st.sampled_from(["", "", "", " ", "\n\t\r "]))
    parts = [f"{name}:{space}{entry_text(fields, space)}" for name, fields in entries]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        metadata = draw(
            st.one_of(
                st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2).map(
                    json.dumps
                ),
                st.tuples(STRINGS, VALUES).map(lambda pair: f"{{{pair[0]}:{pair[1]}}}"),
                st.just('{"a":"1","a":"2"}'),
                st.just("null"),
                VALUES,
            )
        )
        parts.insert(draw(st.integers(0, len(parts))), f'"__metadata__":{metadata}')
    before = draw(st.sampled_from(["", "", "", "", " ", "\n", "\0", "\ufeff", "["]))
    after = draw(st.sampled_from(["", "", "", " ", " \n\t", "\0", ",", "{}", "\x0b", "\u00a0"]))
    header = f"{before}{{{space}{(',' + space).join(parts)}{space}}}{after}"
    size += draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, 8]))
    return framed(header.encode("utf-8", "surrogatepass"), bytes(i % 251 for i in range(size)))


def entry_text(fields: list[tuple[str, Any]], space: str) -> str:
    values = [
        (key, f"[{space}{f'{space},'.join(value)}]" if isinstance(value, list) else value)
        for key, value in fields
    ]
    if values and all(key == "" for key, _ in values):
        return "[" + ",".join(value for _, value in values) + "]"
    return "{" + ",".join(f"{key}{space}:{value}" for key, value in values) + "}"


@CHECK
@given(mutated_files())
def test_verdict_on_changed_json(data: bytes) -> None:
    check(data)


@CHECK
@given(mutated_files(), st.data())
def test_verdict_on_changed_bytes(data: bytes, draws: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draws.draw(st.integers(1, 3))):
        if changed:
            place = draws.draw(st.integers(0, len(changed) - 1))
            changed[place] ^= draws.draw(st.integers(1, 255))
    check(bytes(changed))
    cut = draws.draw(st.integers(0, len(changed)))
    check(bytes(changed[:cut]))


@CHECK
@given(
    st.binary(max_size=100), st.binary(max_size=20), st.one_of(st.none(), st.integers(0, 2**64 - 1))
)
@example(b"", b"", None)
@example(b"{}", b"", None)
@example(b"{}", b"", 100_000_000)
@example(b"{}", b"", 100_000_001)
@example(b"{}", b"", 2**64 - 8)
@example(b"\xff{}", b"", None)
def test_verdict_on_any_bytes(header: bytes, data: bytes, length: int | None) -> None:
    check(framed(header, data, length))
    check(header)


@CHECK
@given(st.text('{}[]":,\\u01eE-+. tfnaN\x00\n', max_size=60), st.integers(0, 4))
def test_verdict_on_json_like_text(text: str, size: int) -> None:
    check(framed(text.encode(), bytes(size)))
    check(
        framed(
            f'{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{text}}}}}'.encode(), b""
        )
    )


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=6,
)


@CHECK
@given(TENSORS, st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
def test_what_we_build_is_what_the_library_reads(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    try:
        str(metadata).encode()
    except UnicodeEncodeError:
        metadata = {}
    entries = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    header, placed = build_header(entries, metadata)
    data = header + bytes((placed[-1].stop if placed else len(header)) - len(header))
    check(data)
    read = ours(data)
    assert isinstance(read, Header)
    assert sorted(read.tensors, key=lambda t: t.name) == sorted(placed, key=lambda t: t.name)
    assert read.metadata == metadata
    assert len(header) % 8 == 0
