"""`della-dist init` proposes a configuration for the models that it has looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.config import MergeConfig, parse_config
from tests.kin import drawn, save, tuned
from tests.merging import assert_paragraph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and what was made of it."""
    folder = tmp_path_factory.mktemp("kin")
    base = drawn(0)
    save(folder / "base", base)
    for number, (name, relative) in enumerate((("math", 0.04), ("code", 0.05), ("far", 0.3))):
        save(folder / name, tuned(base, relative, number + 1))
    math = tuned(base, 0.04, 1)
    again = tuned(math, 0.005, 9)
    save(folder / "math again", again)
    save(folder / "math further", tuned(math, 0.025, 10))
    save(folder / "copy", base)
    save(folder / "other", drawn(1))
    return folder


def init(folder: Path, *names: str) -> Result:
    return CliRunner().invoke(main, ["init", *(str(folder / name) for name in names)])


def proposed(folder: Path, *names: str) -> tuple[str, MergeConfig]:
    result = init(folder, "base", *names)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout, parse_config(result.stdout)


def test_experts_of_different_roles(folder: Path, tmp_path: Path) -> None:
    """What is proposed is merged as it is."""
    text, config = proposed(folder, "math", "code")
    assert config.merge_method == "wudi"
    assert [Path(one.model).name for one in config.models] == ["math", "code"]
    assert config.settings_for("model.layers.0.mlp.up_proj.weight", 0.0).lambda_ == 0.8
    assert "delta 4" in text
    (tmp_path / "merge.yaml").write_text(text)
    words = ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--quiet"]
    assert CliRunner().invoke(main, words).exit_code == 0


def test_experts_that_are_far(folder: Path) -> None:
    _, config = proposed(folder, "math", "far")
    assert config.settings_for("model.layers.0.mlp.up_proj.weight", 0.0).lambda_ == 0.6


def test_experts_of_one_role(folder: Path) -> None:
    text, config = proposed(folder, "math", "math further")
    assert (config.merge_method, yaml.safe_load(text)["parameters"]) == (
        "task_arithmetic",
        {"normalize": True},
    )


def test_the_same_fine_tune_twice(folder: Path) -> None:
    text, config = proposed(folder, "math", "math again", "code")
    assert config.settings_for("model.norm.weight", 0.0).weights == (0.5, 0.5, 1.0)
    assert "nearly the same fine-tune as math again" in text


def test_one_expert_and_a_copy(folder: Path) -> None:
    text, config = proposed(folder, "math", "copy")
    assert config.merge_method == "task_arithmetic"
    assert [Path(one.model).name for one in config.models] == ["math"]
    assert f'# - model: "{folder / "copy"}" # an untouched copy' in text
    _, alone = proposed(folder, "math")
    assert alone.merge_method == "task_arithmetic"


def test_a_damaged_expert_is_named(folder: Path, tmp_path: Path) -> None:
    weights = tuned(drawn(0), 0.04, 1)
    next(iter(weights.values())).flat[0] = np.nan
    save(tmp_path / "torn", weights)
    result = init(folder, "base", "math", str(tmp_path / "torn"))
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if "DAMAGED" in line)
    assert f"- model: {tmp_path / 'torn'} #" in line.replace('"', "")
    assert parse_config(result.stdout).models[1].model == str(tmp_path / "torn")


def test_another_backbone(folder: Path) -> None:
    assert_paragraph(init(folder, "base", "math", "other"), 2, "other", "backbone")
    assert init(folder, "base").exit_code == 2
