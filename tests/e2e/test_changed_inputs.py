"""Inputs that change while they are read, or between two runs: never a mixture in silence."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from della_dist.cli import main
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import InputChangedError, OutputError
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.inputs import MAX_OPEN_SHARDS
from della_dist.runtime.task.meter import Meter
from della_dist.runtime.verify import verify
from tests.checkpoints import Tensor, load_tensors, mixed_base, tensor
from tests.merging import config_for, expected_tensors, run, save_family, write_config
from tests.sparse import link_checkpoint, save_sparse

SHARD_BYTES = 100_000


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path, config={"model_type": "llama"})
    return config_for(base, experts, parameters={"density": 0.5})


def expert(config: MergeConfig, number: int = 1) -> Path:
    return Path(config.models[number].model) / "model.safetensors"


# While it is read.


def in_place(path: Path) -> None:
    """As rsync --inplace does: the same file, the same size, the old time of modification."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size // 2)
        byte = file.read(1)[0]
        file.seek(stat.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def written(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)


def replaced(path: Path) -> None:
    stat = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "in place": (in_place, "its status was changed"),
    "written": (written, "it was written to"),
    "replaced": (replaced, "another file has taken its place"),
    "cut": (cut, r"its size was \d+ bytes, now \d+"),
    "longer": (longer, r"its size was \d+ bytes, now \d+"),
    "removed": (Path.unlink, "it is not there any more"),
}


def change_when(
    monkeypatch: pytest.MonkeyPatch, event: str, change: Callable[[], None], after: int = 0
) -> None:
    """Do it once, when the meter is told of an event, which is in the middle of a task."""
    told = getattr(Meter, event)
    calls = 0

    def tell(self: Meter, num_bytes: int) -> None:
        nonlocal calls
        told(self, num_bytes)
        calls += 1
        if calls == after + 1:
            change()

    monkeypatch.setattr(Meter, event, tell)


@pytest.mark.parametrize("change", CHANGES)
def test_input_changed_after_it_was_mapped(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    how, words = CHANGES[change]
    change_when(monkeypatch, "wrote", lambda: how(expert(config)))
    with pytest.raises(
        InputChangedError, match=rf"expert1/model\.safetensors was changed .*: {words}"
    ) as caught:
        run(config, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("della", {"granularity": "tensor"}),
        ("ties", {}),
        ("dare_ties", {"parameters": {"density": 0.5, "rescale": "l1"}}),
        ("linear", {}),
    ],
)
@pytest.mark.parametrize("after", [0, 7])
def test_whatever_pass_it_was_read_in(
    config: MergeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    keys: dict[str, Any],
    after: int,
) -> None:
    base = None if method == "linear" else Path(str(config.base_model))
    other = config_for(base, [Path(m.model) for m in config.models], method, **keys)
    # Told before the block is looked at: of the first pass, or of a later one.
    change_when(monkeypatch, "read", lambda: in_place(expert(config)), after)
    with pytest.raises(InputChangedError, match="its status was changed"):
        run(other, tmp_path / "out", workers=1)


def test_a_tensor_that_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"token_types": mixed_base()["token_types"]}
    base, experts = save_family(tmp_path, tensors, num_experts=1)
    change_when(monkeypatch, "wrote", lambda: in_place(experts[0] / "model.safetensors"))
    with pytest.raises(InputChangedError, match="its status was changed"):
        run(config_for(base, experts), tmp_path / "out")


def test_values_that_cannot_be_merged_because_the_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Integers differ only since the file is another: the user is told of the cause, and what is
    # committed is kept.
    numbers = Tensor("I64", (5,), bytes(range(40)))
    base, experts = save_family(tmp_path, {"numbers": numbers}, num_experts=1)

    def overwrite() -> None:
        path = experts[0] / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))

    change_when(monkeypatch, "read", overwrite)
    with pytest.raises(InputChangedError, match="it was written to"):
        run(config_for(base, experts), tmp_path / "out")


def test_shards_that_are_no_longer_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = MAX_OPEN_SHARDS // 3 + 4  # of each of three checkpoints
    tensors = {f"t{i:02}": tensor([float(i)] * 4, "F32") for i in range(count)}
    base, experts = save_family(tmp_path, tensors, num_shards=count, num_experts=2)
    first = experts[0] / f"model-00001-of-{count:05}.safetensors"
    change_when(monkeypatch, "wrote", lambda: in_place(first), after=count - 2)
    with pytest.raises(InputChangedError, match=f"model-00001-of-{count:05}"):
        run(config_for(base, experts), tmp_path / "out", workers=1)


