"""Whether a file is still the one that was planned: here, and on a machine with a copy of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from della_dist.errors import InputChangedError
from della_dist.runtime.task.inputs import InputReaders, InputStores
from della_dist.specs.checkpoint import CheckpointIndex, FileVersion, ShardFile
from della_dist.specs.sources import Stored
from della_dist.storage.checkpoint import open_checkpoint, with_samples
from della_dist.storage.local.store import LocalStore
from tests.checkpoints import Tensor, save_checkpoint

NAME = "model.safetensors"


@pytest.fixture
def planned(tmp_path: Path) -> CheckpointIndex:
    path = save_checkpoint(tmp_path / "there", {"a": Tensor("U8", (100,), bytes(100))})
    return with_samples(open_checkpoint(str(path)))


def shard_of(checkpoint: CheckpointIndex) -> tuple[LocalStore, ShardFile]:
    return LocalStore(checkpoint.location), checkpoint.shards[0]


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def test_file_system_that_numbers_files_anew(planned: CheckpointIndex) -> None:
    # As those that run in user space do, with files that nobody touched.
    store, shard = shard_of(planned)
    version = FileVersion.parse(shard.version)
    assert version is not None
    renumbered = replace(shard, version=str(replace(version, inode=version.inode + 1)))
    store.refuse_changed(renumbered)
    with pytest.raises(InputChangedError, match="another file has taken its place"):
        store.refuse_changed(replace(renumbered, sample="another"))
    other = replace(version, inode=version.inode + 1, ctime_ns=version.ctime_ns - 1)
    with pytest.raises(InputChangedError, match="another file has taken its place"):
        store.refuse_changed(replace(shard, version=str(other)))


def copy_of(planned: CheckpointIndex) -> CheckpointIndex:
    """Return the checkpoint at another place, as a plan of another machine names it."""
    here = Path(planned.location).parent / "here"
    shutil.copytree(planned.location, here, copy_function=shutil.copyfile)
    return replace(planned, location=str(here))


def test_copy_on_another_machine(planned: CheckpointIndex) -> None:
    store, shard = shard_of(copy_of(planned))
    with pytest.raises(InputChangedError):  # not on this one
        store.refuse_changed(shard)
    seen = store.as_seen_here(shard)
    assert seen.version == store.stat(NAME).version != shard.version
    store.refuse_changed(seen)
    original, same = shard_of(planned)
    assert original.as_seen_here(same) == planned.shards[0]


def test_other_content_on_another_machine(planned: CheckpointIndex) -> None:
    store, shard = shard_of(copy_of(planned))
    change(store.path(NAME))
    with pytest.raises(InputChangedError, match="other content here"):
        store.as_seen_here(shard)
    os.truncate(store.path(NAME), 50)
    with pytest.raises(InputChangedError, match="now 50"):
        store.as_seen_here(shard)


def test_shared_file_that_was_written_to(planned: CheckpointIndex) -> None:
    store, shard = shard_of(planned)
    store.path(NAME).touch()
    with pytest.raises(InputChangedError, match="written to since"):
        store.as_seen_here(shard)


def test_worker_keeps_to_what_it_saw_first(planned: CheckpointIndex) -> None:
    copy = copy_of(planned)
    stores = InputStores(1, planned_elsewhere=True)

    def read() -> None:
        with InputReaders([copy], stores, lambda _: None, 0) as readers:
            data = readers.bytes_of(Stored(0, copy.tensors["a"]))
            data.view(0, 100)

    read()
    read()
    path = Path(copy.location) / NAME
    shutil.copyfile(path, path.with_name("again"))
    path.with_name("again").replace(path)
    with pytest.raises(InputChangedError, match="another file has taken its place"):
        read()
