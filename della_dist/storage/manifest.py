"""The manifest of a finished output: what was made of what, and the checksum of every byte.

Two files. ``della_manifest.json`` names the configuration, the inputs, and every file with its
size and SHA-256, the other one included, and carries a digest of itself in one canonical form, so
that a changed bit anywhere is found. ``della_tensors.parquet`` (`della_dist.storage.tensor_table`)
has a row a tensor.

``model_digest`` identifies the weights whatever their sharding: SHA-256 over one line a tensor,
sorted by name, ``["name","dtype",[shape],"BLAKE3 of the data"]`` as compact ASCII JSON, each ended
by a newline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from della_dist.errors import VerificationError
from della_dist.specs.statistics import ExpertStats, TensorStats
from della_dist.storage.sealed import seal, unseal
from della_dist.storage.store import STATE_PREFIX, check_key

MANIFEST_NAME = "della_manifest.json"
FORMAT_VERSION = 1
#: No file system has longer names.
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the output, as written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    """First byte of the data in the shard's file."""
    stop: int
    blake3: str
    """Digest of the data: fast enough for a second look at bytes that SHA-256 has seen."""
    action: str
    """`della_dist.planning.matching.Action`; ``base`` also for integers that differed."""
    stats: TensorStats | None
    """None where nothing was merged."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the output, as written."""

    name: str
    size_bytes: int
    sha256: str


def file_record(name: str, data: bytes) -> FileRecord:
    """Return the record of a file with this content."""
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


def model_digest(tensors: Iterable[TensorRecord]) -> str:
    """Return the digest of the weights, which no sharding changes."""
    digest = hashlib.sha256()
    for t in sorted(tensors, key=lambda t: t.name):
        line = json.dumps([t.name, t.dtype, list(t.shape), t.blake3], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def dump_manifest(content: Mapping[str, Any]) -> bytes:
    """Return the canonical bytes of a manifest, with its own digest added."""
    return seal(content, _DIGEST, indent=2)


def load_manifest(data: bytes) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises
    ------
    VerificationError
        If the bytes are not those that were written.
    """
    try:
        content = unseal(data, _DIGEST, indent=2)
        _check_content(content)
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{MANIFEST_NAME} is damaged, or was not written by della-dist: it does not have the "
            "digest and the content it should have. Restore it from a copy, or merge again."
        ) from error
    return content


_DIGEST = "manifest_digest"
#: What a manifest has at least.
_REQUIRED: Mapping[str, type] = {
    "config": dict,
    "files": list,
    "inputs": list,
    "model_digest": str,
    "num_parameters": int,
    "num_tensors": int,
    "output_version": int,
    "shard_bytes": int,
    "shards": list,
    "tool": dict,
}


def _check_content(content: Mapping[str, Any]) -> None:
    """Raise if something that a manifest has is missing, or of another type."""
    if type(content["tool"]["version"]) is not str or any(
        type(content[key]) is not kind for key, kind in _REQUIRED.items()
    ):
        raise ValueError("something is of another type")
    for file in (*content["shards"], *content["files"]):
        name = output_name(file["name"])
        if (
            file.keys() != {"name", "size_bytes", "sha256"}
            or not is_count(file["size_bytes"])
            or type(file["sha256"]) is not str
        ):
            raise ValueError(f"{name} is described in another way")


def output_name(value: object) -> str:
    """Return the name of a file of an output, which was read from one of its documents.

    Raises
    ------
    ValueError
        If no file of an output has such a name.
    """
    if type(value) is not str or check_key(value).startswith(STATE_PREFIX):
        raise ValueError("no name of a file")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError("a name that is too long")
    return value


def is_count(value: object) -> bool:
    """Tell whether a value read from a file is a number of things: no bool, no negative one."""
    return type(value) is int and 0 <= value < 1 << 63


def tensor_to_json(record: TensorRecord) -> dict[str, Any]:
    """Return a tensor's record as a JSON-able mapping."""
    stats = record.stats
    return {
        "name": record.name,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "shard": record.shard,
        "start": record.start,
        "stop": record.stop,
        "blake3": record.blake3,
        "action": record.action,
        "stats": None if stats is None else stats_to_json(stats),
    }


def stats_to_json(stats: TensorStats) -> dict[str, Any]:
    """Return a tensor's statistics as a JSON-able mapping."""
    return {
        "num_elements": stats.num_elements,
        "num_conflicts": stats.num_conflicts,
        "merged_l2": stats.merged_l2,
        "merged_max_abs": stats.merged_max_abs,
        **({} if stats.energy is None else {"energy": stats.energy, "norm": stats.norm}),
        "experts": [
            {
                "num_nonzero": e.num_nonzero,
                "num_kept": e.num_kept,
                "num_elected": e.num_elected,
                "delta_l2": e.delta_l2,
                "delta_max_abs": e.delta_max_abs,
                "num_nonfinite": e.num_nonfinite,
                "cosine": e.cosine,
            }
            for e in stats.experts
        ],
    }


def tensor_from_json(content: Mapping[str, Any]) -> TensorRecord:
    """Return the record that `tensor_to_json` made.

    Raises
    ------
    ValueError
        If it made no such mapping: something is missing, too much, or of another type.
    """
    try:
        stats = content["stats"]
        record = TensorRecord(
            **{
                **content,
                "shape": tuple(content["shape"]),
                "stats": None if stats is None else stats_from_json(stats),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no record of a tensor: {error}") from error
    _check_types(record)
    return record


def stats_from_json(content: Mapping[str, Any]) -> TensorStats:
    """Return the statistics that `stats_to_json` made; `KeyError`, `TypeError` if it made none."""
    return TensorStats(
        num_elements=content["num_elements"],
        num_conflicts=content["num_conflicts"],
        experts=tuple(ExpertStats(**e) for e in content["experts"]),
        energy=content.get("energy"),
        norm=content.get("norm"),
        merged_l2=content.get("merged_l2"),
        merged_max_abs=content.get("merged_max_abs"),
    )


def _check_types(record: TensorRecord) -> None:
    texts = (record.name, record.dtype, record.shard, record.blake3, record.action)
    counts = [*record.shape, record.start, record.stop]
    norms: list[float] = []
    cosines: list[float] = []
    stats = record.stats
    if stats is not None:
        counts += [stats.num_elements, stats.num_conflicts]
        optional = (stats.energy, stats.norm, stats.merged_l2, stats.merged_max_abs)
        norms += [n for n in optional if n is not None]
        for expert in stats.experts:
            counts += [expert.num_nonzero, expert.num_kept, expert.num_elected]
            counts += [] if expert.num_nonfinite is None else [expert.num_nonfinite]
            norms += [expert.delta_l2, expert.delta_max_abs]
            cosines += [] if expert.cosine is None else [expert.cosine]
    if not (
        all(type(text) is str for text in texts)
        and all(map(is_count, counts))
        and all(type(norm) is float or is_count(norm) for norm in norms)
        and all(type(cosine) in (float, int) and -1 <= cosine <= 1 for cosine in cosines)
    ):
        raise ValueError("it is no record of a tensor: something in it is of another type")
