"""Input checkpoints: a directory of files of weights, known from their headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from della_dist.errors import InputError, VerificationError, refused_as
from della_dist.locations import absolute_path, is_url, local_path
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.storage.opening import DEFAULT_CONNECTIONS, open_store
from della_dist.storage.shard_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAMES,
    format_of,
    half_an_adapter,
    index_name,
    is_adapter,
    read_weight_map,
    unindexed_shards,
)
from della_dist.storage.shard_headers import open_shard
from della_dist.storage.store import Store
from della_dist.storage.strict_json import parse_object, paused_gc, plain_object
from della_dist.wording import few

#: Shards that are sampled at once: a disk or a file server answers many requests as soon as one.
_SAMPLING_THREADS = 16
#: A drive, a share, or folders with backslashes between them.
_OF_WINDOWS = re.compile(r"[A-Za-z]:[/\\]|[^/]*\\")
_MAX_DOCUMENT_BYTES = 10_000_000
#: Documents that are read with the headers.
DOCUMENTS = ("config.json",)
#: Several times what a merge of thousands of shards writes.
_MAX_MANIFEST_BYTES = 64 << 20
#: A stage has 32 bits in the key of the random words, and the next one must fit.
_MAX_STAGE = (1 << 32) - 2


def open_checkpoint(location: str) -> CheckpointIndex:
    """Read the headers of a checkpoint and check that it is whole; no tensor data is read.

    A checkpoint is a directory that holds, in this order of preference: an index
    (``model.safetensors.index.json``, or the only ``*.safetensors.index.json``) and its shards;
    ``model.safetensors``; exactly one ``*.safetensors`` file; a complete numbered set
    (``name-00001-of-00003.safetensors`` ...). Files that the index does not name are not part of
    the checkpoint (``consolidated.safetensors``). Where there are no safetensors files, the same of
    what ``torch.save`` wrote: ``pytorch_model.bin.index.json``, ``pytorch_model.bin``, one
    ``*.bin``, ``*.pt`` or ``*.pth`` file, a numbered set.

    Parameters
    ----------
    location : str
        A local directory (``~`` is expanded) or a URL.

    Returns
    -------
    CheckpointIndex
        Tensors by name in the order of the shards and of their data, and the small documents.

    Raises
    ------
    InputError
        If anything is missing, damaged or contradictory: what, in which file, what to do.
    UnreachableError
        If a remote store does not answer.
    """
    if not is_url(location):
        check_directory(location)
    store = open_store(location)
    with refused_as(InputError, f"checkpoint {location}"), paused_gc():
        return _open(store, location)


def open_adapter(location: str) -> CheckpointIndex:
    """Read the header and the configuration of an adapter of PEFT; no tensor data is read.

    Parameters
    ----------
    location : str
        A local directory (``~`` is expanded) or a URL, with ``adapter_config.json`` and
        ``adapter_model.safetensors`` or ``adapter_model.bin``; a model beside it counts for
        nothing.

    Raises
    ------
    InputError, UnreachableError
        As `open_checkpoint`.
    """
    if not is_url(location):
        check_directory(location)
    store = open_store(location)
    with refused_as(InputError, f"adapter {location}"), paused_gc():
        names, folders = store.children("")
        if not is_adapter(names):
            raise half_an_adapter(location, names)
        return _read_adapter(store, location, names, folders)


def _read_adapter(
    store: Store, location: str, names: Sequence[str], folders: Sequence[str]
) -> CheckpointIndex:
    name = next(name for name in ADAPTER_NAMES if name in names)
    ((shard, entries),) = _read_shards(store, [name], is_indexed=False)
    tensors: dict[str, TensorEntry] = {}
    _add(tensors, entries, [name], store)
    documents = {ADAPTER_CONFIG_NAME: _read_document(store, ADAPTER_CONFIG_NAME)}
    return CheckpointIndex(
        location, (shard,), tensors, tuple(names), documents, tuple(folders), is_adapter=True
    )


def _open(store: Store, location: str) -> CheckpointIndex:
    names, folders = store.children("")
    if not names and is_url(location):
        raise InputError(f"checkpoint {location} holds nothing. Check the URL.")
    if is_adapter(names) and not format_of(names).weights(names):  # an adapter alone
        return _read_adapter(store, location, names, folders)
    index = index_name(location, names)
    weight_map = None if index is None else read_weight_map(store, index)
    if weight_map is None:
        shard_names = unindexed_shards(location, names, store)
    else:
        shard_names = sorted(set(weight_map.values()))
        single = format_of(names).single
        if single in names and single not in shard_names:
            raise InputError(
                f"checkpoint {location} is two checkpoints: {index} with {len(shard_names)} "
                f"shards, and {single}, which the index does not name (transformers would "
                "load the latter). Move the one that is not meant out of the directory."
            )
    shards: list[ShardFile] = []
    tensors: dict[str, TensorEntry] = {}
    for shard, entries in _read_shards(store, shard_names, is_indexed=weight_map is not None):
        shards.append(shard)
        _add(tensors, entries, shard_names, store)
    if weight_map is not None:
        _compare(f"{location}: its index", weight_map, tensors, shard_names)
    if not tensors:
        raise InputError(f"checkpoint {location} holds no tensors. Download it again.")
    if ADAPTER_CONFIG_NAME in names and all(".lora_" in name for name in tensors):
        raise half_an_adapter(location, names)
    there = {*names, *folders}
    documents = {name: _read_document(store, name) for name in DOCUMENTS if name in there}
    stage = _stage(store) if MANIFEST_NAME in names else None
    return CheckpointIndex(
        location, tuple(shards), tensors, tuple(names), documents, tuple(folders), stage
    )


def with_samples(index: CheckpointIndex) -> CheckpointIndex:
    """Return a checkpoint whose shards have the digests of sampled blocks, if they are local.

    Raises
    ------
    InputError
        If a shard cannot be read.
    """
    if not index.shards:  # a model with adapters, whose files are those of others
        return index
    store = open_store(index.location)
    if store.is_remote:
        return index

    def sampled(shard: ShardFile) -> ShardFile:
        return replace(shard, sample=store.sample(shard.name, shard.size_bytes))

    with (
        refused_as(InputError, f"checkpoint {index.location}"),
        ThreadPoolExecutor(_SAMPLING_THREADS) as pool,
    ):
        return replace(index, shards=tuple(pool.map(sampled, index.shards)))


def check_directory(location: str) -> None:
    """Refuse a path that is no directory."""
    if "\0" in location:
        raise InputError(f"checkpoint {location!r}: a path cannot hold a NUL character.")
    path = local_path(location)
    if path.is_dir():
        return
    if path.exists():
        advice = "is not a directory. Give the directory that holds the safetensors files"
    else:
        advice = "does not exist. Check the path in the configuration"
    if _OF_WINDOWS.match(location) and not path.exists():
        advice = (
            f"{advice}: it is written as on Windows, and paths of this system have / between "
            "folders and begin at / or where you are"
        )
    elif not path.is_absolute():
        advice = f"{advice}; it was looked for at {absolute_path(path)}"
        if len(path.parts) == 1:
            advice = f"{advice} (a model on the Hub is named org/name)"
    raise InputError(f"checkpoint {location} {advice}.")


def _read_shards(
    store: Store, names: Sequence[str], *, is_indexed: bool
) -> Iterator[tuple[ShardFile, Sequence[TensorEntry]]]:
    """Return every shard and its tensors, in order."""

    def read(number: int) -> tuple[ShardFile, Sequence[TensorEntry]]:
        return _read_shard(store, names[number], number, is_indexed=is_indexed)

    if not store.is_remote:
        yield from map(read, range(len(names)))
        return
    with ThreadPoolExecutor(DEFAULT_CONNECTIONS) as pool:  # each takes a few round trips
        yield from pool.map(read, range(len(names)))


def _read_shard(
    store: Store, name: str, number: int, *, is_indexed: bool
) -> tuple[ShardFile, Sequence[TensorEntry]]:
    """Return one shard and its tensors."""
    path = store.describe(name)
    store.check(name)
    if is_indexed and not store.exists(name):
        raise InputError(
            f"{path} is missing: the index of the checkpoint names it. Download it again, or the "
            "download was not finished."
        )
    return open_shard(store, name, number)


def _add(
    tensors: dict[str, TensorEntry],
    entries: Sequence[TensorEntry],
    shard_names: Sequence[str],
    store: Store,
) -> None:
    """Add the tensors of a shard, refusing one that another shard has too."""
    for entry in entries:
        other = tensors.setdefault(entry.name, entry)
        if other is not entry:
            raise InputError(
                f"checkpoint {store.location}: tensor {entry.name!r} is both in "
                f"{shard_names[other.shard]} and in {shard_names[entry.shard]}. Remove the shard "
                "that does not belong to the model, or save the model again."
            )


def _compare(
    where: str,
    weight_map: Mapping[str, str],
    tensors: Mapping[str, TensorEntry],
    shard_names: Sequence[str],
) -> None:
    """Check that index and shards name the same tensors in the same places."""
    again = "Download the checkpoint again, or save it again with transformers."
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(
            f"checkpoint {where} places {len(absent)} tensors in shards that do not have them "
            f"({few(absent)}; the first in {weight_map[absent[0]]}). {again}"
        )
    unknown = [name for name in tensors if name not in weight_map]
    if unknown:
        shard = shard_names[tensors[unknown[0]].shard]
        raise InputError(
            f"checkpoint {where} does not know {len(unknown)} tensors of its shards "
            f"({few(unknown)}; the first in {shard}). {again}"
        )
    for name, entry in tensors.items():
        if weight_map[name] != shard_names[entry.shard]:
            raise InputError(
                f"checkpoint {where} places tensor {name!r} in {weight_map[name]}, but it is in "
                f"{shard_names[entry.shard]}. {again}"
            )


def _read_document(store: Store, name: str) -> Mapping[str, Any]:
    """Return a small JSON document."""
    path = store.describe(name)
    store.check(name)
    size_bytes = store.stat(name).size_bytes
    if size_bytes > _MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{path} has {size_bytes} bytes: too large for a configuration. Download it again."
        )
    try:
        return plain_object(parse_object(store.read(name), allow_constants=True))
    except ValueError as error:
        raise InputError(
            f"{path} is not a valid configuration: {error}. Download it again."
        ) from error


def _stage(store: Store) -> int:
    """Return the stage of the merge that this checkpoint is the output of, by its manifest."""
    path = store.describe(MANIFEST_NAME)
    size_bytes = store.stat(MANIFEST_NAME).size_bytes
    if size_bytes > _MAX_MANIFEST_BYTES:
        raise InputError(f"{path} has {size_bytes} bytes: too large for a manifest. Copy it again.")
    try:
        stage = load_manifest(store.read(MANIFEST_NAME)).get("stage", 0)
    except VerificationError as error:
        raise InputError(
            f"{path}: {error} It says whether this checkpoint is a merge, on which the random "
            "words of the next one depend."
        ) from error
    if type(stage) is not int or not 0 <= stage <= _MAX_STAGE:
        raise InputError(f"{path} is damaged: it has the stage {stage!r}. Copy it again.")
    return stage
