"""The commands as functions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import della_dist
from della_dist import Goal, RunOptions, Snapshot
from della_dist.config import config_from_mapping, load_config
from della_dist.errors import ConfigError, DellaDistError, VerificationError
from tests.merging import config_for, save_family, write_config


def test_merge_plan_verify(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    path = write_config(tmp_path / "merge.yaml", config_for(base, experts, seed=3))
    out = tmp_path / "out"
    planned = della_dist.plan(path, out, RunOptions(threads=1))
    assert planned.num_tasks == 1
    assert not out.exists()
    summary = della_dist.merge(str(path), out, RunOptions(threads=1, memory_bytes=64 << 20))
    assert summary.num_tensors == planned.num_tensors
    assert della_dist.verify(out, recompute=2).model_digest == summary.model_digest
    for same in (yaml.safe_load(path.read_text()), load_config(path)):
        assert della_dist.merge(same, out).tasks_resumed == 1
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError):
        della_dist.verify(out)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration whose locations are paths."""
    base, experts = save_family(tmp_path_factory.mktemp("family"), num_experts=2)
    return {
        "merge_method": "dare_linear",
        "base_model": base,
        "models": [{"model": expert} for expert in experts],
        "parameters": {"density": 0.5},
    }


def test_paths_sizes_and_seed(config: dict[str, Any], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"memory_bytes": "64 MiB", "shard_bytes": "100kB"}
    options = RunOptions(seed=3, **sizes)
    assert (options.memory_bytes, options.shard_bytes) == (64 << 20, 100_000)
    planned = della_dist.plan(config, tmp_path / "out", options)
    assert (planned.allowed_mem, planned.shard_bytes) == (64 << 20, 100_000)
    merged = della_dist.merge(config, tmp_path / "out", options)
    one: Any = np.int64(1)
    written = della_dist.merge({**config, "seed": 3}, tmp_path / "written", RunOptions(threads=one))
    unseeded = della_dist.merge(config, tmp_path / "unseeded")
    assert merged.num_tasks == planned.num_tasks > 1
    assert merged.model_digest == written.model_digest != unseeded.model_digest


def test_watch(config: dict[str, Any], tmp_path: Path) -> None:
    seen: list[tuple[Goal, Callable[[], Snapshot]]] = []
    summary = della_dist.merge(
        config, tmp_path / "out", watch=lambda goal, look: seen.append((goal, look))
    )
    ((goal, look),) = seen
    assert goal.num_tasks == summary.num_tasks
    assert look().tasks_done == summary.num_tasks
    assert look().bytes_read == summary.bytes_read


def test_a_plan_is_what_the_command_prints(config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "merge.yaml", config_from_mapping(config))
    for out in (None, tmp_path / "out"):
        where = [str(out)] if out else []
        command = [sys.executable, "-m", "della_dist", "plan", str(path), *where, "--json"]
        printed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        described = della_dist.plan(path, out).to_dict()
        assert list(printed) == list(described)
        assert json.loads(json.dumps(described)) == printed
        assert ("output" in printed) == (out is not None)


def test_everything_public_is_there() -> None:
    for name in della_dist.__all__:
        assert getattr(della_dist, name) is not None
        assert name in dir(della_dist)
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        _ = della_dist.merg


def test_importing_is_cheap() -> None:
    code = "import sys, della_dist; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"numpy", "pydantic", "yaml", "click", "numba", "torch", "ray", "pyarrow", "rich"}
    assert heavy.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("wrong", [{"threads": 1}, 3, "local"])
