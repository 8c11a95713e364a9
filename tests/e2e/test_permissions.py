"""What may not be read or written is refused before anything is written, with status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.merging import config_for, save_family, write_config

#: Root may read and write anything, unless it gives that up: these are its capabilities for it.
AS_ANYBODY = """
import ctypes, os, sys
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
if os.geteuid() == 0:
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            sys.exit(99)
os.execv(sys.executable, [sys.executable, "-m", "della_dist", *sys.argv[1:]])
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    base, experts = save_family(tmp_path, num_experts=1, config={"model_type": "llama"})
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    return write_config(tmp_path / "config.yaml", config_for(base, experts))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[list[Path]]:
    """Take the rights away from what the test appends; give them back in the end."""
    paths: list[Path] = []
    yield paths
    for path in paths:
        path.chmod(0o700)


def refused(*arguments: str | Path) -> str:
    """Run the command as a user without rights of its own, and return what it says."""
    command = [sys.executable, "-c", AS_ANYBODY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 99:
        pytest.skip("this user may not give up its rights")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("della-dist: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def both(config: Path, out: Path) -> str:
    """Run `plan` and `merge`; return what the latter says."""
    refused("plan", config, out)
    return refused("merge", config, out, "--quiet")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_an_input_that_may_not_be_read(
    config: Path, tmp_path: Path, locked: list[Path], name: str
) -> None:
    path = tmp_path / "base" / name
    locked.append(path)
    path.chmod(0)
    assert str(path) in both(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [0o500, 0o600, 0])
@pytest.mark.parametrize("where", ["out", "parent/out"])
def test_an_output_that_may_not_be_written(
    config: Path, tmp_path: Path, locked: list[Path], where: str, mode: int
) -> None:
    out = tmp_path / where
    folder = out if where == "out" else out.parent
    folder.mkdir()
    locked.append(folder)
    folder.chmod(mode)
    assert str(folder) in both(config, out)
    folder.chmod(0o700)
    assert list(folder.iterdir()) == []


def test_a_state_that_may_not_be_written(config: Path, tmp_path: Path, locked: list[Path]) -> None:
    state = tmp_path / "out" / ".della"
    state.mkdir(parents=True)
    (state / "old").touch()
    locked.append(state)
    state.chmod(0o500)
    assert str(state) in refused("merge", config, tmp_path / "out", "--quiet")
    assert [path.name for path in state.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["n" * 256, "/".join(["n" * 250] * 17)], ids=["name", "path"])
def test_an_output_whose_name_is_too_long(config: Path, tmp_path: Path, name: str) -> None:
    before = sorted(os.listdir(tmp_path))  # noqa: PTH208
    assert "too long" in both(config, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before  # noqa: PTH208
