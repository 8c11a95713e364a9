"""Merges of merges for tests: several documents, and the same by hand, one merge after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from della_dist.config import MergeConfig, parse_config
from della_dist.locations import of_parts
from della_dist.storage.run_history import RUN_NAME
from tests.merging import run

#: Name the inputs, which lie elsewhere and are other merges.
NAMING = ("README.md", "della_manifest.json")


def document(
    models: Sequence[object], method: str = "della", name: str | None = None, **keys: Any
) -> dict[str, Any]:
    """Return a document that merges `models`, with weights that differ."""
    listed = [
        {"model": str(model), "parameters": {"weight": 1.0 - 0.25 * m}}
        for m, model in enumerate(models)
    ]
    named = {} if name is None else {"name": name}
    shared = {} if method in ("linear", "passthrough") else {"parameters": {"density": 0.5}}
    content = {**named, "merge_method": method, "models": listed, **shared, **keys}
    return {k: str(v) if isinstance(v, Path) else v for k, v in content.items()}


def text_of(*documents: dict[str, Any]) -> str:
    """Return a configuration of several documents."""
    return yaml.safe_dump_all(documents, sort_keys=False)


def staged(*documents: dict[str, Any]) -> MergeConfig:
    """Return what several documents mean."""
    return parse_config(text_of(*documents), "merge.yaml")


def by_hand(config: MergeConfig, folder: Path, **options: Any) -> Path:
    """Make every stage by a run of its own, in `folder`, then the output; return where that is."""
    where: dict[str, str] = {}
    for merge in (*config.stages, replace(config, stages=())):
        places = {
            place: of_parts(place, lambda part: where.get(part, part))
            for place in merge.locations()
        }
        out = folder / (merge.name or "output")
        run(replace(merge.with_locations(places), name=None), out, **options)
        if merge.name is not None:
            where[merge.name] = str(out)
    return out


def contents(folder: Path, *, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Return every file below a folder whose bytes are promised: all but how a merge was run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (*but, RUN_NAME)
    }
