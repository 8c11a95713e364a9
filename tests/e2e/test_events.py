"""What happened before a run failed is kept in its output: for people, and in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from della_dist.config import MergeConfig
from della_dist.errors import InputChangedError, RunError, StorageError, TensorDataError
from della_dist.runtime.task.meter import Meter
from tests.interrupting import interrupt
from tests.merging import config_for, run, save_family

SHARD_BYTES = 50_000
EVENTS = Path(".della", "events.log")


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


def when_written(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let something happen in the middle of the first task, once."""
    wrote = Meter.wrote
    told = iter([happens])

    def tell(self: Meter, num_bytes: int) -> None:
        wrote(self, num_bytes)
        next(told, lambda: None)()

    monkeypatch.setattr(Meter, "wrote", tell)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("restart", [False, True])
def test_kept_until_the_output_is_complete(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    out = tmp_path / "out"
    for reason in ("the first", "the second"):  # which takes the place of the first
        with monkeypatch.context() as patched:
            error = RunError(reason)
            when_written(patched, lambda error=error: fail(error))  # type: ignore[misc]
            with pytest.raises(RunError, match=reason):
                run(config, out, shard_bytes=SHARD_BYTES)
        *events, last = (out / EVENTS).read_text().splitlines()
        assert last == f"RunError: {reason}"
        assert "Failed(" in events[-1]
        assert "Abort(" in events[-1]
    run(config, out, shard_bytes=SHARD_BYTES, restart=restart)
    assert not (out / ".della").exists()


def test_of_an_input_that_was_changed(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Path(config.models[1].model, "model.safetensors")
    when_written(monkeypatch, changed.touch)
    with pytest.raises(InputChangedError, match="was changed"):
        run(config, tmp_path / "out")
    assert "InputChangedError: " in (tmp_path / "out" / EVENTS).read_text()


def test_a_refusal_leaves_none(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=2, shard_bytes=SHARD_BYTES)
    when_written(monkeypatch, lambda: fail(TensorDataError("not finite")))
    with pytest.raises(TensorDataError, match="not finite"):
        run(config, out, shard_bytes=SHARD_BYTES)
    assert (out / ".della" / "plan.json").exists()
    assert not (out / EVENTS).exists()


def test_a_failed_write_of_a_run_that_was_taken_over(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an upload that the other run aborted, a store may say anything."""
    out = tmp_path / "out"

    def taken_over() -> None:
        (out / ".della" / "lock").unlink()
        raise StorageError("Internal Server Error")

    when_written(monkeypatch, taken_over)
    with pytest.raises(RunError, match="taken over by another run"):
        run(config, out)


def test_another_run_is_not_written_into(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    when_written(monkeypatch, (out / ".della" / "lock").unlink)
    with pytest.raises(RunError, match="taken over by another run"):
        run(config, out)
    assert not (out / EVENTS).exists()


def test_whatever_ends_a_worker_ends_the_run(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would hear of it otherwise, and wait for ever."""

    def leave() -> None:
        raise SystemExit("gone")

    when_written(monkeypatch, leave)
    with pytest.raises(SystemExit, match="gone"):
        run(config, tmp_path / "out")
