"""Where the outputs of stages lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist.errors import OutputError
from della_dist.runtime.stages.places import disk_of, stage_places, stages_root


@pytest.mark.parametrize(
    ("out", "root"),
    [
        ("out", "out.stages"),
        ("a/out/", "a/out.stages"),
        ("/a/out", "/a/out.stages"),
        ("./a/../out", "a/../out.stages"),
        ("file:///a/out", "/a/out.stages"),
        ("s3://bucket/out", "s3://bucket/out.stages"),
        ("s3://bucket/a/out/", "s3://bucket/a/out.stages"),
        ("az://container@account.host/out", "az://container@account.host/out.stages"),
        ("memory://out", "memory://out.stages"),
    ],
)
def test_beside_the_output(out: str, root: str) -> None:
    assert stages_root(out) == root
    assert stage_places(["a", "b"], out) == {"a": f"{root}/a", "b": f"{root}/b"}


def test_of_the_current_directory_and_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert stages_root(".") == f"{tmp_path}/here/below.stages"
    assert stages_root("..") == f"{tmp_path}/here.stages"
    assert stages_root("../../x/..") == f"{tmp_path}.stages"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stages_root("~/out") == f"{tmp_path}/out.stages"


@pytest.mark.parametrize("out", ["/", "//", "s3://bucket", "s3://bucket/", "gs://b/."])
def test_nothing_lies_beside(out: str) -> None:
    with pytest.raises(OutputError, match="stage"):
        stages_root(out)
    assert stage_places([], out) == {}  # whoever has no stages does not care


def test_without_an_output_they_are_where_their_names_are() -> None:
    assert stage_places(["a"], None) == {"a": "a"}


def test_the_disk_of_what_is_not_there_yet(tmp_path: Path) -> None:
    assert disk_of(str(tmp_path / "a" / "b")) == tmp_path.stat().st_dev
    assert disk_of("s3://bucket/out") is None
