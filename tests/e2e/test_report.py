"""`della-dist report` says what happened in a merge, and what two merges have otherwise."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.storage.opening import open_store
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.tensor_table import TENSORS_NAME
from tests import kin
from tests.checkpoints import load_tensors, tensor, values_of
from tests.interrupting import interrupt
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
    assert said.elements["svg"] == said.elements["details"] == len(written) - 1
    names = {path.stem for path in written[1:]}
    assert names >= {"conflicts", "delta-1", "delta-2", "delta-3", "timeline"}
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
    assert "it was run with --no-check" in text
    ((began, session),) = rows(text, "Sessions").items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", began)
    assert (session[0], session[3]) == ("local", "1")


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
    both = report(family / "ties", family / "della", "--card")
    assert_paragraph(both, 2, "--card", "of one output")
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
    for label in ("Experts", "Kinds of tensors", "Size of the deltas by expert: numbers"):
        assert rows(text, label) == rows((tmp_path / "local.html").read_text(), label)
    (session,) = rows(text, "Sessions").values()
    assert session[3] == "1"
    found = report(f"s3://{s3_bucket}/out", "--card")
    assert f"s3://{s3_bucket}/out/della_pictures/sizes.png" in found.stdout.splitlines()
    store = open_store(f"s3://{s3_bucket}/out")
    assert store.read("della_pictures/sizes.png")[:4] == b"\x89PNG"
    assert "](della_pictures/sizes.png)" in store.read("README.md").decode()


def test_of_a_run_in_two_sessions(tmp_path: Path) -> None:
    """With the check that came before it, as the page of a copy shows it."""
    base = kin.drawn(0)
    experts = [kin.save(tmp_path / f"e{m}", kin.tuned(base, 0.05, 100 + m)) for m in range(3)]
    config = config_for(kin.save(tmp_path / "base", base), experts)
    out = tmp_path / "out"
    interrupt(config, out, after=3, shard_bytes=100_000, check=True)
    run(config, out, shard_bytes=100_000)
    assert report(out).exit_code == 0
    text = (out / "report.html").read_text()
    Page(text)
    assert "in 2 sessions" in text
    assert list(rows(text, "Models")) == ["e0", "e1", "e2"]
    cosines = rows(text, "Cosine between deltas: numbers")
    deltas = [
        np.concatenate([(found[name] - base[name]).ravel() for name in base if "norm" not in name])
        for found in (kin.tuned(base, 0.05, 100 + m) for m in range(3))
    ]
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas):
            expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert float(cosines[f"e{i}"][j]) == pytest.approx(expected, abs=0.02)
    assert all(cosines[f"e{i}"][i] == "1.000" for i in range(3))
    # What is damaged is said, and the rest is there.
    (out / RUN_NAME).write_bytes(b"{}")
    assert report(out).exit_code == 0
    text = (out / "report.html").read_text()
    assert "There is no record of how it was run" in text
    assert "Cosine between deltas" not in text


def test_in_the_card(family: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(family / "della", tmp_path / "out"))
    before = (out / "README.md").read_text()
    written = [Path(line) for line in report(out, "--card").stdout.splitlines()]
    assert written[0] == out / "report.html"
    assert written[-1] == out / "README.md"
    card = (out / "README.md").read_text()
    files = re.findall(r"!\[[^\]]+\]\((della_pictures/[a-z-]+\.png)\)", card)
    assert [out / file for file in files] == written[1:-1]
    assert all((out / file).read_bytes()[:4] == b"\x89PNG" for file in files)
    mark = "della-dist pictures -->"
    assert re.sub(rf"(?s)<!-- {mark}.*<!-- /{mark}\n\n", "", card) == before
    assert card.index("## The merge in pictures") < card.index("## Recipe")
    # Once more: they are replaced, and what a person has written stays.
    (out / "README.md").write_text(card + "Mine.\n")
    (out / files[0]).write_bytes(b"old")
    assert report(out, "--card").exit_code == 0
    assert (out / "README.md").read_text() == card + "Mine.\n"
    assert (out / files[0]).read_bytes()[:4] == b"\x89PNG"
    verified = CliRunner().invoke(main, ["verify", str(out)])
    assert verified.exit_code == 0
    assert "README.md was edited since" in verified.stdout
    # The pictures are no part of a model: neither of this one, nor of one that is made of it.
    experts = [family / f"expert{m}" for m in range(3)]
    assert run(config_for(family / "base", experts, parameters={"density": 0.5}), out)
    run(config_for(out, experts, "task_arithmetic"), tmp_path / "next")
    assert not {"della_pictures", "report.html"} & {p.name for p in (tmp_path / "next").iterdir()}


def test_cards_that_are_refused(family: Path, tmp_path: Path) -> None:
    assert_paragraph(report("hf://user/merged", "--card"), 2, "--card", "on the Hub", "upload")
    out = Path(shutil.copytree(family / "ties", tmp_path / "out"))
    card = out / "README.md"
    text = card.read_text()
    for content in (text + "<!-- della-dist pictures -->\n", "\ufffe".encode("utf-16")):
        card.write_bytes(content.encode() if isinstance(content, str) else content)
        assert_paragraph(report(out, "--card"), 2, "--card", str(card), "cannot be used")
    card.unlink()
    assert_paragraph(report(out, "--card"), 2, "--card", "has no README.md")
    (tmp_path / "card.md").write_text(text)
    card.symlink_to(tmp_path / "card.md")
    assert_paragraph(report(out, "--card"), 2, "--card", "links", "README.md")
    assert (tmp_path / "card.md").read_text() == text
    assert not (out / "della_pictures").exists()
    copies = config_for(None, [family / "base"], "passthrough")
    run(copies, tmp_path / "copies")
    assert_paragraph(report(tmp_path / "copies", "--card"), 2, "--card", "no pictures")
