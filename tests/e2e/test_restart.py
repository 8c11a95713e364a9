"""What an earlier run left, and what becomes of it: discarded when asked, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, OutputError, RunError
from della_dist.runtime.engines.local import LocalPool
from della_dist.runtime.output.commit import Output
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from tests.interrupting import Killed, interrupt, interrupt_finishing
from tests.merging import config_for, run, save_family
from tests.staged import contents


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


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

    def refuse(*given: Any) -> None:
        raise OutputError("no such device")

    monkeypatch.setattr("della_dist.runtime.engines.local.choose_backend", refuse)
    with pytest.raises(OutputError, match="no such device"):
        run(config.with_seed(1), out, restart=True)
    assert contents(out) == before


def test_two_runs_that_start_at_once(config: MergeConfig, tmp_path: Path) -> None:
    from della_dist.runtime.open_plan import open_plan
    from della_dist.runtime.output.existing import open_output

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


#: Files of a person's own, of kinds that a checkpoint may have beside its weights.
MINE = ("eval.py", "train.py", "vocab.txt", "README.md", "tokenizer.json", "notes/config.json")


def put_mine(out: Path, names: tuple[str, ...] = MINE) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"my {name}")


def assert_mine(out: Path, names: tuple[str, ...] = MINE) -> None:
    for name in names:
        assert (out / name).read_text() == f"my {name}"


def test_a_restart_leaves_files_that_the_run_has_not_written(
    config: MergeConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=2, shard_bytes=50_000)
    others = tuple(name for name in MINE if name != "README.md")
    put_mine(out, others)
    run(config.with_seed(5), out, restart=True)
    assert_mine(out, others)
    assert len(list(out.glob("*.safetensors"))) == 1  # none of the run that was discarded


def test_a_restart_of_an_unfinished_run_leaves_a_card_that_it_has_not_written(
    config: MergeConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=2, shard_bytes=50_000)
    put_mine(out)
    before = contents(out)
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"holds README\.md, which"):
            run(config, out, restart=restart, shard_bytes=50_000)
        assert contents(out) == before


def test_a_restart_discards_what_was_written_last(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt_finishing(config, out, MANIFEST_NAME, shard_bytes=50_000)
    assert (out / "README.md").exists()
    (out / "notes.txt").write_text("mine")
    run(config.with_seed(5), out, restart=True)
    (out / "notes.txt").unlink()
    run(config.with_seed(5), tmp_path / "elsewhere")
    assert contents(out) == contents(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "at", [".della/finishing.json", "config.json", "model.safetensors.index.json", MANIFEST_NAME]
)
def test_a_kill_while_the_last_files_are_written(
    config: MergeConfig, tmp_path: Path, at: str
) -> None:
    out = tmp_path / "out"
    interrupt_finishing(config, out, at, shard_bytes=50_000)
    summary = run(config, out, shard_bytes=50_000)
    assert summary.tasks_resumed == summary.num_tasks
    run(config, tmp_path / "elsewhere", shard_bytes=50_000)
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_files_of_other_names_are_no_reason_to_refuse(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ("eval.py", "vocab.txt", ".gitattributes", "runs/1/config.json")
    put_mine(out, names)
    run(config, out)
    assert_mine(out, names)
    assert run(config, out).tasks_resumed == 1
    assert_mine(out, names)


def test_what_is_put_there_during_the_run_is_not_overwritten(
    config: MergeConfig, tmp_path: Path
) -> None:
    from della_dist.runtime.options import RunOptions
    from della_dist.runtime.run import merge

    out = tmp_path / "out"

    def watch(goal: object, snapshot: object) -> None:
        put_mine(out)

    options = RunOptions(device="cpu", shard_bytes=50_000)
    with pytest.raises(RunError, match=r"README\.md in .* would be overwritten"):
        merge(config, str(out), options, watch=watch)
    assert_mine(out)
    assert not (out / "config.json").exists()
    (out / "README.md").rename(out / "my_card.md")
    summary = run(config, out, shard_bytes=50_000)
    assert summary.tasks_resumed == summary.num_tasks
    assert (out / "my_card.md").read_text() == "my README.md"


def test_a_plan_that_is_lost_is_no_licence(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=2, shard_bytes=50_000)
    plan = out / ".della/plan.json"
    plan.write_bytes(plan.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"plan\.json is damaged.*--restart"):
        run(config, out, shard_bytes=50_000)
    with pytest.raises(OutputError, match=r"holds model-\S+, which"):
        run(config, out, shard_bytes=50_000, restart=True)
    # The records are intact, and one shard was committed without one: whose is it?
    recorded = {json.loads(p.read_text())["name"] for p in (out / ".della/tasks").iterdir()}
    (unrecorded,) = (p for p in out.glob("model-*") if p.name not in recorded)
    unrecorded.unlink()
    assert run(config, out, shard_bytes=50_000, restart=True).tasks_resumed == 0
    run(config, tmp_path / "elsewhere", shard_bytes=50_000)
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_records_without_a_plan_count_for_nothing(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=2, shard_bytes=50_000)
    (out / ".della/plan.json").unlink()
    for shard in out.glob("model-*"):
        shard.unlink()
    assert run(config, out, shard_bytes=50_000).tasks_resumed == 0


def test_a_refusal_leaves_nothing_behind(config: MergeConfig, tmp_path: Path) -> None:
    """A second run is refused at the lock, or right after it: what it made is gone again."""
    from della_dist.runtime.open_plan import open_plan
    from della_dist.runtime.output.existing import open_output

    plan = open_plan(config)
    out = tmp_path / "deep" / "out"
    late = open_output(str(out), plan, restart=False)
    assert isinstance(late, Output)
    run(config, out)
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(OutputError, match="written by another run just now"):
        late.begin()
    assert sorted(p.name for p in out.iterdir()) == before


def test_an_engine_that_is_refused_once_the_output_is_begun_leaves_nothing(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalPool) -> None:
        assert (tmp_path / "out/.della/plan.json").exists()
        raise ConfigError("no such engine")

    monkeypatch.setattr(LocalPool, "open", refuse)
    with pytest.raises(ConfigError, match="no such engine"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_would_be_loaded_with_the_model(
    config: MergeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    (out / "eval.py").write_text("pass")
    run(config, out)
    (said,) = [r.getMessage() for r in caplog.records if "may be loaded" in r.getMessage()]
    assert "tokenizer.json" in said
    assert "eval.py" not in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "quantize_config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"quantize_config.json, which no merge wrote"):
        run(config, tmp_path / "other")
