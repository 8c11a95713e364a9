"""An average whose output takes over names, dtypes and files of a model that `base_model` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from della_dist import plan
from della_dist.cli import main
from della_dist.errors import InputError
from della_dist.runtime.verify import verify
from tests.checkpoints import load_tensors
from tests.merging import config_for, expected_tensors, run, save_family, write_config


def family(folder: Path) -> tuple[Path, list[Path]]:
    base, experts = save_family(folder)
    for i, path in enumerate((base, *experts)):
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "number": i}))
    return base, experts


def test_a_model_that_is_not_averaged(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    alone = run(config_for(None, experts, "linear"), tmp_path / "alone")
    config = config_for(base, experts, "linear")
    out = tmp_path / "out"
    summary = run(config, out)
    assert {n: t.raw.tobytes() for n, t in load_tensors(out).items()} == expected_tensors(config)
    assert summary.model_digest == alone.model_digest
    assert json.loads((out / "config.json").read_text())["number"] == 0
    assert len(verify(str(out), recompute=3).recomputed) == 3
    assert "| `base` | form and files |" in (out / "README.md").read_text()
    shown = CliRunner().invoke(main, ["plan", str(write_config(tmp_path / "c.yaml", config))])
    assert f"linear: 3 experts in the form of {base}" in shown.stdout
    assert "not averaged itself" in shown.stdout


def test_one_of_the_models_that_are_averaged(tmp_path: Path) -> None:
    _, experts = family(tmp_path)
    alone = run(config_for(None, experts, "linear"), tmp_path / "alone")
    config = config_for(experts[1], experts, "linear")
    out = tmp_path / "out"
    summary = run(config, out)
    assert summary.model_digest == alone.model_digest
    assert summary.bytes_read == plan(config).bytes_to_read < 1.01 * alone.bytes_read
    assert json.loads((out / "config.json").read_text())["number"] == 2
    assert run(config, out).already_complete
    assert len(verify(str(out), recompute=3).recomputed) == 3


def test_an_expert_is_still_named_once(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(experts[0])
    with pytest.raises(InputError, match="are the same checkpoint"):
        run(config_for(base, [*experts, link], "linear"), tmp_path / "out")