def test_what_are_no_options(config: dict[str, Any], tmp_path: Path, wrong: Any) -> None:
    for call in (della_dist.merge, della_dist.plan):
        with pytest.raises(ConfigError, match="must be a RunOptions"):
            call(config, tmp_path / "out", wrong)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("engine", "spark", "'spark'; it must be auto or local or ray"),
        ("engine", None, "auto or local or ray"),
        ("device", "tpu", "'tpu'; it must be auto or cpu or cuda"),
        ("device", ["cpu"], "auto or cpu or cuda"),
        ("engine", np.array(["auto", "ray"]), "auto or local or ray"),
        ("threads", np.array([1, 2]), "whole number"),
        ("memory_bytes", np.array([1, 2]), "whole number"),
        ("threads", "2", "'2'; it must be a whole number"),
        ("threads", 0, "from 1 to 1024"),
        ("threads", True, "whole number"),
        ("workers", 2.0, "whole number"),
        ("workers", -1, "from 1 to 1024"),
        ("memory_bytes", 1, "at least 32 MiB"),
        ("memory_bytes", None, "whole number"),
        ("memory_bytes", 1e9, "whole number or text such as '256MiB'"),
        ("memory_bytes", "much", "'much' is no size"),
        ("memory_bytes", "9" * 30, "no size"),
        ("shard_bytes", 0, "at least 1 byte"),
        ("shard_bytes", "0", "at least 1 byte"),
        ("shard_bytes", -5, "at least 1 byte"),
        ("restart", "yes", "True or False"),
        ("restart", 1, "True or False"),
        ("verify_resumed", None, "True or False"),
        ("lease", "no", "True or False"),
        ("address", "", "HOST:PORT"),
        ("address", 8265, "HOST:PORT"),
        ("seed", -1, "from 0 to"),
        ("seed", "3", "whole number"),
        ("seed", 2**64, "from 0 to"),
        ("locality", "/data/*:disk=a", "texts like"),
        ("locality", [3], "texts like"),
        ("locality", 3, "texts like"),
    ],
)
def test_wrong_options(option: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunOptions(**{option: value})
    assert option in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("wrong", [None, [], 3, b"merge.yaml", object(), [("seed", 1)]])
def test_what_is_no_configuration(tmp_path: Path, wrong: Any) -> None:
    for call in (della_dist.merge, della_dist.plan):
        with pytest.raises(ConfigError, match="must be a mapping"):
            call(wrong, tmp_path / "out")


def test_a_local_run_has_no_address() -> None:
    with pytest.raises(ConfigError, match="--address is for --engine ray"):
        RunOptions(engine="local", address="auto")


def test_a_plan_knows_whether_ray_is_there(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options in (RunOptions(engine="ray"), RunOptions(address="auto")):
        with pytest.raises(ConfigError, match="needs Ray, which is not installed"):
            della_dist.plan(config, options=options)


def test_the_options_are_described() -> None:
    described = RunOptions.__doc__ or ""
    for option in fields(RunOptions):
        assert f"\n{option.name}\n    {option.metadata['said']}\n" in described


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"here"


def test_a_configuration_by_a_path_of_bytes(tmp_path: Path) -> None:
    path: Any = BytesPath()
    for call in (della_dist.merge, della_dist.plan):
        with pytest.raises(ConfigError, match="its path must be text"):
            call(path, tmp_path / "out")


@pytest.mark.parametrize(
    "out", [None, b"out", BytesPath(), 3, "", " ", "a\0b", "s3:/bucket/x", Path("s3://b/x")]
)
def test_what_is_no_output(
    config: dict[str, Any], tmp_path: Path, out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for call in (della_dist.merge, della_dist.verify) + ((della_dist.plan,) if out else ()):
        arguments = (out,) if call is della_dist.verify else (config, out)
        with pytest.raises(DellaDistError) as caught:
            call(*arguments)
        assert caught.value.exit_code == 2
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("count", [-1, "2", 1.0, True, None])
def test_wrong_recompute(tmp_path: Path, count: Any) -> None:
    with pytest.raises(ConfigError, match="recompute"):
        della_dist.verify(tmp_path, recompute=count)


def test_a_program_may_change_its_directory(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative output is what it was when the merge began."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    della_dist.merge(config, "out", watch=lambda *_: os.chdir(tmp_path / "elsewhere"))
    assert della_dist.verify(tmp_path / "out").num_tensors
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_process_of_the_caller_is_left_as_it_is(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[tuple[int, int]] = []
    monkeypatch.setattr("della_dist.storage.libc.mallopt", lambda *call: tuned.append(call))

    def process() -> tuple[object, ...]:
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return (threading.excepthook, sys.excepthook, sys.stdout, sys.stderr, *handlers)

    before = process()
    della_dist.merge(config, tmp_path / "out")
    one: Any = np.int64(1)
    della_dist.verify(tmp_path / "out", recompute=one)
    url = f"memory://{tmp_path.name}/out"
    della_dist.plan(config, url)
    assert (process(), tuned) == (before, [])
    # A run with a remote store has to: its memory would not be bounded.
    della_dist.merge(config, url)
    assert process() == before
    assert tuned
