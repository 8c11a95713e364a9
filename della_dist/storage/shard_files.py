"""Which safetensors files make up a checkpoint: its index, or the files' names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from della_dist.errors import InputError
from della_dist.locations import is_url, local_path
from della_dist.storage.store import Store
from della_dist.storage.strict_json import object_at, parse_object
from della_dist.wording import few

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: How git-lfs's stand-ins for files begin, then and now.
LFS_POINTERS = (b"version https://git-lfs", b"version https://hawser")
LFS_HEAD_BYTES = max(map(len, LFS_POINTERS))
_MAX_INDEX_BYTES = 100_000_000
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5,6})-of-(?P<count>[0-9]{5,6})\.safetensors")
_MAX_REVISIONS = 5


def index_name(location: str, names: Sequence[str]) -> str | None:
    """Return the name of the index, or None where there is none."""
    found = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(found) > 1 and INDEX_NAME not in found:
        raise InputError(
            f"checkpoint {location} has {len(found)} indexes ({few(found)}) and none is called "
            f"{INDEX_NAME}. Keep the one that is meant in a directory of its own."
        )
    return INDEX_NAME if INDEX_NAME in found else found[0] if found else None


def unindexed_shards(location: str, names: Sequence[str], store: Store) -> list[str]:
    """Return the shards of a checkpoint without an index."""
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    if not found:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and is_lfs_pointer(store, pickles[0]):
            raise InputError(
                f"checkpoint {location} holds no weights, only pointers of git-lfs to them "
                f"({few(pickles)}). Run 'git lfs pull' there, or download it with 'hf download'."
            )
        if pickles:
            raise InputError(
                f"checkpoint {location} holds no safetensors files, only pickles "
                f"({few(pickles)}), which are never loaded: they can run code. Convert it first "
                "(load it with transformers and save_pretrained, which writes safetensors)."
            )
        snapshots = _snapshots(location)
        if snapshots:
            raise InputError(
                f"checkpoint {location} is a model's folder in a Hugging Face cache; its files are "
                f"in its snapshots. Give {' or '.join(snapshots)}."
            )
        raise InputError(
            f"checkpoint {location} holds no safetensors files. Give the directory that has "
            f"{INDEX_NAME} or {SINGLE_NAME}."
        )
    sets: dict[tuple[str, str], list[str]] = {}
    for name in found:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match["stem"], match["count"]), []).append(name)
    if len(found) == 1 and not sets:
        return found
    if len(sets) == 1 and len(next(iter(sets.values()))) == len(found):
        ((stem, count),) = sets
        width = len(count)
        expected = [
            f"{stem}-{number:0{width}}-of-{count}.safetensors"
            for number in range(1, min(int(count), 10 * len(found)) + 1)
        ]
        missing = sorted(set(expected) - set(found))
        if missing or len(found) != int(count):
            raise InputError(
                f"checkpoint {location} has {len(found)} of {int(count)} shards: missing "
                f"{few(missing)}. Download the rest."
            )
        return found
    raise InputError(
        f"checkpoint {location} has {len(found)} safetensors files and no index that says which "
        f"belong to it ({few(found)}). Keep one model's files in the directory, or add its "
        f"{INDEX_NAME}."
    )


def _snapshots(location: str) -> list[str]:
    """Return the revisions that a model's folder of a Hugging Face cache holds.

    The one called ``main``, if it is known, or the first few.
    """
    if is_url(location):
        return []
    root = local_path(location)
    try:
        revisions = sorted(path.name for path in (root / "snapshots").iterdir() if path.is_dir())
        main = root / "refs" / "main"
        named = main.read_text().strip() if main.is_file() else ""
    except (OSError, ValueError):
        return []
    chosen = [named] if named in revisions else revisions[:_MAX_REVISIONS]
    return [str(root / "snapshots" / revision) for revision in chosen]


def is_lfs_pointer(store: Store, key: str) -> bool:
    """Tell whether a file is one that git-lfs puts in the place of another."""
    store.check(key)
    size_bytes = store.stat(key).size_bytes
    return store.read(key, 0, min(size_bytes, LFS_HEAD_BYTES)).startswith(LFS_POINTERS)


def read_weight_map(store: Store, index_name: str) -> dict[str, str]:
    """Return the index's map of tensor names to file names, each name checked to lie inside."""
    path = store.describe(index_name)
    size_bytes = store.stat(index_name).size_bytes
    if size_bytes > _MAX_INDEX_BYTES:
        raise InputError(
            f"{path} has {size_bytes} bytes: too large for an index. Download it again."
        )
    try:
        weight_map = object_at(parse_object(store.read(index_name)), "weight_map")
    except ValueError as error:
        raise InputError(f"{path} is not a valid index: {error}. Download it again.") from error
    result = {}
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InputError(
                f"{path} is not a valid index: the file of {name[:200]!r} is no string. "
                "Download it again."
            )
        if shard not in checked:
            _check_name(store, index_name, shard)
            checked.add(shard)
        result[name] = shard
    if not result:
        raise InputError(f"{path} names no tensors. Download it again.")
    return result


def _check_name(store: Store, index_name: str, shard: str) -> None:
    """Refuse a file name, written in an index, that is spelled to lead out of the checkpoint."""
    path = store.describe(index_name)
    if "\0" in shard or any(part in ("", ".", "..") for part in shard.split("/")):
        raise InputError(
            f"{path} points to {shard[:200]!r}, which is not the name of a file inside the "
            "checkpoint. Do not use this checkpoint unless you trust it; download it again."
        )
    if not shard.endswith(".safetensors"):
        raise InputError(
            f"{path} points to {shard[:200]!r}, which is no safetensors file. Convert the "
            "checkpoint to safetensors first."
        )
