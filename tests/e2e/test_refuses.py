"""Whatever is wrong is refused: one paragraph that says what and where, and nothing is written."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from della_dist.cli import main
from tests.hostile import CASES, Case, Situation

#: A message is at most this long, the paths in it not counted.
MAX_CHARACTERS = 700

BY_NAME = {case.name: case for case in CASES}

#: These are also run as a person runs them; the FIFOs would hang if they were opened.
IN_A_PROCESS = [
    "index_is_a_fifo",
    "only_shard_is_a_fifo",
    "shard_is_a_fifo",
    "billion_laughs",
    "truncated_shard",
    "nan_in_the_last_of_several_shards",
    "option_that_is_not_there",
    "pickle_calls_os_system",
    "legacy_pickle",
]


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what is below `folder`: kinds, times and contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        key = str(path.relative_to(folder))
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[key] = ("link", str(path.readlink()))
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                digest = hashlib.sha256(file.read(1 << 20)).hexdigest()
            found[key] = ("file", status.st_size, status.st_mtime_ns, status.st_mode, digest)
        else:
            found[key] = (stat.S_IFMT(status.st_mode), status.st_mode)
    return found


def check_refusal(situation: Situation, status: int, stdout: str, stderr: str) -> None:
    assert status == 2, stderr
    assert stdout == ""
    assert stderr.startswith("della-dist: ")
    assert stderr.endswith("\n")
    message = stderr[:-1]
    assert message.isprintable(), "one paragraph is one line"
    for word in situation.words:
        assert word in message, f"{word!r} is not in {message!r}"
    folder = str(situation.config.parent)
    assert len(message.replace(folder, "")) <= MAX_CHARACTERS, message
    assert message[-1] in ".?)"


def in_process(command: str, situation: Situation) -> None:
    quiet = ["--quiet"] if command == "merge" else []
    options = [o for o in situation.options if command == "merge" or o != "--restart"]
    before = snapshot(situation.config.parent)
    arguments = [command, str(situation.config), str(situation.out), *options, *quiet]
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    check_refusal(situation, result.exit_code, result.stdout, result.stderr)
    assert snapshot(situation.config.parent) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    situation = case.build(tmp_path)
    if not case.needs_data:
        in_process("plan", situation)
    in_process("merge", situation)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_refused_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    situation = BY_NAME[name].build(tmp_path)
    before = snapshot(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "della_dist", "merge"),
            *(str(situation.config), str(situation.out), *situation.options, "--quiet"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    check_refusal(situation, done.returncode, done.stdout, done.stderr)
    assert snapshot(tmp_path) == before


def test_cases_that_need_data_pass_the_plan(tmp_path: Path) -> None:
    # Otherwise they would belong to the others.
    for case in CASES:
        if case.needs_data:
            situation = case.build(tmp_path / case.name)
            result = CliRunner().invoke(main, ["plan", str(situation.config), str(situation.out)])
            assert result.exit_code == 0, result.stderr


def test_the_family_is_healthy_when_nothing_is_wrong(tmp_path: Path) -> None:
    from tests.hostile.situation import save_family

    family = save_family(tmp_path)
    arguments = ["merge", str(family.config), str(family.out), "--quiet"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert len(CASES) >= 45
    assert len(BY_NAME) == len(CASES)
