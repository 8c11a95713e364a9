"""The manifest says what was written, and a changed byte of it is found."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della_dist.errors import VerificationError
from della_dist.specs.statistics import ExpertStats, TensorStats
from della_dist.storage.manifest import (
    FileRecord,
    TensorRecord,
    dump_manifest,
    file_record,
    load_manifest,
    model_digest,
    tensor_from_json,
    tensor_to_json,
)
from della_dist.storage.tensor_table import Experts, dump_tensors, load_tensors

INT64 = st.integers(0, 2**63 - 1)
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)
NORMS = st.floats(0, allow_nan=False)
EXPERTS = st.builds(
    ExpertStats, INT64, INT64, INT64, NORMS, NORMS, st.none() | INT64, st.none() | st.floats(-1, 1)
)
STATS = st.builds(
    TensorStats,
    INT64,
    INT64,
    st.lists(EXPERTS, max_size=4).map(tuple),
    merged_l2=st.none() | NORMS,
    merged_max_abs=st.none() | NORMS,
)
RECORDS = st.builds(
    TensorRecord,
    name=NAMES,
    dtype=st.sampled_from(["BF16", "I64"]),
    shape=st.lists(INT64, max_size=5).map(tuple),
    shard=NAMES,
    start=INT64,
    stop=INT64,
    blake3=st.text("0123456789abcdef", min_size=64, max_size=64),
    action=st.sampled_from(["merge", "copy", "buffer"]),
    stats=st.none() | STATS,
)

PLANNED = (("math", 0.5), ("code", None), ("org/chat", 1.0), ("other", 1.0))


def planned(_: str) -> Experts:
    return PLANNED


RECORD = TensorRecord(
    name="model.norm.weight",
    dtype="BF16",
    shape=(8,),
    shard="model-00001-of-00002.safetensors",
    start=96,
    stop=112,
    blake3="ab" * 32,
    action="merge",
    stats=TensorStats(
        8,
        1,
        (ExpertStats(8, 4, 3, 0.1, 0.25, 0, -0.5), ExpertStats(7, 3, 3, 1e-9, 5e-324)),
        merged_l2=0.125,
        merged_max_abs=0.0625,
    ),
)

MANIFEST: dict[str, Any] = {
    "tool": {"name": "della_dist", "version": "0"},
    "output_version": 1,
    "inputs": [],
    "files": [{"name": "config.json", "size_bytes": 3, "sha256": "00"}],
    "num_tensors": 1,
    "num_parameters": 8,
    "shard_bytes": 1024,
    "format_version": 1,
    "seed": 7,
    "config": {"models": ["/a", "/b"], "name": "größe \u2028", "weight": 0.1, "base": None},
    "shards": [{"name": "model.safetensors", "size_bytes": 2**40, "sha256": "ab" * 32}],
    "model_digest": "cd" * 32,
}


@given(RECORDS)
def test_record_round_trip(record: TensorRecord) -> None:
    assert tensor_from_json(tensor_to_json(record)) == record
    assert tensor_from_json(json.loads(json.dumps(tensor_to_json(record)))) == record


@settings(deadline=None)  # the first call imports pyarrow
@given(st.lists(RECORDS, max_size=6))
def test_parquet_round_trip(records: list[TensorRecord]) -> None:
    assert load_tensors(dump_tensors(records, planned)) == records


def test_parquet_is_reproducible() -> None:
    records = [replace(RECORD, name=f"{i}") for i in range(1000)]
    assert dump_tensors(records, planned) == dump_tensors(list(records), planned)
    assert dump_tensors(records, planned) != dump_tensors(records[::-1], planned)


def test_parquet_columns() -> None:
    import io

    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(dump_tensors([RECORD, replace(RECORD, stats=None)], planned)))
    assert table.column_names == [
        *("name", "dtype", "shape", "shard", "start", "stop", "blake3", "action"),
        *("num_elements", "num_conflicts", "merged_l2", "merged_max_abs", "experts"),
    ]
    merged, copied = table.to_pylist()
    assert [(e["expert"], e["density"]) for e in merged["experts"]] == [
        ("math", 0.5),
        ("code", None),
    ]
    assert merged["experts"][0] == {
        "expert": "math",
        "density": 0.5,
        "num_nonfinite": 0,
        "num_nonzero": 8,
        "num_kept": 4,
        "num_elected": 3,
        "delta_l2": 0.1,
        "delta_max_abs": 0.25,
        "cosine": -0.5,
    }
    assert merged["experts"][1]["cosine"] is None
    assert (merged["merged_l2"], merged["merged_max_abs"]) == (0.125, 0.0625)
    assert (copied["num_elements"], copied["experts"]) == (None, [])


def test_tables_and_records_of_earlier_versions() -> None:
    """They have no density, and measured nothing of the output."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    assert RECORD.stats is not None
    earlier = tuple(replace(e, num_nonfinite=None, cosine=None) for e in RECORD.stats.experts)
    stats = replace(RECORD.stats, experts=earlier, merged_l2=None, merged_max_abs=None)
    rows = pq.read_table(io.BytesIO(dump_tensors([RECORD], planned))).to_pylist()
    record = tensor_to_json(RECORD)
    for columns, experts in (
        (rows[0], rows[0]["experts"]),
        (record["stats"], record["stats"]["experts"]),
    ):
        for key in ("merged_l2", "merged_max_abs"):
            del columns[key]
        for expert in experts:
            expert.pop("density", None)
            del expert["num_nonfinite"], expert["cosine"]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    assert load_tensors(sink.getvalue()) == [replace(RECORD, stats=stats)]
    assert tensor_from_json(record) == replace(RECORD, stats=stats)


