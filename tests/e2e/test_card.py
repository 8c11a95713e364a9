"""The model card and the statistics: names that mean something to whoever gets the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from della_dist.config import load_config, parse_config
from tests.checkpoints import make_experts, mixed_base, save_checkpoint
from tests.merging import config_for, run

HUB = "hub/models--org--name/snapshots/0123abcd"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a folder of the Hugging Face cache, and of two folders of one name."""
    folder = tmp_path_factory.mktemp("private")
    base = mixed_base()
    experts = make_experts(base, 3)
    places = [folder / HUB, folder / "math" / "final", folder / "code" / "final"]
    save_checkpoint(folder / "base", base)
    for place, expert in zip(places, experts, strict=True):
        save_checkpoint(place, expert)
    keys: dict[str, Any] = {
        "dtype": "bf16",
        "out_dtype": "F16",
        "parameters": {"density": 0.5},
        "seed": 9,
    }
    run(config_for(folder / "base", places, **keys), folder / "out")
    return folder / "out"


def card(out: Path) -> tuple[str, str]:
    """Return the whole card, and its recipe."""
    text = (out / "README.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return text, found[1]


def test_names(out: Path) -> None:
    text, _ = card(out)
    assert "| `base` | base |" in text
    for name in ("org/name", "math/final", "code/final"):
        assert f"| `{name}` | expert |" in text
    assert str(out.parent) not in text
    assert "base_model:\n- org/name\n" in text  # of the front matter


def test_recipe_is_a_configuration(out: Path) -> None:
    _, recipe = card(out)
    content = yaml.safe_load(recipe)
    assert (content["dtype"], content["out_dtype"]) == ("bfloat16", "float16")
    assert None not in content.values()
    shared = parse_config(recipe)
    assert shared.base_model == "base"
    assert [m.model for m in shared.models] == ["org/name", "math/final", "code/final"]
    # It means what was merged, but for where the checkpoints are.
    folder = out.parent
    places = {
        "base": "base",
        "org/name": HUB,
        "math/final": "math/final",
        "code/final": "code/final",
    }
    for entry in content["models"]:
        entry["model"] = str(folder / places[entry["model"]])
    content["base_model"] = str(folder / "base")
    path = folder / "again.yaml"
    path.write_text(yaml.safe_dump(content))
    again = run(load_config(path), out)
    assert again.tasks_resumed == again.num_tasks


def test_recipe_without_a_base(tmp_path: Path) -> None:
    base = mixed_base()
    places = [save_checkpoint(tmp_path / f"m{i}", e) for i, e in enumerate(make_experts(base, 2))]
    run(config_for(None, places, "linear"), tmp_path / "out")
    text, recipe = card(tmp_path / "out")
    assert "| `m0` | expert |" in text
    assert "base_model" not in recipe
    assert [m.model for m in parse_config(recipe).models] == ["m0", "m1"]


def test_statistics_name_the_experts(out: Path) -> None:
    rows = pq.read_table(out / "della_tensors.parquet").to_pylist()
    merged = [row for row in rows if row["action"] == "merge"]
    assert merged
    for row in merged:
        names = [expert["expert"] for expert in row["experts"]]
        assert names == ["org/name", "math/final", "code/final"]
