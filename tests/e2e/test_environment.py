"""What surrounds the process: limits and variables under which it cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merging import config_for, save_family, write_config
from tests.sparse import link_checkpoint, save_sparse

ROOT = Path(__file__).parents[2]


def program(
    *arguments: Path | str, address_space_mib: int | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    limit = "unlimited" if address_space_mib is None else address_space_mib << 10
    command = [sys.executable, "-m", "della_dist", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'ulimit -v {limit}; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def check_refused(done: subprocess.CompletedProcess[str], out: Path, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("della-dist: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not out.exists()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, num_experts=1)
    return write_config(folder / "c.yaml", config_for(base, experts, parameters={"density": 0.5}))


@pytest.mark.parametrize("mib", [120, 400, 1023])
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_no_room_for_the_libraries(config: Path, tmp_path: Path, command: str, mib: int) -> None:
    """With less, OpenBLAS, llvmlite or LLVM end the process, each in its own way."""
    done = program(command, config, tmp_path / "out", address_space_mib=mib)
    check_refused(done, tmp_path / "out", f"{mib} MiB of address space", "ulimit -v", "1024 MiB")


def test_room_for_the_libraries(config: Path, tmp_path: Path) -> None:
    done = program("merge", config, tmp_path / "out", "--quiet", address_space_mib=1100)
    assert done.returncode == 0, done.stderr
    assert program("verify", tmp_path / "out", address_space_mib=1100).returncode == 0


def test_no_room_to_map_the_inputs(tmp_path: Path) -> None:
    base = save_sparse(tmp_path / "base", {"w": (1 << 14, 1 << 15)})  # 1 GiB
    expert = link_checkpoint(base, tmp_path / "expert")
    merge = config_for(base, [expert], parameters={"density": 0.5})
    config = write_config(tmp_path / "c.yaml", merge)
    done = program("merge", config, tmp_path / "out", "--quiet", address_space_mib=1100)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    for word in ("model-00001-of-00001.safetensors", "1100 MiB of address space", "ulimit -v"):
        assert word in done.stderr


def test_numba_told_not_to_compile(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command in ("merge", "plan"):
        check_refused(program(command, config, out, NUMBA_DISABLE_JIT="1"), out, "NUMBA_DISABLE")
    assert program("merge", config, out, "--quiet").returncode == 0
    done = program("verify", out, "--recompute", "1", NUMBA_DISABLE_JIT="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "NUMBA_DISABLE_JIT" in done.stderr
