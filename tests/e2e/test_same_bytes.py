"""The same bytes whatever the threads, workers, memory, shard sizes, sharding and backend."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output
from della_dist.runtime.run import merge as run_merge
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.merge import merge_task
from della_dist.runtime.task.meter import Meter
from tests.checkpoints import make_experts, mixed_base, save_checkpoint
from tests.merging import config_for, run, save_family
from tests.staged import contents

MIB = 1 << 20


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return save_family(tmp_path_factory.mktemp("family"))


PARAMETERS: dict[str, dict[str, Any]] = {
    "della": {"density": 0.4},
    "ties": {"density": 0.4},
    "breadcrumbs_ties": {"density": 0.4, "gamma": [0.02, 0.3]},
    "arcee_fusion": {},
    "sce": {"select_topk": [0.2, 0.7]},
    "ramplus_tl": {"epsilon": 0.002, "r": 0.5},
    "slerp": {"t": [0.2, 0.9]},
    "model_stock": {"filter_wise": [{"filter": "mlp", "value": True}]},
}


@pytest.fixture(scope="module", params=PARAMETERS)
def config(request: pytest.FixtureRequest, family: tuple[Path, list[Path]]) -> MergeConfig:
    return configured(*family, request.param)


def configured(base: Path, experts: list[Path], method: str) -> MergeConfig:
    count = 1 if method in ("slerp", "arcee_fusion") else len(experts)
    return config_for(base, experts[:count], method, parameters=PARAMETERS[method], seed=7)


@pytest.fixture(scope="module")
def digest(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(config, tmp_path_factory.mktemp("once") / "out").model_digest


OPTIONS: list[dict[str, Any]] = [
    {"threads": 1, "workers": 1},
    {"threads": 2, "workers": 1},
    {"threads": 1, "workers": 2, "shard_bytes": 100_000},
    {"threads": 2, "workers": 2, "shard_bytes": 1},
    {"memory_bytes": 32 * MIB},
    {"memory_bytes": 1024 * MIB},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_run_options(
    config: MergeConfig, digest: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert run(config, tmp_path / "out", **options).model_digest == digest


def test_whole_files_are_equal(config: MergeConfig, tmp_path: Path) -> None:
    for name, options in (("a", {"threads": 1, "workers": 1}), ("b", {"threads": 3})):
        run(config, tmp_path / name, shard_bytes=100_000, **options)
    assert_equal_files(tmp_path / "a", tmp_path / "b")


def assert_equal_files(one: Path, other: Path) -> None:
    expected, found = contents(one), contents(other)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name


def test_torch_backend(config: MergeConfig, digest: str, tmp_path: Path) -> None:
    plan = open_plan(config, shard_bytes=100_000)
    output = open_output(str(tmp_path / "out"), plan, restart=False)
    assert isinstance(output, Output)
    output.begin()
    with ThreadPoolExecutor(2) as compute:
        budget = MemoryBudget(1024 * MIB, workers=1, threads=2)
        context = MergeContext(
            plan,
            TorchBackend("cpu"),
            budget,
            compute,
            Meter(),
            threading.Event(),
            InputStores(1),
        )
        for index in output.remaining:
            output.commit(merge_task(context, index, output.store, output.lease_token))
    assert output.finish([])["model_digest"] == digest
    # The statistics too, and so the digests of the files that they are in.
    run(config, tmp_path / "numba", shard_bytes=100_000)
    assert_equal_files(tmp_path / "out", tmp_path / "numba")


def test_inputs_resharded_and_reordered(digest: str, config: MergeConfig, tmp_path: Path) -> None:
    base = mixed_base()
    order = sorted(base, key=lambda name: name[::-1])
    save_checkpoint(tmp_path / "base", base, num_shards=4, order=order)
    experts = [
        save_checkpoint(tmp_path / f"expert{m}", expert, num_shards=m + 1, order=order[::-1])
        for m, expert in enumerate(make_experts(base, 3))
    ]
    moved = configured(tmp_path / "base", experts, config.merge_method)
    assert run(moved, tmp_path / "out").model_digest == digest


def test_seed_changes_the_bytes(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    digests = {
        run(
            config_for(*family, seed=seed, parameters={"density": 0.5}), tmp_path / str(seed)
        ).model_digest
        for seed in (1, 2)
    }
    assert len(digests) == 2


def test_interrupted_and_resumed(config: MergeConfig, digest: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop_after_two(goal: Any, snapshot: Any) -> None:
        commit = Output.commit
        done: list[Any] = []

        def commit_twice(self: Output, record: Any) -> None:
            if len(done) == 2:
                raise Stop
            done.append(record)
            commit(self, record)

        patch.setattr(Output, "commit", commit_twice)

    options = RunOptions(shard_bytes=100_000, workers=1, device="cpu")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        run_merge(config, str(out), options, watch=stop_after_two)
    assert not (out / "config.json").exists()
    assert not (out / "della_manifest.json").exists()
    summary = run_merge(config, str(out), options)
    assert summary.tasks_resumed == 2
    assert summary.model_digest == digest
    again = run_merge(config, str(out), options)
    assert again.tasks_resumed == again.num_tasks == summary.num_tasks
    assert again.bytes_read == 0
