"""What a search goes through: values left open in a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from della_dist.config.space import Space, read_document
from della_dist.errors import ConfigError

TEXT = """
merge_method: {choices: [ties, dare_ties]}
base_model: /m/base
models:
  - model: /m/math
    parameters: {weight: &w {search: [0.0, 2.0]}}
  - model: /m/code
    parameters:
      weight: *w
      density: [{filter: mlp, value: {search: [0.1, 0.9], step: 0.2}}, {value: 0.5}]
parameters: {lambda: {search: [0.25, 4], log: true, first: 2}}
"""


def test_values_and_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TEXT)
    space = Space(read_document(tmp_path / "space.yaml"), "space.yaml")
    assert space.first == {
        "merge_method": "ties",
        "models[0].parameters.weight": 1.0,
        "models[1].parameters.density[0].value": pytest.approx(0.5),
        "parameters.lambda": 2.0,
    }
    assert [str(one) for one in space.dimensions] == [
        "merge_method: ties, dare_ties",
        "weight of math: 0 to 2, 1 first",
        "density of code in mlp: 0.1 to 0.9 in steps of 0.2, 0.5 first",
        "lambda: 0.25 to 4 by its logarithm, 2 first",
    ]
    values = {**space.first, "models[0].parameters.weight": 0.75, "merge_method": "dare_ties"}
    mapping = space.mapping(values)
    assert mapping["merge_method"] == "dare_ties"
    assert [one["parameters"]["weight"] for one in mapping["models"]] == [0.75, 0.75]
    config = space.config(values)
    assert config.merge_method == "dare_ties"
    assert config.settings_for("model.layers.0.mlp.up.weight", 0.0).weights == (0.75, 0.75)
    assert space.mapping(space.first)["models"][0]["parameters"]["weight"] == 1.0


def document(weight: Any, **more: Any) -> dict[str, Any]:
    models = [{"model": "/m/math", "parameters": {"weight": weight}}]
    return {"merge_method": "task_arithmetic", "base_model": "/m/base", "models": models, **more}


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    text = TEXT.replace("[0.25, 4], log: true, first: 2", "[1e-4, 1.0], log: true, first: 1e-2")
    text = text.replace("[0.1, 0.9], step: 0.2", "[1e-1, 0.9], step: 2e-1")
    (tmp_path / "space.yaml").write_text(text)
    space = Space(read_document(tmp_path / "space.yaml"), "space.yaml")
    density, lambda_ = space.dimensions[2:]
    assert (density.low, density.high, density.step) == (0.1, 0.9, 0.2)
    assert (lambda_.low, lambda_.high, lambda_.first) == (1e-4, 1.0, 0.01)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (1.0, "nothing is to be searched"),
        ({"search": [1, 0]}, "the first must be smaller"),
        ({"search": [0, 0]}, "the first must be smaller"),
        ({"search": [0]}, "write two numbers"),
        ({"search": [0, "x"]}, "write two numbers"),
        ({"search": [0, float("nan")]}, "write two numbers"),
        ({"search": [True, 2]}, "write two numbers"),
        ({"search": 3}, "write two numbers"),
        ({"search": [0, 1], "log": True}, "by its logarithm"),
        ({"search": [1, 2], "log": "yes"}, "write true or false"),
        ({"search": [0, 1], "step": 2}, "write a number up to 1"),
        ({"search": [0, 1], "first": 2}, "write a number from 0 to 1"),
        ({"search": [0, 1], "first": True}, "write a number from 0 to 1"),
        ({"search": [0, 1], "first": 0.3, "step": 0.2}, "which no step of 0.2 from 0 meets"),
        ({"search": [0, 1], "steps": 2}, "steps, unknown in a search"),
        ({"choices": [1]}, "two or more"),
        ({"choices": [1, 2], "log": True}, "no other key"),
        ({"choices": [1, [2]]}, "neither numbers nor words"),
    ],
)
def test_what_is_no_range(weight: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Space(document(weight), "space.yaml")
    assert str(caught.value).startswith("space.yaml: ")
    if weight != 1.0:
        assert "models[0].parameters.weight" in str(caught.value)


def test_ends_that_are_refused() -> None:
    """All that a range can give is a configuration, as far as its ends tell."""
    with pytest.raises(ConfigError, match=r"at models\[0\]\.parameters\.density 1\.5: .*density"):
        Space(
            {
                "merge_method": "ties",
                "base_model": "/m/base",
                "models": [{"model": "/m/math", "parameters": {"density": {"search": [0.5, 1.5]}}}],
            },
            "space.yaml",
        )
    with pytest.raises(ConfigError, match="merge_method"):
        Space(document(1.0, merge_method={"choices": ["ties", "tees"]}), "space.yaml")


def test_several_documents(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"name: one\n{TEXT}\n---\n{TEXT}")
    with pytest.raises(ConfigError, match="has 2 documents"):
        read_document(tmp_path / "space.yaml")
    (tmp_path / "space.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no configuration"):
        read_document(tmp_path / "space.yaml")
