"""What an earlier run left is looked at again: what is not as it was written is merged again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from della_dist.config import MergeConfig
from della_dist.runtime.output.records import dump_task, load_task
from della_dist.runtime.verify import verify
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_output_store
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.interrupting import interrupt, interrupt_finishing
from tests.merging import config_for, run, save_family
from tests.remote import upload_inputs
from tests.staged import contents

SHARD_BYTES = 50_000
KEPT = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MergeConfig:
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


@pytest.fixture(scope="module")
def whole(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(config, out, shard_bytes=SHARD_BYTES).num_tasks > KEPT + 1
    return out


@pytest.fixture(scope="module")
def unfinished(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfinished") / "out"
    interrupt(config, out, after=KEPT, shard_bytes=SHARD_BYTES)
    return out


@pytest.fixture
def out(unfinished: Path, tmp_path: Path) -> Path:
    """Return a copy of an output with `KEPT` committed shards, to be damaged."""
    return Path(shutil.copytree(unfinished, tmp_path / "out"))


def flip(path: Path, position: int) -> None:
    """Change a byte; size and times stay as they are."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def record_paths(out: Path) -> list[Path]:
    return sorted((out / ".della" / "tasks").glob("*.json"))


def rename_a_tensor(out: Path) -> None:
    path = record_paths(out)[0]
    name = load_task(path.read_bytes()).tensors[0].name
    text = path.read_text()
    assert name in text
    path.write_text(text.replace(name, name[::-1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def shards(out: Path) -> list[Path]:
    """Return the shards that have a record, or all where there are none."""
    recorded = [load_task(path.read_bytes()).shard.name for path in record_paths(out)]
    return [out / name for name in recorded] or sorted(out.glob("model-*.safetensors"))


def empty_record(out: Path) -> None:
    """Leave out all tensors; the record's own digest is right."""
    path = record_paths(out)[0]
    path.write_bytes(dump_task(replace(load_task(path.read_bytes()), tensors=())))


def swap_records(out: Path) -> None:
    one, other = record_paths(out)[:2]
    shutil.copy(other, one)


def swap_shards(out: Path) -> None:
    one, other = shards(out)[:2]
    shutil.copy(other, one)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor's name in a record": (rename_a_tensor, "damaged"),
    "a record without tensors": (empty_record, "not of this merge"),
    "a record cut short": (lambda out: cut(record_paths(out)[0]), "damaged"),
    "a record of another task": (swap_records, "not of this merge"),
    "a header": (lambda out: flip(shards(out)[0], 20), "header"),
    "the first byte of the data": (lambda out: flip(shards(out)[0], 1000), "content"),
    "the last byte": (lambda out: flip(shards(out)[0], -1), "content"),
    "a shard cut short": (lambda out: cut(shards(out)[0]), "bytes, not"),
    "a shard that is gone": (lambda out: shards(out)[0].unlink(), "missing"),
    "a shard of another name": (swap_shards, "bytes, not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_or_shard_is_merged_again(
    config: MergeConfig, whole: Path, out: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    do, words = DAMAGES[damage]
    name = shards(out)[0].name
    do(out)
    with caplog.at_level(logging.INFO, "della_dist.run"):
        summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == KEPT - 1
    (line,) = [r.getMessage() for r in caplog.records if "merged again" in r.getMessage()]
    assert name in line
    assert words in line
    assert contents(out) == contents(whole)


def test_intact_shards_are_kept(config: MergeConfig, whole: Path, out: Path) -> None:
    before = {p: p.stat().st_ino for p in shards(out)}
    assert len(before) == KEPT
    summary = run(config, out, shard_bytes=SHARD_BYTES, verify_resumed=True)
    assert summary.tasks_resumed == KEPT
    assert {p: p.stat().st_ino for p in before} == before
    assert contents(out) == contents(whole)


def test_verify_resumed_reads_the_shards_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Large enough that samples leave something out.
    import numpy as np

    from tests.checkpoints import tensor

    data = tensor(np.random.default_rng(0).normal(0, 0.05, (1024, 2048)), "BF16")
    base, experts = save_family(tmp_path, {"a": data, "b": data}, num_experts=1)
    config = config_for(base, experts, parameters={"density": 0.5})
    options: dict[str, int] = {"shard_bytes": 1 << 22}
    expected = run(config, tmp_path / "whole", **options)
    assert expected.num_tasks == 2
    interrupt(config, tmp_path / "out", after=1, **options)
    flip(shards(tmp_path / "out")[0], 150_000)  # between the first block and the second
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    assert run(config, tmp_path / "again", **options).tasks_resumed == 1
    assert contents(tmp_path / "again") != contents(tmp_path / "whole")
    summary = run(config, tmp_path / "out", verify_resumed=True, **options)
    assert summary.tasks_resumed == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # Of a complete output, likewise.
    flip(shards(tmp_path / "out")[0], 150_000)
    assert run(config, tmp_path / "out", **options).tasks_resumed == 2
    caplog.set_level("INFO", "della_dist.run")
    assert run(config, tmp_path / "out", verify_resumed=True, **options).tasks_resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    name = shards(tmp_path / "out")[0].name
    assert f"{name} is merged again: its content was changed" in caplog.messages
    assert f"{tmp_path / 'out'} was complete, and is completed again" in caplog.messages
    # And its small files.
    flip(tmp_path / "out" / "model.safetensors.index.json", 3)
    assert run(config, tmp_path / "out", **options).already_complete
    assert contents(tmp_path / "out") != contents(tmp_path / "whole")
    assert run(config, tmp_path / "out", verify_resumed=True, **options).tasks_resumed == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def keep_shards(out: Path, count: int) -> None:
    for shard in shards(out)[count:]:
        shard.unlink()


LOSSES: dict[str, tuple[Callable[[Path], object], int]] = {
    "a shard": (lambda out: shards(out)[1].unlink(), 1),
    "the end of a shard": (lambda out: cut(shards(out)[1]), 1),
    "all of a shard's bytes": (lambda out: shards(out)[1].write_bytes(b""), 1),
    "all but two shards": (lambda out: keep_shards(out, 2), 6),
    "the configuration": (lambda out: (out / "config.json").unlink(), 0),
    "the end of the index": (lambda out: cut(out / "model.safetensors.index.json"), 0),
    "the card": (lambda out: (out / "README.md").unlink(), 0),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_complete_output_has_lost_is_made_again(
    config: MergeConfig, whole: Path, tmp_path: Path, loss: str
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    do, again = LOSSES[loss]
    inodes = {p.name: p.stat().st_ino for p in out.glob("model-*")}
    do(out)
    summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == summary.num_tasks - again
    assert contents(out) == contents(whole)
    now = {p.name: p.stat().st_ino for p in out.glob("model-*.safetensors")}
    assert sum(inodes[name] != inode for name, inode in now.items()) == again
    verify(str(out))


def test_without_its_table_a_complete_output_is_merged_again(
    config: MergeConfig, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / TENSORS_NAME).unlink()
    with caplog.at_level(logging.INFO, "della_dist.run"):
        summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == 0
    assert TENSORS_NAME in caplog.text
    assert contents(out) == contents(whole)


def test_a_complete_output_that_is_completed_again_may_be_killed(
    config: MergeConfig, whole: Path, tmp_path: Path
) -> None:
    for key in (".della/plan.json", ".della/tasks/00002.json", "config.json", MANIFEST_NAME):
        out = Path(shutil.copytree(whole, tmp_path / key.replace("/", "-")))
        shards(out)[1].unlink()
        interrupt_finishing(config, out, key, shard_bytes=SHARD_BYTES)
        summary = run(config, out, shard_bytes=SHARD_BYTES)
        assert summary.tasks_resumed >= summary.num_tasks - 1
        assert contents(out) == contents(whole)


def test_an_edited_card_outlives_a_repair(config: MergeConfig, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "README.md").write_text("# mine\n")
    assert run(config, out, shard_bytes=SHARD_BYTES).bytes_written == 0  # complete, as it is
    shards(out)[1].unlink()
    interrupt_finishing(config, out, MANIFEST_NAME, shard_bytes=SHARD_BYTES)
    run(config, out, shard_bytes=SHARD_BYTES)
    assert (out / "README.md").read_text() == "# mine\n"
    assert verify(str(out)).edited == ("README.md",)
    (out / "README.md").write_bytes((whole / "README.md").read_bytes())
    assert contents(out) == contents(whole)


def test_only_objects_of_another_version_are_read_again(
    config: MergeConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = upload_inputs(config, "memory://resume/in")
    out = "memory://resume/out"
    interrupt(remote, out, after=KEPT, shard_bytes=SHARD_BYTES)
    store = open_output_store(out)
    records = [load_task(store.read(key)) for key in store.list(".della/tasks/")]
    one, other = (record.shard.name for record in records[:2])
    store.put(one, store.read(one))  # an attempt that was thought dead committed the same bytes
    store.put(other, bytes(len(store.read(other))))
    read: list[str] = []
    real = type(store).read

    def note(self: object, key: str, *args: int) -> bytes:
        read.append(key)
        return real(self, key, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store), "read", note)
    summary = run(remote, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == KEPT - 1
    assert {key for key in read if key.startswith("model-")} == {one, other}
    assert verify(out).model_digest == verify(str(whole)).model_digest
