"""What an earlier run left, and what becomes of it: discarded when asked, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig
from della_dist.errors import OutputError
from della_dist.runtime.output import Output
from della_dist.storage.local import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from tests.merging import config_for, run, save_family


class Killed(BaseException):
    """Stands for kill -9: nothing catches it to tidy up."""


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_restart_discards_an_output_of_another_merge(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, out, shard_bytes=50_000)
    (out / "notes.txt").write_text("mine")
    other = config.with_seed(5)
    with pytest.raises(OutputError, match=r"config\.seed was 0, now 5.*--restart"):
        run(other, out)
    run(other, out, restart=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    run(other, tmp_path / "elsewhere")
    assert contents(out) == contents(tmp_path / "elsewhere")


@pytest.mark.parametrize("survivors", range(6))
def test_a_restart_that_is_killed_goes_on_without_being_asked_again(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    out = tmp_path / "out"
    run(config, out, shard_bytes=50_000)
    other = config.with_seed(5)
    delete = LocalStore.delete
    done: list[str] = []

    def delete_some(self: LocalStore, key: str) -> None:
        if len(done) == survivors:
            raise Killed
        done.append(key)
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", delete_some)
        with pytest.raises(Killed):
            run(other, out, restart=True)
    if survivors == 0:  # the manifest still stands: this is the old output, with a note
        with pytest.raises(OutputError):
            run(other, out)
        run(other, out, restart=True)
    else:
        assert not (out / MANIFEST_NAME).exists()
        run(other, out)
    run(other, tmp_path / "elsewhere")
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_records_left_by_a_kill_right_after_the_manifest(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(self: LocalStore) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete_state", killed)
        with pytest.raises(Killed):
            run(config, out)
    assert (out / ".della").exists()
    summary = run(config, out)
    assert summary.tasks_resumed == summary.num_tasks
    assert not (out / ".della").exists()


def test_a_changed_companion_file_is_another_merge(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, out)
    assert config.base_model is not None
    (Path(config.base_model) / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(OutputError, match=r"companions\.config\.json was"):
        run(config, out)


def test_nothing_is_discarded_before_the_run_is_sure_to_start(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(config, out)
    before = contents(out)

    def refuse(device: Any) -> None:
        raise OutputError("no such device")

    monkeypatch.setattr("della_dist.runtime.local.choose_backend", refuse)
    with pytest.raises(OutputError, match="no such device"):
        run(config.with_seed(1), out, restart=True)
    assert contents(out) == before


def test_two_runs_that_start_at_once(config: MergeConfig, tmp_path: Path) -> None:
    from della_dist.runtime.existing import open_output
    from della_dist.runtime.inputs import open_plan

    plan = open_plan(config)
    first, second = (open_output(str(tmp_path / "out"), plan, restart=False) for _ in range(2))
    assert isinstance(first, Output)
    assert isinstance(second, Output)
    first.begin()
    with pytest.raises(OutputError, match="being written by another run"):
        second.begin()
    first.close()
    with pytest.raises(OutputError, match="written by another run just now"):
        second.begin()
