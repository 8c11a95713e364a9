"""Every ``della-dist`` command in cluster/ is one that the command line takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import click
import pytest

from della_dist.cli import main
from della_dist.cli.options import options_of
from della_dist.errors import ConfigError
from tests.cluster_files import CLUSTER, OUTPUT, commands, files, shell_text

CALLS = [
    (path, arguments)
    for path in files()
    for text in shell_text(path)
    for arguments in commands(text, "della-dist")
    if not arguments[0].startswith("-")  # --help
]
RUNNERS = (
    "README.md",
    "aws-batch/entrypoint.sh",
    "rayjob.yaml",
    "skypilot.yaml",
    "slurm.sbatch",
)


def label(value: object) -> str:
    return str(value.relative_to(CLUSTER)) if isinstance(value, Path) else " ".join(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "arguments"), CALLS, ids=label)
def test_call_is_understood(path: Path, arguments: list[str]) -> None:
    name, *rest = arguments
    assert name in main.commands, f"{path.name}: there is no command {name}"
    command = main.commands[name]
    # click keeps the names of the help option that a command is first asked for.
    parent = click.Context(main, **main.context_settings)
    context = click.Context(command, parent, name)
    values, _, parameters = command.make_parser(context).parse_args(args=list(rest))
    for parameter in command.params:
        value = values.get(parameter.name or "")
        if parameter in parameters and "$" not in str(value):  # else the shell has its value
            parameter.type_cast_value(context, value)
        if parameter.required:
            assert value is not None, f"{path.name}: {name} lacks {parameter.name}"
    options_of({name: v for name, v in values.items() if "$" not in str(v)})


@pytest.mark.parametrize("name", RUNNERS)
def test_file_merges_on_ray(name: str) -> None:
    merges = [
        rest for path, (command, *rest) in CALLS if path == CLUSTER / name and command == "merge"
    ]
    assert merges
    for rest in merges:
        given = dict(pairwise(rest))
        assert given["--engine"] == "ray"
        assert {"--address", "--device", "--workers", "--threads", "--memory"} <= set(given)
        # With --restart a retry would throw away what it should continue.
        assert "--restart" not in rest
        assert rest[1] == OUTPUT or rest[1].startswith("$")


def test_a_wrong_option_is_found() -> None:
    (arguments,) = commands("x && ~/bin/della-dist merge a b \\\n --memori 8GiB; y", "della-dist")
    with pytest.raises(click.NoSuchOption):
        test_call_is_understood(CLUSTER / "x", arguments)
    with pytest.raises(ConfigError, match="'lots' is no size"):
        test_call_is_understood(CLUSTER / "x", ["merge", "a", "b", "--memory", "lots"])
