"""``della_tensors.parquet``: a row a tensor of a finished output.

Where it lies, its digest, and what happened to each expert's part. Columns: ``name, dtype, shape,
shard, start, stop, blake3, action, num_elements, num_conflicts, merged_l2, merged_max_abs`` and
``experts``, a list with one structure an expert: ``expert, density, num_nonfinite, num_nonzero,
num_kept, num_elected, delta_l2, delta_max_abs, cosine``. The table of an adapter has ``energy`` and
``norm`` as well, before ``experts``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

from della_dist.errors import VerificationError
from della_dist.storage.manifest import TensorRecord, tensor_from_json, tensor_to_json

TENSORS_NAME = "della_tensors.parquet"

#: What each expert of a tensor is called, and the part of its deltas that is to be kept (None: only
#: the deltas tell).
Experts: TypeAlias = Sequence[tuple[str, float | None]]

#: What is empty where nothing was merged.
_MEASURED = ("num_elements", "num_conflicts", "merged_l2", "merged_max_abs")

#: Rows that are objects of Python at once, some kilobytes each.
ROWS_AT_ONCE = 4096


def dump_tensors(
    tensors: Iterable[TensorRecord],
    experts: Callable[[str], Experts],
    *,
    factored: bool = False,
) -> bytes:
    """Return the Parquet file of all tensors, in the order given.

    Parameters
    ----------
    tensors
        Of the output.
    experts
        Return the experts of a tensor, in the order of their statistics.
    factored
        Whether they are of an adapter, which has two columns more.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    expert = pa.struct(
        [
            ("expert", pa.string()),
            ("density", pa.float64()),
            ("num_nonfinite", pa.int64()),
            ("num_nonzero", pa.int64()),
            ("num_kept", pa.int64()),
            ("num_elected", pa.int64()),
            ("delta_l2", pa.float64()),
            ("delta_max_abs", pa.float64()),
            ("cosine", pa.float64()),
        ]
    )
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int64())),
            ("shard", pa.string()),
            ("start", pa.int64()),
            ("stop", pa.int64()),
            ("blake3", pa.string()),
            ("action", pa.string()),
            ("num_elements", pa.int64()),
            ("num_conflicts", pa.int64()),
            ("merged_l2", pa.float64()),
            ("merged_max_abs", pa.float64()),
            *([("energy", pa.float64()), ("norm", pa.float64())] if factored else []),
            ("experts", pa.list_(expert)),
        ]
    )
    rows = (_row(record, experts) for record in tensors)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return sink.getvalue()


def _row(record: TensorRecord, experts: Callable[[str], Experts]) -> dict[str, Any]:
    row = tensor_to_json(record)
    row.update(row.pop("stats") or {**dict.fromkeys(_MEASURED), "experts": []})
    if row["experts"]:
        planned = experts(record.name)
        row["experts"] = [
            dict(zip(("expert", "density"), planned[m], strict=True), **stats)
            for m, stats in enumerate(row["experts"])
        ]
    return row


def load_tensors(data: bytes) -> list[TensorRecord]:
    """Return the records in a Parquet file made by `dump_tensors`; errors as `load_table`."""
    return [record for record, _ in load_table(data)]


def load_table(data: bytes) -> list[tuple[TensorRecord, Experts]]:
    """Return the records in a Parquet file made by `dump_tensors`, and their experts.

    Raises
    ------
    VerificationError
        If it is none: cut short, something else, or with other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    records: list[tuple[TensorRecord, Experts]] = []
    try:
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(ROWS_AT_ONCE):
            records += map(_record, batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{TENSORS_NAME} is damaged, or was not written by della-dist: {error}. Restore it "
            "from a copy, or merge again with --restart."
        ) from error
    return records


def _record(row: dict[str, Any]) -> tuple[TensorRecord, Experts]:
    stats = {k: row.pop(k) for k in ("num_elements", "num_conflicts", "experts")}
    # Tables of earlier versions have fewer columns, and only that of an adapter has all.
    stats |= {k: row.pop(k) for k in (*_MEASURED, "energy", "norm") if k in row}
    if not all(isinstance(expert, dict) for expert in stats["experts"]):
        raise TypeError("experts without statistics")
    planned = [(str(e.pop("expert")), e.pop("density", None)) for e in stats["experts"]]
    row["stats"] = None if stats["num_elements"] is None else stats
    return tensor_from_json(row), planned