@pytest.mark.parametrize("cosine", [1.5, float("nan"), True, "0.5"])
def test_a_cosine_that_is_none(cosine: object) -> None:
    content = tensor_to_json(RECORD)
    content["stats"]["experts"][0]["cosine"] = cosine
    with pytest.raises(ValueError, match="of another type"):
        tensor_from_json(content)


def test_model_digest_of_known_tensors() -> None:
    # The definition, spelled out: changing it would make every digest that was published wrong.
    one, other = replace(RECORD, name="b"), replace(RECORD, name="a", shape=(), dtype="F32")
    lines = f'["a","F32",[],"{"ab" * 32}"]\n["b","BF16",[8],"{"ab" * 32}"]\n'
    assert model_digest([one, other]) == hashlib.sha256(lines.encode()).hexdigest()
    assert model_digest([]) == hashlib.sha256(b"").hexdigest()


def test_model_digest_of_a_name_outside_ascii() -> None:
    line = '["gr\\u00f6\\u00dfe\\n","BF16",[8],"' + "ab" * 32 + '"]\n'
    expected = hashlib.sha256(line.encode()).hexdigest()
    assert model_digest([replace(RECORD, name="größe\n")]) == expected


@given(st.lists(RECORDS, unique_by=lambda r: r.name, max_size=6), st.randoms(use_true_random=False))
def test_model_digest_ignores_order_and_sharding(
    records: list[TensorRecord], rng: random.Random
) -> None:
    elsewhere = [
        replace(r, shard=f"{i}", start=i, stop=i + 1, stats=None, action="copy")
        for i, r in enumerate(records)
    ]
    rng.shuffle(elsewhere)
    assert model_digest(elsewhere) == model_digest(records)
    assert model_digest(iter(elsewhere)) == model_digest(records)


@pytest.mark.parametrize(
    "change", [{"name": "x"}, {"dtype": "F16"}, {"shape": (8, 1)}, {"blake3": "ac" * 32}]
)
def test_model_digest_sees_every_change(change: dict[str, Any]) -> None:
    other = replace(RECORD, name="other")
    assert model_digest([RECORD, other]) != model_digest([replace(RECORD, **change), other])
    assert model_digest([RECORD, other]) != model_digest([RECORD])


def test_names_and_shapes_cannot_be_confused() -> None:
    # Without quoting, one tensor could pass for another.
    digests = {
        model_digest([replace(RECORD, name=name, shape=shape)])
        for name in ("a", 'a","BF16",[8],"', "a\n")
        for shape in ((8,), (8, 8), (88,))
    }
    assert len(digests) == 9


def test_manifest_round_trip() -> None:
    data = dump_manifest(MANIFEST)
    content = load_manifest(data)
    assert content.pop("manifest_digest")
    assert content == MANIFEST
    assert data.endswith(b"}\n")
    assert data.isascii()


def test_manifest_is_canonical() -> None:
    reordered = dict(reversed(MANIFEST.items()))
    assert dump_manifest(reordered) == dump_manifest(MANIFEST)
    assert dump_manifest(load_manifest(dump_manifest(MANIFEST))) == dump_manifest(MANIFEST)


def test_every_flipped_bit_is_found() -> None:
    data = dump_manifest(MANIFEST)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(VerificationError):
                load_manifest(bytes(flipped))


def test_every_lost_and_every_inserted_byte_is_found() -> None:
    data = dump_manifest(MANIFEST)
    for position in range(len(data) + 1):
        for inserted in (b" ", b"0", b"\n"):
            with pytest.raises(VerificationError):
                load_manifest(data[:position] + inserted + data[position:])
        if position < len(data):
            with pytest.raises(VerificationError):
                load_manifest(data[:position] + data[position + 1 :])
            with pytest.raises(VerificationError):
                load_manifest(data[:position])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"manifest_digest": "00"}',
        b'{"a": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(VerificationError, match=r"della_manifest\.json is damaged"):
        load_manifest(data)


@pytest.mark.parametrize("missing", ["files", "shards", "config", "model_digest"])
def test_a_manifest_without_what_is_needed(missing: str) -> None:
    data = dump_manifest({k: v for k, v in MANIFEST.items() if k != missing})
    with pytest.raises(VerificationError, match="not written by della-dist"):
        load_manifest(data)


def test_same_content_in_another_form_is_refused() -> None:
    # Only the form that was written counts, so that no byte is free to change.
    content = json.loads(dump_manifest(MANIFEST))
    with pytest.raises(VerificationError):
        load_manifest(json.dumps(content).encode())


def test_file_record() -> None:
    assert file_record("a", b"abc") == FileRecord("a", 3, hashlib.sha256(b"abc").hexdigest())
