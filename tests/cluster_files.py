"""The files of cluster/, read: what several tests ask of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SCRIPTS = ("slurm.sbatch", "aws-batch/entrypoint.sh")
JOB_DEFINITIONS = ("aws-batch/multi-node.json", "aws-batch/single-node.json")
OUTPUT = "s3://BUCKET/merged/70b"
IMAGE = "REGISTRY/della-dist:TAG"

_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 10**3, "M": 10**6, "G": 10**9}


def files() -> list[Path]:
    """Every file of the folder."""
    return sorted(path for path in CLUSTER.rglob("*") if path.is_file())


def read(name: str) -> str:
    return (CLUSTER / name).read_text()


def read_yaml(name: str) -> Any:
    return yaml.safe_load(read(name))


def read_json(name: str) -> Any:
    return json.loads(read(name))


def rayjob() -> dict[str, Any]:
    """The RayJob of rayjob.yaml, which also has a ServiceAccount."""
    (job,) = (x for x in yaml.safe_load_all(read("rayjob.yaml")) if x["kind"] == "RayJob")
    assert isinstance(job, dict)
    return job


def extras() -> dict[str, str]:
    """Requirements of each extra of the package, as pyproject.toml has them."""
    # Python 3.10 has no TOML parser.
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n[")[0]
    return dict(re.findall(r"^([\w-]+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL))


def quantity_bytes(text: str) -> int:
    """Bytes of a Kubernetes quantity such as 12Gi."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi|k|M|G|)", text)
    assert match, text
    return int(match[1]) * _UNITS[match[2]]


def shell_text(path: Path) -> Iterator[str]:
    """Yield the texts of a file in which a shell command may be."""
    text = path.read_text()
    if path.suffix in {".yaml", ".json"}:
        for document in yaml.safe_load_all(text):  # JSON is YAML
            yield from _strings(document)
        yield "\n".join(re.findall(r"^#  +(.*)$", text, re.MULTILINE))
    elif path.suffix == ".md":
        yield from re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    else:
        yield re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            yield shlex.join(value)
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def commands(text: str, program: str) -> list[list[str]]:
    """Arguments of every call of ``program`` in shell text, also within quotes."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if program in line:
            found += _commands_in_line(line, program)
    return found


def _commands_in_line(line: str, program: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    simple: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set("();<>|&"):
            if arguments := _after(simple, program):
                yield arguments
            simple = []
        else:
            simple.append(token)
            if " " in token and program in token:
                yield from _commands_in_line(token, program)


def _after(words: list[str], program: str) -> list[str]:
    for i, word in enumerate(words):
        # Of a path such as ~/venv/bin/PROGRAM the last part is the program.
        if word.rpartition("/")[2] == program and re.match(r"[a-z-]", "".join(words[i + 1 :])):
            return words[i + 1 :]
    return []
