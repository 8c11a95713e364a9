"""Whatever is in the documents of an output, every command answers with a paragraph at worst.

Each document is damaged as a disk does it, replaced by something else, and changed value by value
with its own digest made right again.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.storage.manifest import MANIFEST_NAME, dump_manifest, load_manifest
from della_dist.storage.sealed import seal
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.interrupting import interrupt, interrupt_finishing
from tests.merging import config_for, run, save_family, write_config
from tests.staged import contents

OPTIONS = ("--shard-size", "50000")
PLAN = ".della/plan.json"
FINISHING = ".della/finishing.json"
#: Values are many: so many changes of each document are tried, another set for each command.
NUM_CHANGES = 40
NUM_MERGES = 8
#: Of the other damages, every so many are merged: `plan` looks at the output in the same way.
MERGED = 4


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("nan"), 2**63, 10**400, "", "x", "../x", ".della/lock"),
    *("a\0b", "\ud800", "x" * 100_000, [], {}, [None], ["x"], [["x"]], {"x": 1}, deep(300)),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, num_experts=2, config={"model_type": "llama"})
    return write_config(folder / "config.yaml", config_for(base, experts))


@pytest.fixture(scope="module")
def outputs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an unfinished output, one killed among its last files, and a finished one."""
    from della_dist.config import load_config

    folder = tmp_path_factory.mktemp("outputs")
    loaded = load_config(config)
    interrupt(loaded, folder / "unfinished", after=2, shard_bytes=50_000)
    interrupt_finishing(loaded, folder / "finishing", MANIFEST_NAME, shard_bytes=50_000)
    run(loaded, folder / "finished", shard_bytes=50_000)
    return {path.name: path for path in folder.iterdir()}


def invoke(command: str, config: Path, out: Path) -> Result:
    arguments = {
        "plan": ("plan", config, out, *OPTIONS),
        "merge": ("merge", config, out, *OPTIONS, "--quiet"),
        "verify": ("verify", out),
    }[command]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_answered(result: Result, command: str) -> None:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in ((0, 2, 3) if command == "verify" else (0, 2)), result.output
    if result.exit_code:
        assert result.stdout == ""
        assert result.stderr.startswith("della-dist: ")
        assert result.stderr[:-1].isprintable()
        assert len(result.stderr) < 2000
    else:  # warnings of what is made again
        for line in result.stderr.splitlines():
            assert line.isprintable()
            assert len(line) < 2000


