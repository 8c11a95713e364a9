"""A link where the merge writes is refused: nothing that it points to is changed or removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from della_dist.config import MergeConfig
from della_dist.errors import DellaDistError, OutputError, StorageError
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.interrupting import interrupt
from tests.merging import config_for, run, save_family

SHARD_BYTES = 50_000


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MergeConfig:
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


@pytest.fixture(scope="module", params=["new", "unfinished", "finished"])
def state(
    request: pytest.FixtureRequest, config: MergeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return an output in some state."""
    out = tmp_path_factory.mktemp("state") / "out"
    if request.param == "new":
        out.mkdir()
    elif request.param == "unfinished":
        interrupt(config, out, after=2, shard_bytes=SHARD_BYTES)
    else:
        run(config, out, shard_bytes=SHARD_BYTES)
    return out


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Return a folder of somebody else's; it is the same afterwards."""
    folder = tmp_path / "target"
    for name in ("file", "tmp/file", "tasks/00000.json", "plan.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, object]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


FOLDERS = (".della", ".della/tmp", ".della/tasks")
FILES = (
    ".della/lock",
    ".della/plan.json",
    ".della/finishing.json",
    ".della/events.log",
    ".della/tasks/00000.json",
    "model-00001-of-00008.safetensors",
    "model-00008-of-00008.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "README.md",
    TENSORS_NAME,
    RUN_NAME,
    MANIFEST_NAME,
)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_link_in_the_output_is_refused(
    config: MergeConfig, state: Path, tmp_path: Path, target: Path, name: str, restart: bool
) -> None:
    out = Path(shutil.copytree(state, tmp_path / "out"))
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pointed_to = target if name in FOLDERS else target / "file"
    if path.is_file() and not path.name.startswith("lock"):  # its content is right, elsewhere
        pointed_to = tmp_path / "elsewhere"
        path.rename(pointed_to)
    elif path.is_dir():
        shutil.rmtree(path)
    path.symlink_to(pointed_to)
    before = snapshot(out)
    with pytest.raises(OutputError, match="has links where the merge writes") as caught:
        run(config, out, shard_bytes=SHARD_BYTES, restart=restart)
    assert name in str(caught.value)
    assert snapshot(out) == before
    assert path.is_symlink()


def test_the_output_itself_may_be_a_link(config: MergeConfig, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    run(config, tmp_path / "out")
    assert (tmp_path / "real" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("kind", ["hard link", "FIFO", "folder"])
def test_a_lock_that_is_something_else(
    config: MergeConfig, tmp_path: Path, target: Path, kind: str
) -> None:
    lock = tmp_path / "out" / ".della" / "lock"
    lock.parent.mkdir(parents=True)
    if kind == "hard link":
        os.link(target / "file", lock)
    elif kind == "FIFO":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(OutputError, match="lock"):
        run(config, tmp_path / "out")


# Links that are put there after the look at the output, which only the system can refuse.


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.mark.parametrize("name", FOLDERS)
def test_no_write_goes_through_a_link_to_a_folder(
    store: LocalStore, target: Path, name: str
) -> None:
    store.put(".della/tasks/1.json", b"{}")
    shutil.rmtree(store.root / name, ignore_errors=True)
    (store.root / name).symlink_to(target)
    for write in (
        lambda: store.put(".della/tasks/00000.json", b"x"),
        lambda: store.put("x", b"x"),
        lambda: store.delete(".della/tasks/00000.json"),
        lambda: store.delete(".della/plan.json"),
        lambda: store.lock("me").release(),
        store.clear_staging,
    ):
        with suppress(DellaDistError):  # one that does not go that way may do its work
            write()
    with pytest.raises(StorageError):
        store.put({".della/tasks": ".della/tasks/00000.json"}.get(name, "x"), b"x")


def test_no_lock_goes_through_a_link(store: LocalStore, target: Path) -> None:
    (store.root / ".della").mkdir(parents=True)
    (store.root / ".della/lock").symlink_to(target / "file")
    with pytest.raises(OutputError, match="lock"):
        store.lock("me")
    (store.root / ".della/lock").unlink()
    held = store.lock("me")
    (store.root / ".della/lock").unlink()
    (store.root / ".della/lock").symlink_to(target / "file")
    with pytest.raises(StorageError):
        store.is_held(held.token)
    held.release()
    assert (store.root / ".della/lock").is_symlink()


def test_a_link_with_the_name_of_a_file_is_replaced(store: LocalStore, target: Path) -> None:
    store.root.mkdir()
    (store.root / "x").symlink_to(target / "file")
    store.put("x", b"new")
    assert (store.root / "x").read_bytes() == b"new"
    assert not (store.root / "x").is_symlink()


def test_removing_the_state_leaves_what_its_links_point_to(store: LocalStore, target: Path) -> None:
    store.put(".della/tasks/1.json", b"{}")
    for name in ("link", "tmp/link", "tasks/link"):
        (store.root / ".della" / name).parent.mkdir(exist_ok=True)
        (store.root / ".della" / name).symlink_to(target)
    (store.root / ".della" / "tmp" / "file").symlink_to(target / "file")
    store.clear_staging()
    assert not (store.root / ".della/tmp").exists()
    store.put("x", b"")
    store.delete_state()
    assert [p.name for p in store.root.iterdir()] == ["x"]


def test_which_names_are_taken(store: LocalStore) -> None:
    assert store.taken(["a", "b/c"]) == []
    store.put("file", b"")
    (store.root / "folder").mkdir()
    (store.root / "link").symlink_to("nowhere")
    os.mkfifo(store.root / "fifo")
    names = ["absent", "fifo", "file", "file/inside", "folder", "folder/inside", "link"]
    assert store.taken(names) == ["fifo", "file", "file/inside", "folder", "link"]


def test_which_names_are_links(store: LocalStore, target: Path) -> None:
    assert store.links(["a", "b/c"]) == []
    store.put("file", b"")
    (store.root / "link").symlink_to(target)
    (store.root / "dangling").symlink_to("nowhere")
    names = ["absent", "dangling", "file", "link/tmp/file", "link/x"]
    assert store.links(names) == ["dangling", "link"]
