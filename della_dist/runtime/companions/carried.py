"""The files beside the weights: configuration, tokenizer, modules, licence, carried over.

Planning lists, checks and hashes them (`find_companions`); when the shards are done they are copied
as a stream, and must be then what they were (`carry`). Which those are: `companion_names`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

from della_dist.errors import InputChangedError, InputError, refused_as
from della_dist.locations import place
from della_dist.planning.build import MergePlan
from della_dist.runtime.companions.made import CHAT_TEMPLATE_NAME, Made, made_files
from della_dist.runtime.companions.names import (
    is_carried,
    is_carried_folder,
    is_module_weights,
    is_of_tokenizer,
    is_worth_a_word,
    looks_like_a_file,
)
from della_dist.runtime.companions.small_files import (
    CHUNK_BYTES,
    FILES_AT_ONCE,
    JSON_MEM_FACTOR,
    checked_digest,
    chunks,
    parse_json,
    read_json,
    size_of,
)
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.manifest import FileRecord
from della_dist.storage.opening import open_store
from della_dist.storage.store import OutputStore, Store, check_key, folder_for_a_file
from della_dist.wording import few

#: More is no model's: the largest that people publish have some 200 files and 100 MB beside the
#: weights. Whoever keeps data or results in the folder of a checkpoint should hear of it.
MAX_FILES = 1_000
MAX_TOTAL_BYTES = 2 << 30
#: Folders that are looked into; each takes a round trip.
MAX_FOLDERS = 1_000


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """A small file of the output that is made here."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file of the output that is taken from the reference checkpoint."""

    name: str
    size_bytes: int
    sha256: str
    """Of the bytes that the plan was made with."""
    chunks: Callable[[], Iterable[bytes]]
    """Reads them again, a bounded part at a time; `InputChangedError` if they are others now."""


@dataclass(frozen=True, slots=True)
class Companions:
    """What the output takes over from the folder of the reference checkpoint."""

    records: tuple[FileRecord, ...]
    notes: tuple[str, ...]
    """What is left out, and what is taken over but not merged."""


def find_companions(plan: MergePlan, store_of: Callable[[str], Store] = open_store) -> Companions:
    """List, check and hash the files beside the weights of the reference checkpoint.

    Parameters
    ----------
    plan
        Of the merge.
    store_of
        Returns the store of a checkpoint's location.

    Raises
    ------
    InputError
        If one is a link out of the checkpoint or to nothing, no file, a pointer of git-lfs, empty
        or broken JSON, or if they are too many or too large: which, and what to do.
    """
    reference, tokenizer = plan.reference, plan.tokenizer
    store = store_of(reference.location)
    with refused_as(InputError, f"checkpoint {reference.location}"):
        modules = _modules(store, reference.files)
        names, left_out = _list(store, reference, plan, modules)
        notes = tuple(_notes(reference.location, names, left_out, modules))
        if tokenizer is reference:
            return Companions(_records(plan, reference, store, names, store_of), notes)
        ours = [name for name in names if not is_of_tokenizer(name)]
        records = _records(plan, reference, store, ours, store_of)
    store = store_of(tokenizer.location)
    with refused_as(InputError, f"checkpoint {tokenizer.location}"):
        names, _ = _list(store, tokenizer, plan, frozenset())
        theirs = [name for name in names if is_of_tokenizer(name)]
        records += _records(plan, tokenizer, store, theirs, store_of)
    return Companions(tuple(sorted(records, key=lambda record: record.name)), notes)


def _records(
    plan: MergePlan,
    checkpoint: CheckpointIndex,
    store: Store,
    names: Sequence[str],
    store_of: Callable[[str], Store],
) -> tuple[FileRecord, ...]:
    """Check and hash files of one checkpoint, and what is made of them."""
    made = made_files(plan, checkpoint, store, names, store_of)

    def record(name: str) -> FileRecord:
        if name in made:
            data = made[name]()
            return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())
        return FileRecord(name, *checked_digest(store, name))

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # remote files take round trips
        sizes = dict(zip(names, pool.map(partial(size_of, store), names), strict=True))
        _check_total(store, sizes)
        return tuple(pool.map(record, sorted({*names, *made})))


def companion_files(plan: MergePlan) -> list[CarriedFile]:
    """Return the files that `plan` takes over, ready to be copied; nothing is read yet."""
    sources: dict[bool, tuple[Store, Callable[[], Made]]] = {}
    for is_theirs, checkpoint in ((False, plan.reference), (True, plan.tokenizer)):
        store = open_store(checkpoint.location)
        make = partial(made_files, plan, checkpoint, store, plan.companion_bytes)
        sources[is_theirs] = store, cache(make)  # what they share is made once, for the first
    return [
        CarriedFile(
            name,
            size_bytes,
            plan.companions[name],
            partial(_planned, plan, *sources[is_of_tokenizer(name)], name),
        )
        for name, size_bytes in plan.companion_bytes.items()
    ]


def carry(file: CarriedFile, output: OutputStore) -> FileRecord:
    """Copy one file to the output.

    Raises
    ------
    InputChangedError
        If it does not hold any more what it held when the merge was planned; nothing is written.
    """
    with output.create(file.name, file.size_bytes) as writer:
        for chunk in file.chunks():
            writer.write(chunk)
        writer.commit()
    return FileRecord(file.name, file.size_bytes, file.sha256)


