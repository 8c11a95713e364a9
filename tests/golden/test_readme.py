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
from della_dist.config.methods import METHODS
from della_dist.config.parameters import parameter_keys
from della_dist.config.schema import Document, Model
from della_dist.config.space import Space
from della_dist.ops.philox import stream_key
from della_dist.ops.reference import philox4x32
from della_dist.storage.shard_files import SAFETENSORS, TORCH
from della_dist.storage.tensor_table import TENSORS_NAME, load_tensors
from della_dist.storage.torch_files.tensors import WRAPPERS
from tests.merging import save_family
from tests.servers.hub import Hub
from tests.servers.hub_writes import TOKEN

Run: TypeAlias = Callable[[str], str]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "configs" / "README.md").read_text()
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


PAGES = (
    "README.md",
    "configs/README.md",
    "della_dist/README.md",
    "cluster/README.md",
    "tests/bench/README.md",
)


@pytest.mark.parametrize("page", [*PAGES, ".github/CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text)
    assert links or page not in ("README.md", "cluster/README.md")
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


def anchors(page: Path) -> set[str]:
    """Return what links to the headings of a page end with."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def blocks(language: str) -> list[str]:
    """Return what stands in the README's blocks of code."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def first_screen(tmp_path: Path) -> Run:
    """Return what runs a shell command where a reader of the first screen would, for its stdout."""
    base, experts = save_family(tmp_path / "path" / "to", num_experts=2)
    for path, name in zip(experts, ("math", "code"), strict=True):
        path.rename(base.with_name(name))
    (tmp_path / "merge.yaml").write_text(blocks("yaml")[0])
    command = tmp_path / "bin" / "della-dist"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m della_dist "$@"\n')
    command.chmod(0o755)

    def run(line: str) -> str:
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
        return done.stdout

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


def test_every_method_is_compared() -> None:
    table = RECIPES.partition("\n## Which method\n")[2].partition("\n\nWhat is read")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall("`(.*?)`", cell)} - {
        "merge_method"
    } == set(METHODS)


def commands() -> list[str]:
    """Return the commands of the README that are no installations."""
    lines = [
        line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("della-dist ")]


def test_commands_of_the_first_screen(first_screen: Run, tmp_path: Path) -> None:
    local = [line for line in commands() if "://" not in line and "search" not in line]
    assert [line.split()[1] for line in local] == ["check", "plan", "merge", "verify", "report"]
    for line in local:
        first_screen(line)
    assert (tmp_path / "OUT" / "model.safetensors").exists()
    assert (tmp_path / "OUT" / "report.html").exists()


def test_the_search(first_screen: Run, tmp_path: Path) -> None:
    auto, line = (line for line in commands() if " search " in line)
    (space,) = (text for text in blocks("yaml") if "search:" in text)
    (tmp_path / "space.yaml").write_text(space)
    (tmp_path / "score.py").write_text("import os, sys; print(len(os.listdir(sys.argv[1])))")
    for one, place in ((auto, "BEST"), (line, "OUT")):
        first_screen(one.replace("60", "2").replace("python ", f"{sys.executable} "))
        assert (tmp_path / f"{place}.search" / "best.yaml").exists()


def test_python_of_the_readme(first_screen: Run, tmp_path: Path) -> None:
    shown = {b: first_screen(f"{sys.executable} -c {shlex.quote(b)}") for b in blocks("python")}
    by_pandas, by_polars, by_duckdb = (
        text
        for library in ("pandas", "polars", "duckdb")
        for block, text in shown.items()
        if block.startswith(f"import {library}")
    )
    records = load_tensors((tmp_path / "OUT" / TENSORS_NAME).read_bytes())
    merged = [(r.name, r.stats) for r in records if r.stats is not None and r.stats.experts]
    told = [line.split()[1:3] for line in by_pandas.splitlines()[1:]]
    least = sorted((s.experts[0].cosine, n) for n, s in merged if s.experts[0].cosine is not None)
    assert [name for name, _ in told] == [name for _, name in least[:10]]
    cosines = [cosine for cosine, _ in least[:10]]
    assert [float(cosine) for _, cosine in told] == pytest.approx(cosines, abs=1e-5)

    kind = [s for name, s in merged if name.endswith(".q_proj.weight")]
    share = sum(s.num_conflicts for s in kind) / sum(s.num_elements for s in kind)
    found = re.search(r"│ q_proj +┆ ([0-9.]+) ", by_polars)
    assert found is not None
    assert float(found[1]) == pytest.approx(share, abs=1e-5)

    for m, (expert, density) in enumerate((("math", 0.6), ("code", 0.5))):
        found = re.search(rf"│ {expert} +│ +([0-9.]+) │ +([0-9.]+) │ +([0-9.]+) │", by_duckdb)
        assert found is not None
        own = [s.experts[m] for _, s in merged]
        kept, elected, changed = (
            sum(getattr(e, f"num_{what}") for e in own) for what in ("kept", "elected", "nonzero")
        )
        expected = (kept / changed, elected / changed, density)
        assert tuple(map(float, found.groups())) == pytest.approx(expected)


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
    text = README + RECIPES
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\| `(mergekit-yaml|--).*? \|", "", text, flags=re.MULTILINE)  # mergekit's own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named - known == set()
    assert len(named) > 10
