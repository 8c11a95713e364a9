"""Merges of one configuration whose bytes must be the same, however they are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist import verify
from della_dist.config import MergeConfig
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.planning.layout import MIB
from della_dist.runtime.engines import local
from della_dist.specs.statistics import TensorStats
from della_dist.storage.tensor_table import TENSORS_NAME, load_tensors
from tests.interrupting import interrupt
from tests.merging import run


def assert_the_same_bytes(
    wanted: MergeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check it over threads, workers, memory, shard sizes, an interruption, and both backends.

    What is measured of every tensor must be the same, too.
    """
    once = run(wanted, folder / "once", memory_bytes=1024 * MIB)
    for i, options in enumerate(
        (
            {"threads": 1, "workers": 1},
            {"threads": 3, "workers": 2, "shard_bytes": 20_000},
            {"memory_bytes": 32 * MIB},
        )
    ):
        assert run(wanted, folder / str(i), **options).model_digest == once.model_digest
        assert measured(folder / str(i)) == measured(folder / "once")
    interrupt(wanted, folder / "again", after=1, shard_bytes=20_000)
    resumed = run(wanted, folder / "again", shard_bytes=20_000)
    assert resumed.tasks_resumed == 1
    assert resumed.model_digest == once.model_digest
    assert measured(folder / "again") == measured(folder / "once")
    assert len(verify(folder / "once", recompute=5).recomputed) == 5
    monkeypatch.setattr(local, "choose_backend", lambda *_: TorchBackend("cpu"))
    assert run(wanted, folder / "torch").model_digest == once.model_digest
    assert measured(folder / "torch") == measured(folder / "once")


def measured(out: Path) -> dict[str, TensorStats | None]:
    """Return the statistics of the tensors of an output."""
    records = load_tensors((out / TENSORS_NAME).read_bytes())
    return {record.name: record.stats for record in records}
