"""The files of cluster/ against each other, the image, SkyPilot's task and the README."""

from __future__ import annotations

import math
import re

import jsonschema
from packaging.specifiers import SpecifierSet

from della_dist.config import load_config
from tests.cluster_files import (
    CLUSTER,
    IMAGE,
    ROOT,
    commands,
    extras,
    files,
    rayjob,
    read,
    read_yaml,
    shell_text,
)
from tests.cluster_schemas import SKYPILOT

SPEED = (ROOT / "tests" / "bench" / "README.md").read_text()


def test_skypilot() -> None:
    task = read_yaml("skypilot.yaml")
    jsonschema.Draft202012Validator(SKYPILOT).validate(task)
    # SkyPilot's own Ray is at 6380; `ray stop` and `auto` would find it.
    assert not re.search(r"^[^#\n]*(ray stop|--address auto)", task["run"], re.MULTILINE)
    (merge,) = commands(task["run"], "della-dist")
    assert int(merge[merge.index("--workers") + 1]) == task["num_nodes"] * (
        task["resources"]["cpus"] // int(merge[merge.index("--threads") + 1])
    )


def test_image() -> None:
    instructions = re.findall(
        r"^([A-Z]+) (.*)$", read("Dockerfile").replace("\\\n", ""), re.MULTILINE
    )
    verbs = [verb for verb, _ in instructions]
    assert "ADD" not in verbs
    assert not any("://" in text for verb, text in instructions if verb in {"COPY", "RUN"})
    user = next(text for verb, text in reversed(instructions) if verb == "USER")
    assert user.isdecimal()
    assert int(user) > 0
    # Nothing is installed after the change of user, and nothing copied is left out of the context.
    assert "RUN" not in verbs[verbs.index("USER") :]
    for verb, text in instructions:
        if verb == "COPY":
            *sources, _ = (word for word in text.split() if not word.startswith("--"))
            assert all((ROOT / source).exists() for source in sources), text
    environment = dict(
        re.findall(r"(\w+)=(\S+)", " ".join(t for v, t in instructions if v == "ENV"))
    )
    assert re.search(
        rf"install --directory --owner=\S+ .*{environment['NUMBA_CACHE_DIR']}", read("Dockerfile")
    )
    pods = [rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]]
    assert [pod["securityContext"]["runAsUser"] for pod in pods] == [int(user)]


def test_extras_exist() -> None:
    named = {
        extra
        for path in files()
        for group in re.findall(
            r"\[((?:\w+,)*(?:s3|ray|torch)(?:,\w+)*)\]|EXTRAS=([\w,]+)", path.read_text()
        )
        for extra in "".join(group).split(",")
    }
    assert {"s3", "ray"} <= named
    assert named <= set(extras())


def test_one_version_of_ray_within_the_pin() -> None:
    versions = {rayjob()["spec"]["rayClusterSpec"]["rayVersion"]}
    for path in files():
        versions |= set(
            re.findall(r"(?:RAY_VERSION=|\bray(?:\[\w+\])?==)(\d[\d.]*)", path.read_text())
        )
    (version,) = versions
    specifier = re.search(r'"ray(?:\[\w+\])?([^"]+)"', extras()["ray"])
    assert specifier
    assert version in SpecifierSet(specifier[1])


def test_every_ray_is_started_with_a_token_and_a_small_object_store() -> None:
    starters = {path for path in files() for text in shell_text(path) if "ray start" in text}
    assert len(starters) == 4
    for path in starters:
        assert "RAY_AUTH_MODE=token" in path.read_text()
        assert "object-store-memory=268435456" in path.read_text()


def test_placeholders_are_the_same_everywhere() -> None:
    for path in files():
        text = path.read_text()
        assert set(re.findall(r"[\w./-]+/della-dist:\w+", text)) <= {IMAGE}, path.name
        assert {url.split("/")[0] for url in re.findall(r"s3://([\w/.$-]+)", text)} <= {"BUCKET"}, (
            path.name
        )
        assert set(re.findall(r"arn:aws:iam::(\w*):", text)) <= {"ACCOUNT"}, path.name
        assert "AKIA" not in text


def test_configuration_is_valid() -> None:
    config = load_config(CLUSTER / "merge.yaml")
    assert len(config.models) == 3


def test_readme_names_every_file() -> None:
    readme = read("README.md")
    for path in files():
        assert path.name == "README.md" or str(path.relative_to(CLUSTER)) in readme, path.name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (CLUSTER / link).exists(), link


def test_readme_calculates_rightly() -> None:
    parameters, width, experts = 70e9, 2, 3
    read_bytes = (experts + 1) * parameters * width
    written_bytes = parameters * width
    part = 8 << 20
    kernels = re.search(r"^\| `della` \|.*?\| (\d+) \| \d+ \| \d+ \|$", SPEED, re.MULTILINE)
    assert kernels
    per_core = int(kernels[1]) / 2
    readme = read("README.md")
    for text in (
        f"{read_bytes / 1e9:.0f} GB in {math.ceil(read_bytes / part):,} GETs",
        f"{written_bytes / 1e9:.0f} GB in {math.ceil(written_bytes / part):,} PUTs of 8 MiB",
        f"or {math.ceil(written_bytes / (2 * part)):,} of 16 MiB",
        f"{experts * parameters / 1e9:.0f}e9 expert-elements",
        f"{read_bytes / 1e9:.0f} s / (N B)",
        f"{(read_bytes + written_bytes) / 1e9:.0f} GB p_storage",
        f"`k` = {per_core:.0f}e6",
        f"64 cores would merge it in {experts * parameters / (64 * per_core * 1e6):.1f} s",
    ):
        assert text in readme, text
