"""The command line: what it prints where, exit statuses, and how fast it answers."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import della_dist.runtime.run
from della_dist.cli import main
from della_dist.errors import (
    ConfigError,
    DellaDistError,
    InputError,
    OutputError,
    RunError,
    StorageError,
    TensorDataError,
    VerificationError,
)
from della_dist.mergekit_options import MERGEKIT_OPTIONS
from della_dist.ops.blocks import Block, BlockStats
from della_dist.report.text import parse_size
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.version import __version__
from tests.checkpoints import tensor
from tests.merging import assert_paragraph, config_for, run, save_family, write_config
from tests.staged import contents

HEAVY = ["numpy", "numba", "torch", "pyarrow", "rich", "pydantic", "yaml", "ray", "fsspec"]

MODELS = ("base", "expert0", "expert1", "expert2")

OPTIONS_OF_RUNS = {
    *("--engine", "--workers", "--threads", "--memory", "--device", "--seed", "--shard-size"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    merge = config_for(
        *save_family(folder, config={"model_type": "llama"}), parameters={"density": 0.5}
    )
    return write_config(folder / "config.yaml", merge)


def epsilon_note(config: Path) -> str:
    experts = ", ".join(str(config.parent / f"expert{m}") for m in range(3))
    return f"epsilon of {experts} is not given: 0.15, that is min(0.15, 1 - density, density / 2)."


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str) -> None:
    result = invoke(flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert {"merge", "plan", "verify", "demo"} <= set(main.commands)
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)
        mine = invoke(name, flag)
        assert (mine.exit_code, mine.stderr) == (0, "")
        assert mine.stdout.startswith("Usage: ")
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[0] in mine.stdout
                assert option.help, f"{name} {option.opts[0]} has no help"


def test_options_that_scripts_depend_on() -> None:
    options = {
        name: {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        for name, command in main.commands.items()
    }
    assert {*OPTIONS_OF_RUNS, "--restart", "--quiet", "--json"} <= options["merge"]
    assert options["merge"] == options["plan"]
    assert {"--recompute", "--json"} <= options["verify"]
    assert all("--debug" in mine for mine in options.values())


def test_version() -> None:
    assert invoke("--version").stdout == f"della-dist, version {della_dist.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from della_dist.cli import main\n"
        "status = main(['merge', '--help'], standalone_mode=False)\n"
        f"print('loaded', status, [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded 0 []"


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "della_dist", "plan", "no such file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "della-dist: no such file: there is no such configuration file.\n"


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert "merge" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mrege",), ["mrege"]),
        (("--nonsense",), ["--nonsense", "della-dist --help"]),
        (("merge",), ["CONFIG"]),
        (("merge", "config"), ["OUT"]),
        (("merge", "config", "out", "more"), ["more"]),
        (("merge", "config", "out", "--memory"), ["--memory", "merge --help"]),
        (("verify", "out", "--recompute", "-1"), ["--recompute", "-1"]),
        (("plan", "config", "--device"), ["--device", "plan --help"]),
    ],
)
def test_wrong_usage_is_one_paragraph(arguments: tuple[str, ...], words: list[str]) -> None:
    assert_paragraph(invoke(*arguments), 2, "--help", *words)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("268435456", 268_435_456),
        ("9007199254740993", 9_007_199_254_740_993),
        ("1b", 1),
        ("256MiB", 256 << 20),
        ("256mib", 256 << 20),
        ("256 MiB", 256 << 20),
        (" 5GB ", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5Gi", 5 << 30),
        ("1.5KiB", 1536),
        ("0.3kB", 300),
        ("1.1GB", 1_100_000_000),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "MiB", "-1", "+1", "1e9", "1.GiB", ".5GiB", "1,5GB", "5X", "5 i", "5iB", "1PiB"),
        *("inf", "nan", "0x10", "1 2", "1GB!", "\u0661GB", "9999999TiB", "9" * 400),
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"no size|more than any machine has"):
        parse_size(text)


def test_merge_json(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("merge", config, out, "--json", "--shard-size", "100kB")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    summary = json.loads(result.stdout)
    assert set(summary) == {
        "model_digest",
        "num_tensors",
        "num_merged",
        "num_from_base",
        "num_unstored",
        "num_tasks",
        "tasks_resumed",
        "bytes_read",
        "bytes_written",
        "elapsed_s",
        "peak_rss_bytes",
        "output",
        "workers_lost",
        "tasks_retried",
        "stragglers",
        "already_complete",
        "notes",
    }
    manifest = load_manifest((out / MANIFEST_NAME).read_bytes())
    assert summary["output"] == str(out)
    assert summary["model_digest"] == manifest["model_digest"]
    assert summary["num_tensors"] == manifest["num_tensors"]
    assert summary["num_tasks"] == len(manifest["shards"]) > 1
    assert summary["tasks_resumed"] == 0
    plan = json.loads(invoke("plan", config, "--json").stdout)
    assert summary["notes"] == plan["notes"] == [epsilon_note(config)]
    assert summary["bytes_read"] == plan["bytes_to_read"]
    assert summary["bytes_written"] == plan["bytes_to_write"]
    assert 0 < summary["elapsed_s"] < 600
    assert 10 << 20 < summary["peak_rss_bytes"] < 64 << 30


def test_merge_prints_a_summary(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("merge", config, out)
    assert (result.exit_code, result.stderr) == (0, f"note    {epsilon_note(config)}\n")
    digest = load_manifest((out / MANIFEST_NAME).read_bytes())["model_digest"]
    lines = result.stdout.splitlines()
    assert lines[0] == "merged 14 of 14 tensors (12 merged, 2 copied) into 1 shard"
    assert lines[1] == f"output  {out}"
    assert lines[-1] == f"digest  {digest}"
    again = invoke("merge", config, out)
    assert again.stderr == ""
    assert again.stdout.splitlines() == [
        f"{out} is complete already; nothing was done.",
        f"digest  {digest}",
    ]
    (out / "README.md").unlink()  # which is something to be done
    assert invoke("merge", config, out).stdout.splitlines()[0].startswith("merged 14 of 14 tensors")
    assert (out / "README.md").exists()


def test_json_stands_alone_on_stdout(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*arguments: Any, **keywords: Any) -> Any:
        print("(raylet) The node was marked dead")  # where Ray prints it
        return merge(*arguments, **keywords)

    merge = della_dist.runtime.run.merge
    monkeypatch.setattr("della_dist.runtime.run.merge", chatty)
    result = invoke("merge", config, tmp_path / "out", "--json")
    assert json.loads(result.stdout)["num_tasks"] > 0
    assert "marked dead" in result.stderr


def test_merge_json_of_a_complete_output(config: Path, tmp_path: Path) -> None:
    first, again = (
        json.loads(invoke("merge", config, tmp_path / "out", "--json").stdout) for _ in range(2)
    )
    assert again["tasks_resumed"] == again["num_tasks"] == first["num_tasks"]
    assert again["bytes_read"] == again["bytes_written"] == 0
    assert (first["already_complete"], again["already_complete"]) == (False, True)
    assert (first["notes"], again["notes"]) == ([epsilon_note(config)], [])
    for key in ("output", "model_digest", "num_tensors", "num_merged", "num_from_base"):
        assert again[key] == first[key]


def test_merge_quiet(config: Path, tmp_path: Path) -> None:
    result = invoke("merge", config, tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out" / MANIFEST_NAME).exists()


def test_quiet_commands(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (
        ("plan", config, out),
        ("check", config),
        ("merge", config, out),
        ("verify", out),
    ):
        shown = invoke(*arguments, "-q")
        assert (shown.exit_code, shown.output) == (0, ""), arguments
    (out / "config.json").write_text("{}")
    assert_paragraph(invoke("verify", out, "-q"), 3, "config.json")
    # What a command is run for is no chatter.
    assert json.loads(invoke("plan", config, "-q", "--json").stdout)["num_tasks"] == 1
    models = [str(config.parent / name) for name in ("base", "expert0")]
    assert "merge_method:" in invoke("init", *models, "-q").stdout


@pytest.mark.parametrize("command", ["merge", "check"])
def test_quiet_and_verbose(config: Path, tmp_path: Path, command: str) -> None:
    out = [tmp_path / "out"] if command == "merge" else []
    assert_paragraph(invoke(command, config, *out, "-q", "-v"), 2, "--quiet", "--verbose")


def test_verbose(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("merge", config, out, "-v", "--json", "--shard-size", "100kB")
    summary = json.loads(result.stdout)
    lines = result.stderr.splitlines()
    assert lines[0] == f"merging into {out} by della on this machine"
    opened = [f"opened {config.parent / name}: 14 tensors in 1 file, " for name in MODELS]
    assert [line[: len(one)] for line, one in zip(lines[1:5], opened, strict=True)] == opened
    assert lines[5].startswith("checked ")
    assert lines[6].startswith(f"planned {out}: 14 tensors in {summary['num_tasks']} shards, ")
    assert lines[-1] == f"{out} is complete, digest {summary['model_digest']}"
    committed = [line for line in lines if " is committed by worker " in line]
    assert len(committed) == summary["num_tasks"]
    assert committed[-1].endswith(f", {summary['num_tasks']} of {summary['num_tasks']}")
    assert sum(", attempt 1, on worker " in line for line in lines) == summary["num_tasks"]
    assert "WorkerReady(" not in result.stderr
    planned = invoke("plan", config, "-v").stderr
    assert planned.splitlines() == lines[1:5]
    shards = load_manifest((out / MANIFEST_NAME).read_bytes())["shards"]
    verified = invoke("verify", out, "-v").stderr
    assert sorted(verified.splitlines()) == [f"{s['name']} is as it was written" for s in shards]


def test_events_as_lines_of_json(config: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log.json"
    how = ("--shard-size", "100kB", "--log-json", log)
    result = invoke("merge", config, out, "--json", *how)
    summary = json.loads(result.stdout)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["event"] for e in events[:3]] == ["start", "check", "plan"]
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    start, check, plan, *_, end = events
    assert (start["merge_method"], start["engine"], start["seed"]) == ("della", "local", 0)
    assert [model["verdict"] for model in check["models"]] == ["same backbone"] * 3
    assert plan["bytes_to_read"] == summary["bytes_read"]
    assert plan["bytes_to_write"] == summary["bytes_written"]
    assert plan["notes"] == summary["notes"]
    assert {key: end[key] for key in summary} == summary
    assert (end["event"], end["stage"]) == ("end", "")
    kinds = {e["event"] for e in events}
    assert kinds <= {
        *("start", "check", "plan", "end", "worker_ready", "progress"),
        *("shard_started", "shard_committed"),
    }
    started = {e["shard"]: e for e in events if e["event"] == "shard_started"}
    committed = [e for e in events if e["event"] == "shard_committed"]
    sizes = {
        s["name"]: s["size_bytes"]
        for s in load_manifest((out / MANIFEST_NAME).read_bytes())["shards"]
    }
    assert {e["shard"]: e["size_bytes"] for e in committed} == sizes
    assert [e["tasks_done"] for e in committed] == list(range(1, len(sizes) + 1))
    assert sum(e["num_tensors"] for e in committed) == summary["num_tensors"]
    for one in committed:
        begun = started[one["shard"]]
        assert (begun["attempt"], begun["why"]) == (one["attempt"], "first") == (1, "first")
        assert begun["worker"] == one["worker"]
        assert one["elapsed_s"] >= 0
    # The same again is told as well, and so is what fails.
    invoke("merge", config, out, *how)
    assert invoke("merge", config, out, *how, "--seed", "5").exit_code == 2
    more = [json.loads(line) for line in log.read_text().splitlines()][len(events) :]
    assert [e["event"] for e in more] == ["start", "end", "start", "failed"]
    assert more[1]["already_complete"]
    assert (more[3]["error"], more[3]["exit_status"]) == ("OutputError", 2)


def test_a_log_that_is_no_log(config: Path, tmp_path: Path) -> None:
    before = config.read_bytes()
    for command in ("merge", "plan"):
        result = invoke(command, config, tmp_path / "out", "--log-json", config)
        assert_paragraph(result, 2, f"--log-json {config}", "no log of runs")
    assert config.read_bytes() == before
    assert not (tmp_path / "out").exists()
    # A plan writes nothing.
    planned = invoke("plan", config, tmp_path / "out", "-q", "--log-json", tmp_path / "log.json")
    assert planned.exit_code == 0
    assert not (tmp_path / "log.json").exists()


def test_restart_makes_the_same_again(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", config, out, "--quiet", "--seed", "3", "--shard-size", "100kB")
    (out / "notes.txt").write_text("mine")
    result = invoke("merge", config, out, "--restart", "--json")
    assert json.loads(result.stdout)["tasks_resumed"] == 0
    # What della_dist wrote is gone, and nothing else.
    assert (out / "notes.txt").read_text() == "mine"
    fresh = tmp_path / "fresh"
    invoke("merge", config, fresh, "--quiet")
    assert contents(out, but=["notes.txt"]) == contents(fresh)


@pytest.mark.parametrize("where", ["commit", "finish", "dump"])
def test_restart_leaves_nothing_of_an_interrupted_run(
    config: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Interrupted between a shard and its record; before, and in the middle of, the last files.
    name = {
        "commit": "della_dist.runtime.output.commit.Output.commit",
        "finish": "della_dist.runtime.output.commit.Output.finish",
        "dump": "della_dist.runtime.output.commit.dump_manifest",
    }[where]
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    with monkeypatch.context() as patch:
        patch.setattr(name, lambda *_: 1 / 0)
        assert invoke("merge", config, out, "--quiet", "--shard-size", "100kB").exit_code == 4
    assert list(out.glob("model-*"))
    assert (out / "model.safetensors.index.json").exists() == (where == "dump")
    assert invoke("merge", config, out, "--quiet", "--restart").exit_code == 0
    invoke("merge", config, fresh, "--quiet")
    assert contents(out) == contents(fresh)


def test_seed_of_the_command_line(config: Path, tmp_path: Path) -> None:
    text = config.read_text()
    assert "seed: 0\n" in text
    seeded = config.with_name("seeded.yaml")
    seeded.write_text(text.replace("seed: 0\n", "seed: 5\n"))
    commands = {"a": (config, "--seed", "5"), "b": (seeded,), "c": (config,)}
    digests = {
        name: json.loads(invoke("merge", path, tmp_path / name, "--json", *more).stdout)[
            "model_digest"
        ]
        for name, (path, *more) in commands.items()
    }
    assert digests["a"] == digests["b"] != digests["c"]
    assert load_manifest((tmp_path / "a" / MANIFEST_NAME).read_bytes())["seed"] == 5


def test_plan(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = config.read_text()
    assert "  rescale: inverse\n" in text
    plain = config.with_name("plain.yaml")
    plain.write_text(text.replace("  rescale: inverse\n", ""))
    result = invoke("plan", plain, out, "--memory", "64MiB", "--threads", "2", "--workers", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    heads = [line[:8].strip() for line in result.stdout.splitlines()]
    wanted = ["merge", "", "", "", "output", "tasks", "files", "reads", "memory", "time"]
    assert heads[: len(wanted)] == wanted
    assert "della: 3 experts" in result.stdout
    assert "64 MiB allowed (1 workers, 2 threads), and under 1 MiB of records\n" in result.stdout
    assert "mergekit" in result.stdout  # where `rescale` means something else there
    assert result.stdout.endswith("checks  passed; nothing was written\n")
    assert not out.exists()


def test_plan_json(config: Path, tmp_path: Path) -> None:
    result = invoke("plan", config, tmp_path / "out", "--json", "--shard-size", "100kB")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert set(plan) == {
        *(
            "merge_method",
            "base",
            "experts",
            "layers",
            "num_tensors",
            "num_parameters",
            "num_tasks",
        ),
        *("shard_bytes", "bytes_to_read", "bytes_to_write", "most_bytes_to_read"),
        *("projected_mem", "allowed_mem", "projected_device_mem", "allowed_device_mem"),
        *("buffers_mem", "records_mem"),
        *("largest_tensor", "workers", "threads", "estimated_s", "notes", "tasks", "files"),
        *("output", "complete", "tasks_committed"),
    }
    assert plan["num_tensors"] == 14 == sum(t["num_tensors"] for t in plan["tasks"])
    assert plan["num_tasks"] == len(plan["tasks"])
    assert plan["bytes_to_write"] == sum(t["size_bytes"] for t in plan["tasks"])
    assert 0 < plan["projected_mem"] <= plan["allowed_mem"] == 1 << 30
    assert (plan["complete"], plan["tasks_committed"]) == (False, 0)
    assert not (tmp_path / "out").exists()
    assert "output" not in json.loads(invoke("plan", config, "--json").stdout)


def test_plan_of_a_complete_output(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", config, out, "--quiet")
    assert f"{out} is complete; merge would do nothing" in invoke("plan", config, out).stdout
    before = contents(out)
    again = json.loads(invoke("plan", config, out, "--restart", "--json").stdout)
    assert (again["complete"], again["tasks_committed"]) == (False, 0)
    assert contents(out) == before


def test_verify_prints_a_summary(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", config, out, "--quiet")
    result = invoke("verify", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.match(
        rf"{re.escape(str(out))}: \d+ files, 14 tensors, .* are as written", result.stdout
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError, 2),
        (InputError, 2),
        (TensorDataError, 2),
        (OutputError, 2),
        (StorageError, 1),
        (RunError, 1),
        (VerificationError, 3),
        (DellaDistError, 1),
    ],
)
def test_statuses(
    config: Path,
    tmp_path: Path,
    error: type[DellaDistError],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("It is the \x1b[31mlamp.\nNext line.")

    monkeypatch.setattr("della_dist.runtime.run.merge", fail)
    result = invoke("merge", config, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr == "della-dist: It is the \\x1b[31mlamp.\\nNext line.\n"
    shown = invoke("merge", config, tmp_path / "out", "--debug")
    assert shown.exit_code == status
    assert shown.stderr.startswith("Traceback (most recent call last):\n")
    assert shown.stderr.endswith(result.stderr)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/dev/sdb"), "/dev/sdb"),
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "interrupted; the same command continues"),
    ],
)
def test_failures_of_the_machine(
    config: Path,
    tmp_path: Path,
    error: BaseException,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("della_dist.runtime.run.merge", fail)
    result = invoke("merge", config, tmp_path / "out")
    assert_paragraph(result, 1, words)
    assert "the same command continues" in result.stderr.lower()


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), KeyError("x"), AssertionError(), EOFError()]
)
def test_a_fault_of_the_program(
    config: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from della_dist.ops.cpu.backend import NumbaBackend

    merge = NumbaBackend.merge

    def fail(self: NumbaBackend, recipe: Any, prepared: Any, block: Block, out: Any) -> BlockStats:
        if block.stop > 1:  # else it is the one that wakes the kernels up
            raise error
        return merge(self, recipe, prepared, block, out)

    monkeypatch.setattr(NumbaBackend, "merge", fail)
    result = invoke("merge", config, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (4, "")
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"della-dist: this is a fault of della-dist {__version__}, ")
    assert f": {type(error).__name__}" in message
    assert re.search(r"\(della_dist/[\w/]+\.py, line \d+\)\. Please report it", message)
    assert "Traceback" not in result.stderr
    shown = invoke("merge", config, tmp_path / "out", "--debug")
    assert shown.exit_code == 4
    assert "Traceback (most recent call last):\n" in shown.stderr
    # What led to it is kept, and shown if that is asked for.
    events = (tmp_path / "out" / ".della" / "events.log").read_text()
    for text in ("WorkerReady(", "Start(", "Failed(", type(error).__name__):
        assert text in events
        assert text in shown.stderr
    assert "Start(" not in result.stderr
    assert f"what happened until then is in {tmp_path / 'out'}" in result.stderr
    # The lock is let go of, and what was done is not lost.
    monkeypatch.undo()
    assert invoke("merge", config, tmp_path / "out", "--quiet").exit_code == 0
    assert not (tmp_path / "out" / ".della").exists()


def test_credentials_of_arguments_are_not_shown(config: Path) -> None:
    for arguments in (
        ("merge", config, "s3:/KEY:SECRET@bucket/out"),
        ("merge", config, "out", "s3://KEY:SECRET@bucket/out"),
        ("plan", "s3://KEY:SECRET@bucket/merge.yaml"),
        ("verify", "gs;//KEY:SECRET@bucket/out"),
        ("verify", "s3://KEY:SECRET@bucket/out", "--debug"),
        ("demo", "s3:/KEY:SECRET@bucket/demo"),
        ("demo", "s3://KEY:SECRET@bucket/demo"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.stderr
        assert "SECRET" not in result.output


@pytest.mark.parametrize("option", MERGEKIT_OPTIONS)
def test_options_of_mergekit(option: str) -> None:
    """Each is refused with what to write here, wherever it stands."""
    for arguments in (("merge", "c.yaml", "out", option), (option, "plan", "c.yaml")):
        result = invoke(*arguments)
        assert_paragraph(result, 2, f"{option} is an option of mergekit; here ")
        named = re.findall(r"--[a-z-]+", result.stderr.partition("; here ")[2])
        shown = invoke("merge", "--help").stdout
        assert all(name in shown for name in named), named


DROPPED_SIGNAL = """
import signal, time
import click
from della_dist.program import failures

