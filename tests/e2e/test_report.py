"""`della-dist report` says what happened in a merge, and what two merges have otherwise."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.checkpoints import load_tensors, tensor, values_of
from tests.merging import assert_paragraph, config_for, run, save_family
from tests.unit.test_report_page import Page


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, three experts, and merges `della` and `ties`."""
    folder = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(0)
    base = {
        f"model.layers.{i}.mlp.{kind}.weight": tensor(rng.normal(0, 0.05, (24, 16)), "F32")
        for i in range(3)
        for kind in ("up_proj", "down_proj")
    }
    at, experts = save_family(folder, base)
    run(config_for(at, experts, parameters={"density": 0.5}), folder / "della")
    run(config_for(at, experts, "ties", parameters={"density": 0.5}), folder / "ties")
    return folder


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def rows(text: str, label: str) -> dict[str, list[str]]:
    """Return the cells of a table by the first of each row."""
    part = text[text.index(f'aria-label="{label}"') :]
    part = part[: part.index("</table>")]
    found = {}
    for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', part, re.DOTALL):
        first, *cells = re.split(r"</t[hd]><td[^>]*>", row.removesuffix("</td>"))
        found[unescape(first)] = [unescape(cell) for cell in cells]
    return found


def test_what_is_said_of_a_merge(family: Path, tmp_path: Path) -> None:
    result = report(family / "della", "--to", tmp_path / "page.html", "--png", tmp_path / "png")
    assert result.exit_code == 0, result.output
    written = [Path(line) for line in result.stdout.splitlines()]
    assert written[0] == tmp_path / "page.html"
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:])
    assert [path.stem for path in written[1:4]] == ["sizes", "kept", "influence"]
    text = written[0].read_text()
    said = Page(text)
    assert said.elements["svg"] == len(written) - 1 == 7
    base = {name: values_of(t) for name, t in load_tensors(family / "base").items()}
    experts = rows(text, "Experts")
    sizes = rows(text, "Size of the deltas by expert: numbers")
    for m in range(3):
        found = load_tensors(family / f"expert{m}")
        deltas = {name: values_of(found[name]) - base[name] for name in base}
        every = np.concatenate([delta.ravel() for delta in deltas.values()])
        norm, size, changed, planned, kept, _ = experts[f"expert{m}"]
        assert float(norm) == pytest.approx(np.linalg.norm(every), rel=1e-3)
        assert float(size) == pytest.approx(np.sqrt(np.mean(every**2)), rel=1e-2)
        assert changed == f"{100 * np.mean(every != 0):.1f} %"
        assert planned == "50.0 %"
        assert 40 < float(kept.removesuffix(" %")) < 70
        of_layer = [
            np.concatenate([d.ravel() for name, d in deltas.items() if f".{i}." in name])
            for i in range(3)
        ]
        assert [float(cell) for cell in sizes[f"expert{m}"]] == pytest.approx(
            [float(np.sqrt(np.mean(one**2))) for one in of_layer], rel=1e-2
        )
    assert "density: 0.5" in text


def test_where_the_page_goes(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = family / "ties" / "report.html"
    assert report(family / "ties").stdout == f"{page}\n"
    assert CliRunner().invoke(main, ["verify", str(family / "ties")]).exit_code == 0
    page.unlink()
    assert report(family / "ties", family / "della").stdout == "report.html\n"
    assert (tmp_path / "report.html").exists()
    assert report(family / "ties", "--to", "quiet.html", "-q").output == ""
    assert (tmp_path / "quiet.html").exists()


def test_two_merges(family: Path, tmp_path: Path) -> None:
    same = report(family / "ties", family / "ties", "--to", tmp_path / "same.html")
    assert same.exit_code == 0, same.output
    text = (tmp_path / "same.html").read_text()
    assert "6 of 6 tensors have equal bytes" in text
    assert "Both have the same recipe" in text
    report(family / "ties", family / "della", "--to", tmp_path / "two.html")
    text = (tmp_path / "two.html").read_text()
    Page(text)
    assert "0 of 6 tensors have equal bytes" in text
    assert "-merge_method: ties\n+merge_method: della" in text
    assert rows(text, "Equal bytes: numbers")["mlp.up_proj"] == ["0.0 %"] * 3


def test_what_is_refused(family: Path, tmp_path: Path) -> None:
    assert_paragraph(report(tmp_path), 2, "holds no finished output")
    both = report(family / "ties", family / "della", "--png", tmp_path)
    assert_paragraph(both, 2, "--png", "of one output")
    nowhere = report(family / "ties", "--to", tmp_path / "no" / "page.html")
    assert_paragraph(nowhere, 2, "cannot be written", "no/page.html")


def test_damaged_table(family: Path, tmp_path: Path) -> None:
    for name in ("della_manifest.json", TENSORS_NAME):
        (tmp_path / name).write_bytes((family / "ties" / name).read_bytes())
    (tmp_path / TENSORS_NAME).write_bytes(b"PAR1")
    assert_paragraph(report(tmp_path), 3, TENSORS_NAME, "is damaged")


def test_from_a_store(
    family: Path, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experts = [family / f"expert{m}" for m in range(3)]
    config = config_for(family / "base", experts, parameters={"density": 0.5})
    run(config, f"s3://{s3_bucket}/out")
    assert report(f"s3://{s3_bucket}/out").stdout == "report.html\n"
    text = (tmp_path / "report.html").read_text()
    run(config, tmp_path / "out")
    report(tmp_path / "out", "--to", "local.html")
    assert text == (tmp_path / "local.html").read_text()