def _planned(plan: MergePlan, store: Store, made: Callable[[], Made], name: str) -> Iterator[bytes]:
    """Yield what a file held when the merge was planned, if it still does."""
    changed = InputChangedError(
        f"{store.describe(name)} was changed while the merge was running. The merged shards are "
        "kept: put the old file back and run the same command again, or merge anew with --restart."
    )
    size_bytes = plan.companion_bytes[name]
    make = made().get(name)
    is_new = name == CHAT_TEMPLATE_NAME and make is not None
    if not is_new and not (
        store.exists(name) and (make is not None or store.stat(name).size_bytes == size_bytes)
    ):
        raise changed
    try:
        if not is_new:
            store.check(name)
        parts = chunks(store, name, size_bytes) if make is None else [make()]
    except InputError as error:
        raise changed from error
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    if digest.hexdigest() != plan.companions[name]:
        raise changed


def companions_mem(plan: MergePlan) -> int:
    """Return the bytes that reading the files takes at most, before and after the shards are."""
    held = sorted(
        JSON_MEM_FACTOR * size if name.endswith(".json") else 2 * min(size, CHUNK_BYTES)
        for name, size in plan.companion_bytes.items()
    )
    policy = plan.config.tokenizer
    compared = 0 if plan.alignment is None else plan.alignment.mem
    if policy is not None and policy.source == "union":  # two at once, of the same tokens
        size = plan.companion_bytes.get("tokenizer.json", 0)
        compared = max(compared, 2 * JSON_MEM_FACTOR * size)
    return max(sum(held[-FILES_AT_ONCE:]), compared)


def _list(
    store: Store, checkpoint: CheckpointIndex, plan: MergePlan, modules: frozenset[str]
) -> tuple[list[str], list[str]]:
    """Return the files of a checkpoint that can be carried over, and the others, sorted."""
    inputs = {place(c.location, follow_links=True) for c in plan.inputs}
    shards = {shard.name for shard in checkpoint.shards}
    names: list[str] = []
    left_out: list[str] = []
    pending = [""]
    for folder in pending:  # grows while it is gone through
        files, folders = store.children(folder)
        for name in files:
            _check_name(store, name)
            if is_carried(name, modules):
                names.append(name)
            elif name not in shards:
                left_out.append(name)
        for name in folders:
            _check_name(store, name)
            if not is_carried_folder(name):
                left_out.append(f"{name}/")
                continue
            _check_folder(store, name)
            if place(store.describe(name), follow_links=True) not in inputs:
                pending.append(name)  # else another checkpoint of this merge
        if len(names) > MAX_FILES or len(pending) > MAX_FOLDERS:
            what, last = "files", names[-3:]
            if len(pending) > MAX_FOLDERS:
                what, last = "folders", pending[-3:]
            raise InputError(
                f"checkpoint {store.location} has more than {MAX_FILES} {what} beside its weights "
                f"({few(last)} ...), more than belong to a model. Move what does not belong to it "
                "out of its folder."
            )
    return sorted(names), sorted(left_out)


def _check_name(store: Store, name: str) -> None:
    """Refuse a name that not every store can take, or that a message cannot show."""
    try:
        check_key(name)
    except ValueError:
        is_good = False
    else:
        is_good = name.isprintable()
    if not is_good:
        raise InputError(
            f"checkpoint {store.location} has a file or folder called {name!r}, a name that not "
            "every store can hold. Rename or remove it."
        )


def _check_folder(store: Store, name: str) -> None:
    if looks_like_a_file(name):
        raise folder_for_a_file(store.describe(name))
    if store.links([name]):
        raise InputError(
            f"{store.describe(name)} is a link to a directory. Links to directories are not "
            "followed: replace it by the directory, or remove it."
        )


def _check_total(store: Store, sizes: Mapping[str, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_TOTAL_BYTES:
        largest = sorted(sizes, key=lambda name: sizes[name])[::-1][:3]
        shown = ", ".join(f"{name} has {sizes[name]}" for name in largest)
        raise InputError(
            f"checkpoint {store.location} has {total} bytes in files beside its weights ({shown}), "
            f"more than belong to a model ({MAX_TOTAL_BYTES}). Move what does not belong to it out "
            "of its folder."
        )


def _modules(store: Store, files: Iterable[str]) -> frozenset[str]:
    """Return the folders of the modules that sentence-transformers puts behind the model."""
    if "modules.json" not in files:
        return frozenset()
    content = parse_json(read_json(store, "modules.json"), store.describe("modules.json"))
    paths = (
        [m.get("path") for m in content if isinstance(m, dict)] if isinstance(content, list) else []
    )
    return frozenset(p.strip("/") for p in paths if isinstance(p, str) and p.strip("/"))


def _notes(
    location: str, names: Iterable[str], left_out: Iterable[str], modules: frozenset[str]
) -> Iterable[str]:
    if "config.json" not in names:
        yield (
            f"{location} has no config.json, and so the output has none: transformers does not "
            "load it without one."
        )
    if unmerged := [name for name in names if is_module_weights(name, modules)]:
        yield (
            f"{few(unmerged)}: weights of modules behind the model, taken over from {location} "
            "and not merged."
        )
    if unnamed := [name for name in left_out if is_worth_a_word(name)]:
        yield (
            f"{location}: left out, as weights in other formats, exports, quantisation or states "
            f"of training: {few(unnamed)}."
        )
