"""The cache of compiled kernels: when it is used, and that nothing wrong with it stops anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import della_dist
from della_dist.ops.cpu.support import source_digest
from tests.checkpoints import tensor
from tests.merging import config_for, save_family, write_config

SECOND_START = """
import json, sys
import numpy as np
from della_dist.ops.cpu import backend as numba_backend
from della_dist.ops.blocks import Block
from della_dist.ops.prepare import Ready, absorb, prepare
from della_dist.specs.recipe import MergeSettings, TensorRecipe

backend = numba_backend.NumbaBackend()
for rescale in ("inverse", "l1"):
    settings = MergeSettings(
        rescale=rescale, weights=(1.0,), densities=(0.5,), epsilons=(0.1,)
    )
    recipe = TensorRecipe("w", (4, 64), "BF16", ("BF16",), "BF16", settings)
    block = Block(0, 256, np.zeros(512, np.uint8), (np.zeros(512, np.uint8),))
    prepared = prepare(recipe)
    while not isinstance(prepared, Ready):
        prepared = absorb(recipe, prepared, backend.measure(recipe, prepared, block))
    backend.merge(recipe, prepared, block, np.empty(512, np.uint8))
stats = [k.stats for k in (numba_backend._merge_block, numba_backend._measure_block)]
json.dump({
    "file": numba_backend.__file__,
    "hits": sum(sum(s.cache_hits.values()) for s in stats),
    "misses": sum(sum(s.cache_misses.values()) for s in stats),
}, sys.stdout)
"""


def start_process(**environment: str) -> dict[str, Any]:
    """Use the kernels in a new process; return what its cache did."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "PYTHONPATH")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SECOND_START],
        env={**kept, **environment},
        cwd=environment["PYTHONPATH"],  # or the package here would come first
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.slow
def test_second_start_compiles_nothing(tmp_path: Path) -> None:
    """And a third one, that finds the cache damaged, says so in a line and merges all the same."""
    package = Path(della_dist.__file__).parent
    shutil.copytree(package, tmp_path / "della_dist", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = start_process(**environment)
    assert first["file"].startswith(str(tmp_path))
    assert (first["hits"], first["misses"]) == (0, 2)
    second = start_process(**environment)
    assert (second["hits"], second["misses"]) == (2, 0)
    base = {"w": tensor(np.random.default_rng(0).normal(size=(4, 64)), "BF16")}
    family = save_family(tmp_path, base, num_experts=1)
    config = write_config(
        tmp_path / "merge.yaml", config_for(*family, "ties", parameters={"density": 0.5})
    )

    def merge(name: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "della_dist", "merge", config, tmp_path / name],
            env={**os.environ, **environment},
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return run.stderr

    assert "cache" not in merge("before")
    files = list((tmp_path / "cache").rglob("*.nbc"))
    assert len(files) == 2
    assert not list((tmp_path / "della_dist").rglob("*.nbc"))  # which would outlive the package
    for file in files:
        file.write_bytes(b"")
    assert merge("damaged").count("is damaged: the kernels are compiled again") == 1
    assert all(file.stat().st_size for file in files)
    assert "cache" not in merge("after")
    shards = {
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("before", "damaged", "after")
    }
    assert len(shards) == 1


OPS = Path(della_dist.__file__).parent / "ops"


@pytest.mark.parametrize("name", sorted(str(path.relative_to(OPS)) for path in OPS.rglob("*.py")))
def test_any_file_of_the_kernels_counts(tmp_path: Path, name: str) -> None:
    """Whatever a kernel may call or take a constant from: no list has to name it."""
    folder = shutil.copytree(OPS, tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    assert source_digest(folder) == source_digest()
    with (folder / name).open("a") as file:
        file.write("\n# changed\n")
    assert source_digest(folder) != source_digest()


def test_a_file_that_comes_goes_or_is_renamed_counts(tmp_path: Path) -> None:
    folder = shutil.copytree(OPS, tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    digests = {source_digest(folder)}
    (folder / "cpu" / "new.py").write_text("")
    digests.add(source_digest(folder))
    (folder / "cpu" / "new.py").rename(folder / "cpu" / "newer.py")
    digests.add(source_digest(folder))
    (folder / "cpu" / "newer.py").write_text("ONE = 1\n")
    digests.add(source_digest(folder))
    (folder / "notes.txt").write_text("not code")
    assert len(digests | {source_digest(folder)}) == 4


#: A kernel that is compiled in no time, and what became of it.
SMALL_KERNEL = """
import json, sys
from della_dist.ops.cpu.support import entry

def make(source_digest):
    @entry
    def successor(x):
        _ = source_digest
        return x + 1
    return successor

first, second = make(int(sys.argv[1])), make(int(sys.argv[1]) + 1)
assert first(1) == second(1) == 2
print(json.dumps([sum(k.stats.cache_hits.values()) for k in (first, second)]))
"""


def start_small(
    folder: Path, digest: int = 1, env: Mapping[str, str] | None = None
) -> tuple[list[int], str]:
    """Use two kernels in a new process; return the hits of each, and what it said."""
    (folder / "kernel.py").write_text(SMALL_KERNEL)
    kept = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "kernel.py", str(digest)],
        env={**kept, **({"NUMBA_CACHE_DIR": str(folder / "cache")} if env is None else env)},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, bool(run.stdout)) == (0, True), run.stderr
    hits: list[int] = json.loads(run.stdout)
    return hits, run.stderr


def cached(folder: Path) -> list[Path]:
    """Return the files of the cache."""
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


def overwrite(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "garbage": lambda data: b"garbage\n" * 1000,
    "a bit of the key": lambda data: overwrite(data, 40),
    "a bit of the pickle": lambda data: overwrite(data, 70),
    "a bit of the code": lambda data: overwrite(data, len(data) * 2 // 3),
}


@pytest.mark.slow
def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path: Path) -> None:
    # The two kernels are versions of one, so that the second takes the place of the first.
    start_small(tmp_path)
    for what, damage in DAMAGES.items():
        (file,) = cached(tmp_path)
        file.write_bytes(damage(file.read_bytes()))
        hits, said = start_small(tmp_path)
        assert hits == [0, 0], what
        assert said.count("\n") == 1, said
        assert f"{file} is damaged" in said
        hits, said = start_small(tmp_path, digest=2)  # the last one of the start before
        assert (hits, said) == ([1, 0], ""), what


@pytest.mark.slow
def test_two_first_starts_at_once(tmp_path: Path) -> None:
    """Two actors of a fresh node both compile, and what they leave is good."""
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(start_small, tmp_path) for _ in range(4)]
        assert {start.result()[1] for start in starts} == {""}
    assert start_small(tmp_path, digest=2) == ([1, 0], "")