def test_what_becomes_of_it(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    path = write_config(tmp_path / "merge.yaml", config)
    command = ["merge", str(path), str(out), "--shard-size", str(SHARD_BYTES), "--workers", "1"]
    kept = shutil.copy2(expert(config), tmp_path / "kept")
    with monkeypatch.context() as patch:
        change_when(patch, "wrote", lambda: in_place(expert(config)), after=3)
        failed = CliRunner().invoke(main, [*command, "--quiet"])
    assert failed.exit_code == 1
    assert failed.stderr.count("\n") == 1
    committed = list(out.glob("*.safetensors"))
    assert committed
    # Another content: another merge.
    refused = CliRunner().invoke(main, [*command, "--quiet"])
    assert refused.exit_code == 2
    assert f"{expert(config)}: content was" in refused.stderr
    # The old content again, in another file.
    Path(kept).replace(expert(config))
    done = CliRunner().invoke(main, [*command, "--json", "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["tasks_resumed"] == len(committed)
    check(config, out)


def check(config: MergeConfig, out: Path) -> None:
    """Check the output against the reference, and by `verify`."""
    merged = load_tensors(out)
    for name, data in expected_tensors(config).items():
        assert merged[name].data == data, name
    verify(str(out))


def test_input_changed_while_it_is_recomputed(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, tmp_path / "out")
    change_when(monkeypatch, "read", lambda: in_place(expert(config)))
    with pytest.raises(InputChangedError, match="its status was changed"):
        verify(str(tmp_path / "out"), recompute=20)


# Less than was mapped.

CUT_SCRIPT = """
import os, sys
from pathlib import Path
from della_dist.runtime.task.meter import Meter

events, victim, keep, *command = sys.argv[1:]
told = getattr(Meter, events)
def tell(self, num_bytes, calls=[]):
    told(self, num_bytes)
    calls.append(1)
    if len(calls) == 3:
        os.truncate(victim, int(keep))
setattr(Meter, events, tell)

from della_dist.cli import main
main(command)
"""


def run_and_cut(victim: Path, keep: int, *command: str, event: str) -> tuple[int, str]:
    """Run a command in which a file is cut to `keep` bytes while it is read."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_SCRIPT, event, str(victim), str(keep), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stderr


LONG = {f"model.layers.{i}.up_proj.weight": (512, 1024) for i in range(8)}


@pytest.mark.parametrize("event", ["read", "wrote"])
@pytest.mark.parametrize("method", ["della", "ties"])
def test_input_cut_under_its_mapping(tmp_path: Path, method: str, event: str) -> None:
    base = save_sparse(tmp_path / "base", LONG)
    experts = [save_sparse(tmp_path / f"expert{m}", LONG) for m in range(2)]
    path = write_config(tmp_path / "merge.yaml", config_for(base, experts, method))
    victim = experts[0] / "model-00001-of-00001.safetensors"
    command = ("merge", str(path), str(tmp_path / "out"), "--quiet", "--memory", "32MiB")
    status, words = run_and_cut(victim, 10_000, *command, event=event)
    assert status == 1, words
    assert words.count("\n") == 1
    assert f"{victim} was changed" in words
    assert "its size was" in words
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_copied_input_cut_under_its_mapping(tmp_path: Path) -> None:
    # NumPy looks at it, holding Python's lock.
    shapes = {f"buffer{i}": (4096, 1024) for i in range(4)}
    base = save_sparse(tmp_path / "base", shapes, dtype="U8")
    experts = [save_sparse(tmp_path / f"expert{m}", shapes, dtype="U8") for m in range(2)]
    path = write_config(tmp_path / "merge.yaml", config_for(base, experts))
    victim = experts[1] / "model-00001-of-00001.safetensors"
    command = ("merge", str(path), str(tmp_path / "out"), "--quiet", "--memory", "32MiB")
    status, words = run_and_cut(victim, 10_000, *command, event="read")
    assert status == 1, words
    assert words.count("\n") == 1
    assert f"{victim} was changed" in words


def test_output_cut_while_it_is_verified(tmp_path: Path) -> None:
    base = save_sparse(tmp_path / "base", LONG)
    experts = [save_sparse(tmp_path / "expert", LONG)]
    out = tmp_path / "out"
    run(config_for(base, experts), out)
    script = """
import os, sys
from della_dist.runtime.output import checksums
update = checksums._Parts.update
def cut(self, start, data):
    if start == 0:
        os.truncate(sys.argv[2] + "/model.safetensors", 10_000)
    update(self, start, data)
checksums._Parts.update = cut
from della_dist.cli import main
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "verify", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (1, 3), done.stderr
    assert done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr


# Between two runs.


def interrupted(config: MergeConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run until two tasks are committed; return how many there are."""
    commit = Output.commit

    def commit_two(self: Output, record: Any) -> None:
        if len(self.committed) == 2:
            raise RuntimeError("enough")
        commit(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", commit_two)
        with pytest.raises(RuntimeError, match="enough"):
            run(config, out, shard_bytes=SHARD_BYTES, workers=1)
    return 2


@pytest.fixture(params=["interrupted", "finished"])
def begun(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[MergeConfig], int]:
    """Return a function that merges into ``out`` a first time, and says how many tasks it did."""

    def begin(config: MergeConfig) -> int:
        if request.param == "interrupted":
            return interrupted(config, tmp_path / "out", monkeypatch)
        return run(config, tmp_path / "out", shard_bytes=SHARD_BYTES).num_tasks

    return begin


def swap(path: Path, other: Path) -> None:
    """Put another file in the place of one, with its times: as tar --mtime and layers do."""
    stat = path.stat()
    assert other.stat().st_size == stat.st_size
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("how", ["another file", "the same file"])
def test_other_inputs_of_equal_size_and_time(
    config: MergeConfig, tmp_path: Path, begun: Callable[[MergeConfig], int], how: str
) -> None:
    out = tmp_path / "out"
    begun(config)
    if how == "another file":
        shutil.copytree(tmp_path / "expert1", tmp_path / "spare")
        swap(expert(config, 0), tmp_path / "spare" / "model.safetensors")
    else:
        in_place(expert(config, 0))
    with pytest.raises(OutputError, match=r"another merge: .*expert0/model\.safetensors: content"):
        run(config, out, shard_bytes=SHARD_BYTES)
    run(config, out, shard_bytes=SHARD_BYTES, restart=True)
    check(config, out)


def test_one_tensor_written_in_place_between_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too little for the samples to see; the time of modification tells.
    config = long_family(tmp_path)
    out = tmp_path / "out"
    interrupted(config, out, monkeypatch)
    path = tmp_path / "expert0" / "model-00001-of-00001.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 + 100_000)
        file.write(b"\x3f")
    with pytest.raises(OutputError, match=r"expert0/model.*: it was written to since"):
        run(config, out, shard_bytes=SHARD_BYTES)


def test_a_copy_that_is_written_to_after_it_was_continued_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_family(tmp_path)
    out = tmp_path / "out"
    interrupted(config, out, monkeypatch)
    path = tmp_path / "expert0" / "model-00001-of-00001.safetensors"
    replaced(path)
    interrupted(config, out, monkeypatch)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 + 100_000)
        file.write(b"\x3f")
    with pytest.raises(OutputError, match=r"expert0/model.*: it was written to since"):
        run(config, out, shard_bytes=SHARD_BYTES)


def long_family(folder: Path) -> MergeConfig:
    """Return a merge whose inputs are larger than their samples."""
    base = save_sparse(folder / "base", LONG)
    return config_for(base, [save_sparse(folder / f"expert{m}", LONG) for m in range(2)])


HARMLESS: dict[str, Callable[[Path], None]] = {
    "mode": lambda path: path.chmod(0o444),
    "link": lambda path: os.link(path, path.parent.parent / "link"),
    "copy": replaced,
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_is_harmless_between_two_runs(
    config: MergeConfig, tmp_path: Path, begun: Callable[[MergeConfig], int], change: str
) -> None:
    out = tmp_path / "out"
    num_done = begun(config)
    HARMLESS[change](expert(config))
    summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == num_done
    check(config, out)


def saved_again(path: Path) -> None:
    """Save a tensor that no sample sees with other values, as `save_file` and a rename do."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 100_000] ^= 0x40
    path.with_name("new").write_bytes(data)
    path.with_name("new").replace(path)


def test_an_expert_that_is_saved_again(tmp_path: Path, begun: Callable[[MergeConfig], int]) -> None:
    """Half of one merge and half of another would be the output."""
    config = long_family(tmp_path)
    out = tmp_path / "out"
    begun(config)
    saved_again(tmp_path / "expert0" / "model-00001-of-00001.safetensors")
    with pytest.raises(OutputError, match=r"expert0/model.*: it was written to since"):
        run(config, out, shard_bytes=SHARD_BYTES)


@pytest.mark.parametrize("where", ["another place", "another machine"])
def test_what_is_taken_for_a_copy_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    config = long_family(tmp_path)
    out = tmp_path / "out"
    interrupted(config, out, monkeypatch)
    path = tmp_path / "expert0" / "model-00001-of-00001.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    if where == "another place":
        path.parent.rename(tmp_path / "other")
        config = moved(config, "expert0", "other")
    else:
        replaced(path)
        monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    run(config, out, shard_bytes=SHARD_BYTES)
    (said,) = [r.getMessage() for r in caplog.records if "taken for copies" in r.getMessage()]
    assert ("other" if where == "another place" else "expert0") in said
    assert "expert1" not in said
    assert "--restart" in said


def moved(config: MergeConfig, old: str, new: str) -> MergeConfig:
    content = json.loads(json.dumps(config.normalized()).replace(old, new))
    return config_from_mapping(content, "test")


def test_a_copy_elsewhere_continues(
    config: MergeConfig, tmp_path: Path, begun: Callable[[MergeConfig], int]
) -> None:
    out = tmp_path / "out"
    num_done = begun(config)
    elsewhere = tmp_path / "elsewhere"
    for name in ("base", "expert0", "expert1", "expert2"):
        shutil.copytree(tmp_path / name, elsewhere / name, copy_function=shutil.copyfile)
        shutil.rmtree(tmp_path / name)
    other = moved(config, str(tmp_path), str(elsewhere))
    summary = run(other, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == num_done
    check(other, out)


def test_another_spelling_of_the_same_place_continues(
    config: MergeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    relative = moved(config, f"{tmp_path}/", "")
    interrupted(relative, out, monkeypatch)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert run(config, out, shard_bytes=SHARD_BYTES).tasks_resumed == 2
    check(config, out)


def test_experts_in_another_order_are_another_merge(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, out)
    content = config.normalized()
    names = [m["model"] for m in content["models"]]
    for model, name in zip(content["models"], reversed(names), strict=True):
        model["model"] = name
    with pytest.raises(OutputError, match="another merge"):
        run(config_from_mapping(content, "test"), out)


# Many of them.

MANY = 2000

MANY_SCRIPT = textwrap.dedent("""
    import json, os, resource, sys, threading
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
    from della_dist.runtime.task import merge as worker

    most = {"mapped": 0, "open": 0}
    write = worker._write
    def count(*args):
        with open("/proc/self/maps") as maps:
            mapped = sum(".safetensors" in line for line in maps)
        most["mapped"] = max(most["mapped"], mapped)
        most["open"] = max(most["open"], len(os.listdir("/proc/self/fd")))
        write(*args)
    worker._write = count

    from della_dist.cli import main
    main(sys.argv[2:], standalone_mode=False)
    print(json.dumps(most))
""")


@pytest.mark.slow
def test_many_shards_with_few_open_files(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.weight": (8, 4) for i in range(MANY)}
    base = save_sparse(tmp_path / "base", shapes, num_shards=MANY)
    experts = [link_checkpoint(base, tmp_path / f"expert{m}") for m in range(3)]
    path = write_config(tmp_path / "merge.yaml", config_for(base, experts))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MANY_SCRIPT, "256", "merge", str(path), str(out), "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    most = json.loads(done.stdout)
    # Of a worker: those it keeps, and those of blocks that are being merged.
    assert 4 <= most["mapped"] <= 2 * (64 + 4 * 8)
    assert most["open"] < 64
    assert len(load_tensors(out)) == MANY


def test_too_few_files_name_the_limit(tmp_path: Path, config: MergeConfig) -> None:
    path = write_config(tmp_path / "merge.yaml", config)
    script = textwrap.dedent("""
        import os, resource, sys
        from della_dist.cli import main
        from della_dist.runtime import open_plan as opening
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        plan = opening.open_plan
        taken = []
        def take_all(*args, **kwargs):
            while True:
                try:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            return plan(*args, **kwargs)
        import della_dist.runtime.stages.chain as chain
        chain.open_plan = take_all
        main(sys.argv[1:])
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "64" in done.stderr
    assert "ulimit -n" in done.stderr