def damaged(data: bytes) -> Iterator[bytes]:
    """Yield what a disk, or a person, may make of a document."""
    yield from (b"", b"\n", b"null", b"[]", b"{}", b'"x"', b"1", b"-1.5", b"true", b"NaN")
    yield from (b"\xff\xfe\x00", data.decode().encode("utf-16"), b"\0" * len(data))
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"digest":"x"}')
    yield from (data + data, data[:-1], data[1:], data[: len(data) // 2], data + b" ")
    yield from (data.replace(b":", b": ", 1), data.replace(b"1", b"2"), data.upper())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document, but its own."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))[:2]  # the others are alike
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(content: dict[str, Any], rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Yield documents with one value that is missing, or another."""
    changes = [(path, i) for path in places(content) for i in range(len(VALUES) + 1)]
    for path, i in rng.sample(changes, min(count, len(changes))):
        other = copy.deepcopy(content)
        parent = other
        for key in path[:-1]:
            parent = parent[key]
        if i == len(VALUES):
            del parent[path[-1]]
        else:
            parent[path[-1]] = VALUES[i]
        yield other


def task_of(out: Path) -> str:
    return str(min((out / ".della/tasks").iterdir()).relative_to(out))


#: Which document of which output, how it is sealed, and what reads it.
DOCUMENTS: dict[str, tuple[str, Callable[[Path], str], tuple[str, ...]]] = {
    "plan": ("unfinished", lambda _: PLAN, ("plan", "merge")),
    "record": ("unfinished", task_of, ("plan", "merge")),
    "finishing": ("finishing", lambda _: FINISHING, ("plan", "merge")),
    "manifest": ("finished", lambda _: MANIFEST_NAME, ("plan", "merge", "verify")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_damaged_documents(
    name: str, outputs: dict[str, Path], config: Path, tmp_path: Path
) -> None:
    state, key_of, commands = DOCUMENTS[name]
    key = key_of(outputs[state])
    data = (outputs[state] / key).read_bytes()
    whole = contents(outputs["finished"])
    for command in commands:
        for number, damage in enumerate(damaged(data)):
            if command == "merge" and number % MERGED:
                continue
            out = Path(shutil.copytree(outputs[state], tmp_path / f"{command}{number}"))
            (out / key).write_bytes(damage)
            result = invoke(command, config, out)
            assert_answered(result, command)
            if command == "merge" and result.exit_code == 0:
                assert contents(out) == whole
            if name == "manifest" or (name == "plan" and damage != data):
                assert result.exit_code in (2, 3), damage[:100]
            shutil.rmtree(out)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_changed_documents_with_a_digest_that_is_right(
    name: str, outputs: dict[str, Path], config: Path, tmp_path: Path
) -> None:
    state, key_of, commands = DOCUMENTS[name]
    key = key_of(outputs[state])
    content = json.loads((outputs[state] / key).read_bytes())
    rng = random.Random(name)
    for command in commands:
        count = NUM_MERGES if command == "merge" else NUM_CHANGES
        for number, other in enumerate(changed(content, rng, count)):
            out = Path(shutil.copytree(outputs[state], tmp_path / f"{command}{number}"))
            sealed = dump_manifest(other) if name == "manifest" else seal(other)
            (out / key).write_bytes(sealed)
            assert_answered(invoke(command, config, out), command)
            shutil.rmtree(out)


def tables(data: bytes) -> Iterator[bytes]:
    """Yield what is no table of tensors."""
    table = pq.read_table(io.BytesIO(data))

    def dump(other: pa.Table) -> bytes:
        sink = io.BytesIO()
        pq.write_table(other, sink)
        return sink.getvalue()

    yield from (b"", b"PAR1", b"PAR1PAR1", b"{}", data[:-1], data[1:], data[: len(data) // 2])
    yield b"\0" * len(data)
    yield dump(table.slice(0, 0))
    yield dump(table.slice(0, 3))
    yield dump(pa.concat_tables([table, table]))
    yield dump(pa.table({"name": ["x"]}))
    yield dump(pa.table({}))
    for column in table.column_names:
        at = table.column_names.index(column)
        yield dump(table.drop_columns([column]))
        yield dump(table.set_column(at, column, pa.nulls(len(table))))
        yield dump(table.set_column(at, column, pa.array([-1] * len(table))))
        yield dump(table.set_column(at, column, pa.array(["x"] * len(table))))
        yield dump(table.set_column(at, column, pa.array([b"\xff"] * len(table))))
        yield dump(table.set_column(at, column, pa.array([[1, 2]] * len(table))))


@pytest.mark.parametrize("told", [False, True], ids=["unknown to the manifest", "known to it"])
@pytest.mark.parametrize("command", ["plan", "merge", "verify"])
def test_what_is_no_table(
    outputs: dict[str, Path], config: Path, tmp_path: Path, command: str, told: bool
) -> None:
    data = (outputs["finished"] / TENSORS_NAME).read_bytes()
    for number, other in enumerate(tables(data)):
        if command == "merge" and number % MERGED:
            continue
        out = Path(shutil.copytree(outputs["finished"], tmp_path / str(number)))
        (out / TENSORS_NAME).write_bytes(other)
        if told:
            manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
            (file,) = (f for f in manifest["files"] if f["name"] == TENSORS_NAME)
            file.update(size_bytes=len(other), sha256=hashlib.sha256(other).hexdigest())
            (out / MANIFEST_NAME).write_bytes(dump_manifest(manifest))
            next(out.glob("model-*.safetensors")).unlink()  # so that the table is read
        result = invoke(command, config, out)
        assert_answered(result, command)
        if command == "verify":
            assert result.exit_code == 3
        shutil.rmtree(out)
