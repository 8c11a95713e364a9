"""Checkpoints in object stores, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.storage.opening import open_output_store


def upload(folder: Path, location: str) -> str:
    """Copy the files of a local directory to `location`; return that."""
    store = open_output_store(location)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return location


def upload_inputs(config: MergeConfig, root: str) -> MergeConfig:
    """Copy every checkpoint of `config` to below `root`; return what reads them there."""
    content: dict[str, Any] = config.normalized()
    models = content["models"]
    for m, entry in enumerate(models):
        entry["model"] = upload(Path(entry["model"]), f"{root}/expert{m}")
    if content.get("base_model"):
        content["base_model"] = upload(Path(content["base_model"]), f"{root}/base")
    return config_from_mapping(content, "test")


def download(location: str, folder: Path) -> Path:
    """Copy everything at `location` to a local directory; return that."""
    store = open_output_store(location)
    for key in store.list():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    return folder
