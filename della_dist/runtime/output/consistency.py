"""Whether the parts of an output say the same: manifest, table, index, and the shards' headers.

Checksums tell that nothing changed since it was written. This tells that what was written belongs
together, which a checksum over each part cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from della_dist.errors import InputError, StorageError
from della_dist.planning.layout import INDEX_NAME
from della_dist.specs.dtypes import num_elements
from della_dist.storage.header import parse_header
from della_dist.storage.manifest import TensorRecord, model_digest
from della_dist.storage.shard_files import read_weight_map
from della_dist.storage.store import Store
from della_dist.storage.tensor_table import TENSORS_NAME


def check_table(manifest: Mapping[str, Any], tensors: Sequence[TensorRecord]) -> list[str]:
    """Return in what the table of the tensors differs from the manifest, a line each."""
    differences = []
    if model_digest(tensors) != manifest["model_digest"]:
        differences.append(f"{TENSORS_NAME} does not have the manifest's model digest")
    counts = {
        "num_tensors": len(tensors),
        "num_parameters": sum(num_elements(t.shape) for t in tensors),
    }
    differences += [
        f"the manifest says {manifest[key]} for {key}, {TENSORS_NAME} {count}"
        for key, count in counts.items()
        if manifest[key] != count
    ]
    if len({t.name for t in tensors}) != len(tensors):
        differences.append(f"{TENSORS_NAME} has a tensor twice")
    shards = {shard["name"] for shard in manifest["shards"]}
    unknown = sorted({t.shard for t in tensors} - shards)
    differences += [f"{TENSORS_NAME} names shard {s}, the manifest does not" for s in unknown]
    return differences


def check_header(store: Store, shard: str, tensors: Iterable[TensorRecord]) -> list[str]:
    """Return in what the header of a shard differs from the table's rows for it, a line each."""
    try:
        header = parse_header(
            lambda start, stop: store.read(shard, start, stop),
            store.stat(shard).size_bytes,
            where=shard,
        )
    except InputError as error:
        return [str(error).rstrip(".")]
    there = {t.name: (t.dtype, t.shape, t.start, t.stop) for t in header.tensors}
    told = {t.name: (t.dtype, t.shape, t.start, t.stop) for t in tensors}
    return [
        f"tensor {name} in the header of shard {shard} is not as {TENSORS_NAME} has it"
        for name in sorted(there.keys() | told.keys())
        if there.get(name) != told.get(name)
    ]


def check_index(
    store: Store, manifest: Mapping[str, Any], tensors: Iterable[TensorRecord]
) -> list[str]:
    """Return whether the index file, where there is one, names the shard of every tensor."""
    is_listed = any(file["name"] == INDEX_NAME for file in manifest["files"])
    if is_listed != (len(manifest["shards"]) > 1):
        return [f"{INDEX_NAME} belongs to an output of several shards, and to no other"]
    if not is_listed:
        return []
    try:
        found = read_weight_map(store, INDEX_NAME)
    except (InputError, StorageError):
        return [f"{INDEX_NAME} is no index"]
    if found != {t.name: t.shard for t in tensors}:
        return [f"{INDEX_NAME} places tensors in other shards than {TENSORS_NAME}"]
    return []


def check_links(store: Store, names: Sequence[str]) -> list[str]:
    """Return the files that are links out of the output, a line each.

    The cache of the Hugging Face Hub consists of links: an output that was downloaded there is
    whole (`Store.check`).
    """
    linked = (name for name in names if store.links([name]) and store.exists(name))
    return [f"{name} is a link out of the output" for name in linked if _leads_out(store, name)]


def _leads_out(store: Store, name: str) -> bool:
    try:
        store.check(name)
    except InputError:
        return True
    return False
