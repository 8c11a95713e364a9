"""The Ray engine writes the same bytes as the local one, whatever the cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist.config import MergeConfig
from della_dist.config.space import Space
from della_dist.errors import ConfigError, InputError, OutputError, TensorDataError
from della_dist.runtime.engines.events import WorkerReady
from della_dist.runtime.engines.ray import calls as calls_module
from della_dist.runtime.engines.ray.answers import Death
from della_dist.runtime.engines.ray.calls import Calls
from della_dist.runtime.engines.ray.pool import RayPool
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output
from della_dist.runtime.search.at_once import _Here
from della_dist.runtime.search.run import Effort, search
from della_dist.runtime.search.scoring import scoring_of
from della_dist.runtime.task.meter import Meter
from della_dist.storage.opening import open_output_store
from della_dist.storage.run_history import RUN_NAME, load_history
from tests.adapters import save_adapter, save_llama
from tests.checkpoints import Tensor, make_experts, mixed_base, save_checkpoint, tensor
from tests.interrupting import interrupt
from tests.merging import config_for, run, save_family, write_config
from tests.remote import upload_inputs
from tests.servers.moto import s3_environment
from tests.servers.ray_cluster import RAY_ENVIRONMENT, RayCluster, ray_cluster
from tests.staged import NAMING, contents, document, staged
from tests.vocabularies import make_models

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[RayCluster]:
    """Run three nodes for all tests of this module; actors have the environment of their node."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(s3_endpoint).items():
            patch.setenv(name, value)
        with ray_cluster(3, 2) as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drivers speak to the cluster as it expects."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MergeConfig:
    """Return a merge of small local checkpoints."""
    base, experts = save_family(tmp_path_factory.mktemp("in"), num_shards=3)
    return config_for(base, experts, "della", parameters={"density": 0.4})


