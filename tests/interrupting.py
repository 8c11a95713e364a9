"""Merges that stop in the middle, as if they had been killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig
from della_dist.runtime.output.commit import Output
from tests.merging import run


class Killed(BaseException):
    """Stands for kill -9: nothing catches it to tidy up."""


def interrupt(config: MergeConfig, out: Path | str, *, after: int, **options: Any) -> None:
    """Merge until `after` shards are committed."""
    commit = Output.commit

    def commit_some(self: Output, record: Any) -> None:
        if len(self.committed) == after:
            raise Killed
        commit(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "commit", commit_some)
        with pytest.raises(Killed):
            run(config, out, workers=1, **options)


def interrupt_finishing(config: MergeConfig, out: Path | str, at: str, **options: Any) -> None:
    """Merge until the file `at` is to be written."""
    from della_dist.storage.local.store import LocalStore

    put, create = LocalStore.put, LocalStore.create

    def put_some(self: LocalStore, key: str, data: bytes) -> Any:
        if key == at:
            raise Killed
        return put(self, key, data)

    def create_some(self: LocalStore, key: str, size_bytes: int) -> Any:
        if key == at:
            raise Killed
        return create(self, key, size_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", put_some)
        patch.setattr(LocalStore, "create", create_some)
        with pytest.raises(Killed):
            run(config, out, workers=1, **options)