class Callback:
    def __del__(self):  # Python drops what is raised here, as in the callbacks of a compiler
        signal.raise_signal(signal.{signal})

@click.command()
@failures
def command(quiet):
    Callback()
    time.sleep(30)
    click.echo("not interrupted")

command()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_no_signal_is_dropped(name: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    script = DROPPED_SIGNAL.replace("{signal}", name)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "della-dist: interrupted; the same command continues.\n"


NUM_SHARDS = 500


def interrupt(config: Path, out: Path) -> int:
    """Run a merge, interrupt it after the first commit, and return how many shards it committed."""
    # Whatever runs the tests in the background may have had them ignore it, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "della_dist", "merge", str(config), str(out)),
            *("--shard-size", "1", "--json", "--log-json", f"{out}.log"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tasks = out / ".della" / "tasks"
    with process:
        while process.poll() is None and not (tasks.is_dir() and any(tasks.iterdir())):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    if process.returncode == 0:  # it was done before the signal came
        return NUM_SHARDS
    assert (process.returncode, stdout) == (1, ""), stderr
    assert stderr.endswith("\ndella-dist: interrupted; the same command continues.\n")
    assert not (out / MANIFEST_NAME).exists()
    last = json.loads(Path(f"{out}.log").read_text().splitlines()[-1])
    assert (last["event"], last["error"], last["exit_status"]) == ("failed", "KeyboardInterrupt", 1)
    return len([p for p in tasks.iterdir() if p.suffix == ".json"])


def test_interrupted_by_the_keyboard(tmp_path: Path) -> None:
    # Many small shards: each is committed durably, which takes its time.
    rng = np.random.default_rng(3)
    base = {
        f"layers.{i}.weight": tensor(rng.normal(0, 0.05, (4, 8)), "BF16") for i in range(NUM_SHARDS)
    }
    merge = config_for(*save_family(tmp_path, base, num_experts=2), parameters={"density": 0.5})
    config = write_config(tmp_path / "config.yaml", merge)
    for attempt in range(10):  # a busy machine may deliver the signal too late
        out = tmp_path / f"out{attempt}"
        committed = interrupt(config, out)
        if committed < NUM_SHARDS:
            break
    assert 0 < committed < NUM_SHARDS
    plan = invoke("plan", config, out, "--shard-size", "1")
    assert f"has {committed} of {NUM_SHARDS} shards; merge continues it" in plan.stdout

    result = invoke("merge", config, out, "--shard-size", "1")
    assert result.exit_code == 0, result.stderr
    first, note, *_ = result.stderr.splitlines()
    assert first == f"continuing: {committed} of {NUM_SHARDS} shards are done already"
    assert note.startswith("note    epsilon of ")
    kept = f"into {NUM_SHARDS} shards, {committed} of them kept from an earlier run"
    assert kept in result.stdout
    whole = run(merge, tmp_path / "whole", shard_bytes=1)
    assert f"digest  {whole.model_digest}" in result.stdout
