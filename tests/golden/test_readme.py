"""What the README publishes is true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import snapshot_download

from della_dist.cli import main
from della_dist.config import parse_config
from della_dist.config.parameters import parameter_keys
from della_dist.config.schema import Document, Model
from della_dist.config.space import Space
from della_dist.ops.philox import stream_key
from della_dist.ops.reference import philox4x32
from della_dist.storage.shard_files import SAFETENSORS, TORCH
from della_dist.storage.torch_files.tensors import WRAPPERS
from tests.merging import save_family
from tests.servers.hub import Hub
from tests.servers.hub_writes import TOKEN

Run: TypeAlias = Callable[[str], None]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_VECTOR = re.compile(
    r"^\| (\d+) \| (\d+) \| (\d+) \| `([^`]+)` \| (\d+) "
    r"\| `(\w{16})` \| `(\w{8})` \| ([0-9.]+) \|$",
    re.MULTILINE,
)


def test_random_words() -> None:
    vectors = _VECTOR.findall(README)
    assert len(vectors) == 5
    for seed, stage, expert, name, element, key, word, u in vectors:
        computed_key = stream_key(int(seed), name, int(expert), int(stage))
        assert f"{computed_key:016x}" == key
        c = int(element) // 4
        counter = (np.array([x], np.uint64) for x in (c & 0xFFFFFFFF, c >> 32, 0, 0))
        words = philox4x32(tuple(counter), (computed_key & 0xFFFFFFFF, computed_key >> 32))  # type: ignore[arg-type]
        computed = int(words[int(element) % 4][0])
        assert f"{computed:08x}" == word
        assert (computed >> 8) * 2.0**-24 == float(u)


def test_files_of_weights() -> None:
    table = README.partition("| files of weights |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    for form, (endings, which) in zip((SAFETENSORS, TORCH), rows, strict=True):
        assert tuple(re.findall("`([^`]*)`", endings)) == form.suffixes
        assert f"`{form.index}`" in which
        assert f"`{form.single}`" in which
    assert not TORCH.weights(["optimizer.pt", "training_args.bin", "consolidated.00.pth"])
    known = [f"`{name}`" for name in WRAPPERS]
    assert f"under {', '.join(known[:-1])} or {known[-1]} if nothing" in " ".join(README.split())


PAGES = ("README.md", "della_dist/README.md", "cluster/README.md", "tests/bench/README.md")


@pytest.mark.parametrize("page", [*PAGES, ".github/CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text)
    assert links or page not in ("README.md", "cluster/README.md")
    for path, anchor in links:
        assert ((ROOT / page).parent / path).exists(), path
        assert path or anchor in anchors, anchor


def blocks(language: str) -> list[str]:
    """Return what stands in the README's blocks of code."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def first_screen(tmp_path: Path) -> Run:
    """Return what runs a shell command where a reader of the first screen would."""
    base, experts = save_family(tmp_path / "path" / "to", num_experts=2)
    for path, name in zip(experts, ("math", "code"), strict=True):
        path.rename(base.with_name(name))
    (tmp_path / "merge.yaml").write_text(blocks("yaml")[0])
    command = tmp_path / "bin" / "della-dist"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m della_dist "$@"\n')
    command.chmod(0o755)

    def run(line: str) -> None:
        found = f"{command.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            line,
            shell=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": found},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (line, done.stderr)

    return run


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations(text: str) -> None:
    if "search:" in text:
        assert Space(yaml.safe_load(text), "README.md").dimensions
    else:
        assert parse_config(text).models


def test_the_table_of_keys_has_them_all() -> None:
    """Every key that a configuration may have, by its section's first table, and no other."""
    section = README.partition("\n## Configuration\n")[2].partition("\n\n`weight`")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    told = {key for cell in cells for key in re.findall(r"`(.*?)`", cell)}
    explained = {"models[].model": "models", "tokenizer: {source: ...}": "tokenizer"}
    assert {key for key in told if key.startswith("models[].")} == {
        f"models[].{key}" for key in Model.model_fields if key != "parameters"
    }
    said = {explained.get(key, key) for key in told} - {"models[].rename"}
    # Told elsewhere: they are mergekit's, and the output is the same without them.
    elsewhere = {
        "int8_mask",
        "parameters",
    }
    keys = {*Document.model_fields, *parameter_keys(of_expert=False)} - {"parameters"}
    assert said == keys - elsewhere
    assert all(f"`{key}" in README for key in elsewhere)


def commands() -> list[str]:
    """Return the commands of the README that are no installations."""
    lines = [
        line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("della-dist ")]


def test_commands_of_the_first_screen(first_screen: Run, tmp_path: Path) -> None:
    local = [line for line in commands() if "://" not in line and "search" not in line]
    assert [line.split()[1] for line in local] == ["check", "plan", "merge", "verify"]
    for line in local:
        first_screen(line)
    assert (tmp_path / "OUT" / "model.safetensors").exists()


def test_the_search(first_screen: Run, tmp_path: Path) -> None:
    auto, line = (line for line in commands() if " search " in line)
    (space,) = (text for text in blocks("yaml") if "search:" in text)
    (tmp_path / "space.yaml").write_text(space)
    (tmp_path / "score.py").write_text("import os, sys; print(len(os.listdir(sys.argv[1])))")
    for one, place in ((auto, "BEST"), (line, "OUT")):
        first_screen(one.replace("60", "2").replace("python ", f"{sys.executable} "))
        assert (tmp_path / f"{place}.search" / "best.yaml").exists()


def test_python_of_the_readme(first_screen: Run) -> None:
    assert blocks("python")
    for block in blocks("python"):
        first_screen(f"{sys.executable} -c {shlex.quote(block)}")


def test_commands_with_the_hub(
    first_screen: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (line,) = (line for line in commands() if "hf://" in line)
    name = "writer/of-the-readme"
    first_screen(line.replace("hf://user/merged", f"hf://{name}"))
    assert (Path(snapshot_download(name)) / "della_manifest.json").exists()


@pytest.mark.s3
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_commands_with_object_storage(first_screen: Run, s3_bucket: str, engine: str) -> None:
    remote = [line for line in commands() if "s3://" in line]
    (line,) = (line for line in remote if ("--engine ray" in line) == (engine == "ray"))
    first_screen(line.replace("s3://bucket/", f"s3://{s3_bucket}/"))


def test_documented_options_exist() -> None:
    shown = "".join(
        CliRunner().invoke(main, [command, "--help"], terminal_width=200).output
        for command in main.commands
    )
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown))
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\| `(mergekit-yaml|--).*? \|", "", text, flags=re.MULTILINE)  # mergekit's own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named - known == set()
    assert len(named) > 10