@pytest.fixture(scope="module")
def digest(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what the local engine makes of it."""
    return run(config, tmp_path_factory.mktemp("local") / "out").model_digest


def ray_run(config: MergeConfig, out: Path | str, address: str, **options: Any) -> Any:
    how = {"shard_bytes": 100_000, "threads": 1, "memory_bytes": 192 * MIB, **options}
    return run(config, out, engine="ray", address=address, **how)


def test_rows_that_are_moved(cluster: RayCluster, tmp_path: Path) -> None:
    """Actors are told which row is which, and read no tokenizer."""
    models = make_models(tmp_path / "models")
    experts = [models[name] for name in ("same", "a", "b", "moved")]
    config = config_for(models["base"], experts, "della", tokenizer_source="union")
    expected = run(config, tmp_path / "local").model_digest
    assert ray_run(config, tmp_path / "out", cluster.address, workers=2).model_digest == expected


def test_an_adapter_as_the_output(cluster: RayCluster, tmp_path: Path) -> None:
    """One task, on one actor, whose threads multiply as those of this machine do."""
    tensors = {n: t for n, t in mixed_base().items() if "model." in n and "experts" not in n}
    base, experts = save_family(tmp_path / "in", tensors, num_shards=3)
    config = config_for(base, experts, parameters={"density": 0.6}, output={"adapter": 5})
    expected = run(config, tmp_path / "local").model_digest
    found = ray_run(config, tmp_path / "out", cluster.address, workers=2, threads=2)
    assert found.model_digest == expected


def test_adapters(cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors read them by themselves; relative paths of the driver mean the same to them."""
    base = save_llama(tmp_path / "base")
    save_adapter(base, tmp_path / "a")
    save_adapter(base, tmp_path / "b", seed=2, use_dora=True)
    monkeypatch.chdir(tmp_path)
    config = config_for(Path("base"), [Path("base+./a"), Path("b")], "della")
    expected = run(config, tmp_path / "local").model_digest
    assert ray_run(config, tmp_path / "out", cluster.address, workers=2).model_digest == expected


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_same_bytes_on_three_nodes(
    cluster: RayCluster, config: MergeConfig, digest: str, tmp_path: Path, workers: int
) -> None:
    summary = ray_run(config, tmp_path / "out", cluster.address, workers=workers)
    assert summary.model_digest == digest
    assert summary.num_tasks > 4
    assert (summary.workers_lost, summary.tasks_retried) == (0, 0)
    assert summary.bytes_written > 0
    assert summary.bytes_read > summary.bytes_written
    again = ray_run(config, tmp_path / "out", cluster.address)
    assert again.tasks_resumed == summary.num_tasks
    found = load_history((tmp_path / "out" / RUN_NAME).read_bytes())
    (session,) = found.sessions
    assert (session.engine, session.bytes_read) == ("ray", summary.bytes_read)
    assert session.cpu_s > 0
    assert len(found.shards) == summary.num_tasks
    actors = {shard.worker for shard in found.shards}
    assert 1 <= len(actors) <= workers
    nodes = {int(actor.rpartition(" on node ")[2]) for actor in actors}
    assert nodes <= set(range(1, min(3, workers) + 1))
    assert all(shard.spent.bytes_read > 0 for shard in found.shards)


@pytest.mark.s3
def test_same_bytes_from_and_to_s3(
    cluster: RayCluster, config: MergeConfig, digest: str, s3_bucket: str
) -> None:
    remote = upload_inputs(config, f"s3://{s3_bucket}/in")
    summary = ray_run(remote, f"s3://{s3_bucket}/out", cluster.address, workers=3)
    assert summary.model_digest == digest
    assert not open_output_store(f"s3://{s3_bucket}/out").has_state()


def test_relative_locations(
    cluster: RayCluster,
    config: MergeConfig,
    digest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = config.normalized()
    for entry in content["models"]:
        entry["model"] = os.path.relpath(entry["model"], tmp_path)
    content["base_model"] = os.path.relpath(content["base_model"], tmp_path)
    monkeypatch.chdir(tmp_path)
    from della_dist.config import config_from_mapping

    summary = ray_run(config_from_mapping(content), "out", cluster.address, workers=2)
    assert summary.model_digest == digest
    assert (tmp_path / "out/della_manifest.json").exists()


def test_nodes_that_join_later_and_their_labels(
    cluster: RayCluster, config: MergeConfig, tmp_path: Path
) -> None:
    output = open_output(
        str(tmp_path / "out"), plan := open_plan(config, shard_bytes=50_000), restart=False
    )
    assert isinstance(output, Output)
    output.begin()
    # Each fills a node, and there are three.
    options = RunOptions(
        engine="ray", address=cluster.address, workers=4, threads=2, memory_bytes=64 * MIB
    )
    ready: list[WorkerReady] = []

    def wait_for(count: int, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while len(ready) < count and time.monotonic() < deadline_s:
            ready.extend(event for event in pool.poll(0.2) if isinstance(event, WorkerReady))

    with RayPool(plan, output, options, Meter()) as pool:
        pool.open()
        wait_for(3, 60)
        wait_for(4, 2)
        assert len({event.node for event in ready}) == 3
        labelled = cluster.add_node(labels={"disk": "a"})
        wait_for(4, 60)
    output.close()
    assert [e.node for e in ready if "disk=a" in e.labels] == [labelled.node_id]


def test_one_actor_a_gpu(
    cluster: RayCluster, config: MergeConfig, digest: str, tmp_path: Path
) -> None:
    """By default, where Ray says that a node has two; those without any beside are left alone.

    The machine has none in truth: under ``auto`` actors merge on their cores then.
    """
    node = cluster.add_node(num_gpus=2)
    try:
        out = tmp_path / "out"
        plan = open_plan(config, shard_bytes=50_000)
        output = open_output(str(out), plan, restart=False)
        assert isinstance(output, Output)
        output.begin()
        options = RunOptions(
            engine="ray", address=cluster.address, threads=1, memory_bytes=64 * MIB
        )
        ready: list[str] = []
        with RayPool(plan, output, options, Meter()) as pool:
            assert pool.num_starting == 2
            pool.open()
            deadline_s = time.monotonic() + 60
            while len(ready) < 2 and time.monotonic() < deadline_s:
                for event in pool.poll(0.2):
                    if isinstance(event, WorkerReady):
                        assert event.node == node.node_id
                        ready.append(pool.name(event.worker))
        output.close()
        assert sorted(name.rsplit(", ")[-1] for name in ready) == ["GPU 0)", "GPU 1)"]
        address = cluster.address
        summary = ray_run(config, out, address, device="auto", shard_bytes=50_000, restart=True)
        assert summary.model_digest == digest
    finally:
        cluster.remove_node(node)


def test_a_wrong_value_is_the_local_engines_error(cluster: RayCluster, tmp_path: Path) -> None:
    base = mixed_base()
    experts = make_experts(base, 2)
    name = "model.norm.weight"
    data = bytearray(experts[1][name].data)
    data[400:404] = b"\xff\xff\xff\x7f"  # NaN
    experts[1][name] = Tensor("F32", base[name].shape, bytes(data))
    paths = [save_checkpoint(tmp_path / f"e{m}", expert) for m, expert in enumerate(experts)]
    config = config_for(save_checkpoint(tmp_path / "base", base), paths)
    with pytest.raises(TensorDataError, match=r"tensor model.norm.weight of .*e1: 1 of the deltas"):
        ray_run(config, tmp_path / "out", cluster.address)
    assert not (tmp_path / "out").exists()


def test_no_cluster_at_the_address(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        ray_run(config, tmp_path / "out", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no running Ray cluster was found"):
        ray_run(config, tmp_path / "out", "auto")
    assert not (tmp_path / "out").exists()


def test_starts_ray_where_there_is_none(config: MergeConfig, digest: str, tmp_path: Path) -> None:
    # The address of a cluster that died is left behind; sockets want a short path.
    write_config(tmp_path / "config.yaml", config)
    command = [
        *(sys.executable, "-m", "della_dist", "merge", "config.yaml", "out", "--engine", "ray"),
        *("--shard-size", "100kB", "--threads", "1", "--json"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray/ray_current_cluster").write_text("127.0.0.1:1")
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_digest"] == digest
    assert "starting Ray on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_stages(cluster: RayCluster, tmp_path: Path) -> None:
    """One after another, each by a pool of its own; killed in between, it goes on."""
    base, experts = save_family(tmp_path / "in", num_shards=3)
    merges = staged(
        document(experts[:2], name="first", base_model=base),
        document(["first", experts[2]], base_model=base),
    )
    local = run(merges, tmp_path / "local", shard_bytes=100_000)
    out = tmp_path / "out"
    interrupted = out.with_name("out.stages") / "first"
    interrupt(merges, out, after=2, shard_bytes=100_000)
    assert (interrupted / ".della").exists()
    summary = ray_run(merges, out, cluster.address)
    assert summary.model_digest == local.model_digest
    assert summary.stages[0].model_digest == local.stages[0].model_digest
    assert summary.stages[0].tasks_resumed == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "local", "out"]
    assert contents(out, but=NAMING) == contents(tmp_path / "local", but=NAMING)


SCORE = """
import json, pathlib, sys
manifest = json.loads((pathlib.Path(sys.argv[1]) / "della_manifest.json").read_text())
a, b = (one["parameters"]["weight"] for one in manifest["config"]["models"])
print(-((a - 1.2) ** 2) - (b - 0.4) ** 2)
"""


def test_a_search(cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many trials are chosen and made at once as there are workers; elsewhere it is the same."""
    values = np.random.default_rng(0).normal(0, 0.05, (16, 24))
    base, experts = save_family(tmp_path / "in", {"w": tensor(values, "F32")}, num_experts=2)
    document = config_for(base, experts, "task_arithmetic").normalized()
    for one in document["models"]:
        one["parameters"] = {"weight": {"search": [0.0, 2.0]}}
    space = Space(document, "space.yaml")
    monkeypatch.chdir(tmp_path)
    Path("score.py").write_text(SCORE)
    scoring = scoring_of(space.config(space.first), f"{sys.executable} score.py {{model}}", (), 60)
    here = RunOptions(threads=1, memory_bytes=192 * MIB)
    there = replace(here, engine="ray", address=cluster.address, workers=2)

    def found(out: str, trials: int, options: RunOptions) -> tuple[Any, ...]:
        summary = search(space, out, scoring, Effort(trials), options=options)
        tried = [(one.values, one.score) for one in summary.trials]
        assert len(tried) == trials
        return tried, summary.model_digest

    whole = found("on Ray", 13, there)  # from the 11th on, they follow from those before
    with pytest.raises(OutputError, match=r"began with 2 trials at once.*--workers 2"):
        search(space, "on Ray", scoring, Effort(14), options=replace(there, workers=3))
    monkeypatch.setattr(_Here, "num_at_once", 2)
    assert found("here", 13, here) == whole
    monkeypatch.setattr(_Here, "num_at_once", 1)
    assert found("on Ray", 15, here) == found("here", 15, here)  # two by two all the same


def _function(index: int, options: RunOptions) -> Callable[[str], str]:
    def answer(word: str) -> str:
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "refuse":
            raise InputError("it is refused")
        return f"{word}, {options.threads} thread"

    return answer


def test_calls(cluster: RayCluster) -> None:
    """One that ends its worker is made again by another, and given up; the others go on."""
    options = RunOptions(engine="ray", address=cluster.address, workers=2, threads=1)
    with Calls(_function, options) as calls:
        answers = dict(calls.map(["a", "die", "b", "c"]))
        assert isinstance(answers.pop(1), Death)
        assert answers == {0: "a, 1 thread", 2: "b, 1 thread", 3: "c, 1 thread"}
        with pytest.raises(InputError, match="it is refused"):
            list(calls.map(["refuse"]))


def test_calls_where_not_all_actors_have_room(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that have take every call, and what was asked for is said to be missing."""
    monkeypatch.setattr(calls_module, "SAY_S", 0.0)
    options = RunOptions(engine="ray", address=cluster.address, workers=5, threads=2)
    with Calls(_function, options) as calls:  # three nodes have two cores each
        for _ in range(2):
            answers = dict(calls.map([str(i) for i in range(7)]))
            assert answers == {i: f"{i}, 2 thread" for i in range(7)}
        assert dict(calls.map(["one"])) == {0: "one, 2 thread"}
    (said,) = [one.getMessage() for one in caplog.records if "no room" in one.getMessage()]
    assert "of 5 workers have not started" in said
