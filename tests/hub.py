"""Models on the Hub of a test."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from della_dist.config import MergeConfig, config_from_mapping
from tests.merging import config_for, save_family
from tests.servers.hub import Hub, add_commit

_numbers = itertools.count()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def publish(hub: Hub, folder: Path, name: str, branch: str = "main") -> str:
    """Upload a checkpoint as ``user/name``; return the commit."""
    return add_commit(hub.folder, name, files_of(folder), branch)


class Family:
    """A base and its experts, in local folders and under the same last names on the Hub."""

    def __init__(self, hub: Hub, folder: Path, num_experts: int = 3, **how: Any) -> None:
        self.base, self.experts = save_family(folder / "local", num_experts=num_experts, **how)
        self.user = f"user{next(_numbers)}"
        self.commits = {}
        for path in (self.base, *self.experts):
            (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
            (path / "sub").mkdir()
            (path / "sub" / "more.json").write_text(json.dumps({"of": path.name}))
            self.commits[path.name] = publish(hub, path, self.name(path))

    def name(self, path: Path) -> str:
        """Return what a checkpoint is called on the Hub."""
        return f"{self.user}/{path.name}"

    def local_config(self, method: str = "della", **keys: Any) -> MergeConfig:
        """Return the configuration of the local merge."""
        return config_for(self.base, self.experts, method, **keys)

    def config(
        self, method: str = "della", *, names: Mapping[str, str] | None = None, **keys: Any
    ) -> MergeConfig:
        """Return that of the same merge from the Hub; `names` may say how some are called."""
        content = self.local_config(method, **keys).normalized()

        def called(location: str) -> str:
            path = Path(location)
            return (names or {}).get(path.name, self.name(path))

        content["base_model"] = called(content["base_model"])
        for model in content["models"]:
            model["model"] = called(model["model"])
        return config_from_mapping(content, "test")