@pytest.mark.slow
@pytest.mark.parametrize("has_home", [True, False])
def test_where_kernels_are_cached(tmp_path: Path, has_home: bool) -> None:
    """In the user's folder; beside the package where there is none that can be written."""
    package, home = tmp_path / "package", tmp_path / "home"
    package.mkdir()
    # Root may write into folders of any mode; a file in the way holds everybody up.
    if has_home:
        home.mkdir()
        (package / "__pycache__").write_bytes(b"")
    else:
        home.write_bytes(b"")
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    assert start_small(package, env=env) == ([0, 0], "")
    assert start_small(package, digest=2, env=env) == ([1, 0], "")
    used = home if has_home else package / "__pycache__"
    assert any(path.is_file() for path in used.rglob("*successor*"))


@pytest.mark.slow
def test_nowhere_to_cache(tmp_path: Path) -> None:
    """In a container every folder may be read-only: the kernels are compiled at each start."""
    (tmp_path / "__pycache__").write_bytes(b"")
    env = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), "/dev/null/folder")
    for _ in range(2):
        assert start_small(tmp_path, env=env)[0] == [0, 0]


@pytest.mark.slow
def test_code_of_other_sources_is_not_run(tmp_path: Path) -> None:
    """Even under the very name: a start that was killed may leave it there."""
    start_small(tmp_path)
    (file,) = cached(tmp_path)
    assert start_small(tmp_path, digest=7) == ([0, 0], "")
    assert cached(tmp_path) == [file]  # in place of the old
    assert start_small(tmp_path, digest=8) == ([1, 0], "")


@pytest.mark.slow
def test_what_no_longer_loads_is_compiled(tmp_path: Path) -> None:
    """A digest that is right says nothing of other changes of the machine."""
    start_small(tmp_path)
    (file,) = cached(tmp_path)
    from della_dist.ops.cpu import cache as numba_cache

    key = file.read_bytes()[32:64]
    for content in (b"", b"garbage", b"\x80\x04N.", b"\x80\x04]."):
        file.write_bytes(numba_cache._digest(key + content) + key + content)
        hits, said = start_small(tmp_path, digest=2)
        assert hits == [0, 0]
        assert content == b"\x80\x04N." or str(file.parent) in said


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", ["folder", "loop"])
def test_a_file_that_cannot_be_read_or_written(tmp_path: Path, obstacle: str) -> None:
    start_small(tmp_path)
    (file,) = cached(tmp_path)
    file.unlink()
    if obstacle == "folder":
        (file / "in the way").mkdir(parents=True)
    else:
        file.symlink_to(file)
    hits, said = start_small(tmp_path)
    assert hits == [0, 0]
    assert said.count("\n") == 1
    assert str(file.parent) in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few pages."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=16", "tmpfs", str(cache)]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(cache)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk: Path) -> None:
    hits, said = start_small(small_disk)
    assert hits == [0, 0]
    assert said.count("\n") == 1
    assert str(small_disk / "cache") in said
    assert "No space left on device" in said
    assert cached(small_disk) == []
