"""`--auto` leaves open what is worth a search, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest

from della_dist.config import METHODS, MergeConfig, config_from_mapping
from della_dist.config.auto_space import LAMBDAS, auto_space
from della_dist.config.space import Space
from della_dist.errors import ConfigError

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
]
PLACES = ("in self_attn", "in mlp", "elsewhere")


def document(method: str = "task_arithmetic", num: int = 2, **keys: Any) -> dict[str, Any]:
    models = [{"model": f"/m/{name}"} for name in ("math", "code")[:num]]
    return {"merge_method": method, "base_model": "/m/base", "models": models, **keys}


def opened(content: dict[str, Any], names: list[str] = LLAMA) -> Space:
    return auto_space(content, "merge.yaml", names)


def labels(space: Space) -> list[str]:
    return [one.label for one in space.dimensions]


def weights_and_lambda(config: MergeConfig) -> list[tuple[Any, float]]:
    found = [config.settings_for(name, 0.0) for name in LLAMA]
    return [(one.weights, one.lambda_) for one in found]


def test_lambda_and_a_weight_for_each_expert_and_kind() -> None:
    content = document(parameters={"weight": 0.5, "lambda": 0.8})
    space = opened(content)
    assert labels(space) == [
        *(f"weight of {name} {place}" for name in ("math", "code") for place in PLACES),
        "lambda",
    ]
    ends = [(one.low, one.high, one.first) for one in space.dimensions]
    assert ends == [(0.0, 1.0, 0.5)] * 6 + [(0.2, 1.6, 0.8)]
    first, *then = space.starts
    as_it_is = weights_and_lambda(config_from_mapping(content))
    assert weights_and_lambda(space.config(first)) == as_it_is
    assert [one["parameters.lambda"] for one in then] == [0.8 * times for times in LAMBDAS]
    assert all(one[name] == first[name] for one in then for name in first if "weight" in name)
    found = space.config({name: (i + 1) / 10 for i, name in enumerate(first)})
    assert [weights for weights, _ in weights_and_lambda(found)] == [
        (0.3, 0.6),  # embeddings: the rest
        (0.1, 0.4),  # attention
        (0.2, 0.5),  # MLP
        (0.3, 0.6),  # a norm that has "attention" in its name
        (0.3, 0.6),
    ]
    assert "search" not in str(content)  # which is as it was


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    """With two experts, or as many as it takes; the configuration as it is comes first."""
    method = METHODS[name]
    own = {"density": 0.5, "t": 0.5}
    content = document(
        name,
        min(2, method.num_models or 2) - (method.base_among == "first"),
        parameters={key: value for key, value in own.items() if key in method.uses},
    )
    if method.passes_through or name == "linear":
        del content["base_model"]
    if method.uses & {"weight", "lambda"}:
        space = opened(content)
        assert weights_and_lambda(space.config(space.first)) == weights_and_lambda(
            config_from_mapping(content)
        )
        assert ("lambda" in method.uses) == any("lambda" in label for label in labels(space))
    else:
        with pytest.raises(ConfigError, match=f"{name} has none of these"):
            opened(content)


def test_lambda_of_each_kind() -> None:
    """Where weights do not tell how far a tensor goes."""
    lambdas = [f"lambda {place}" for place in PLACES]
    assert labels(opened(document(num=1))) == lambdas
    assert labels(opened(document("ties", parameters={"density": 0.5})))[6:] == lambdas
    free = document("ties", parameters={"density": 0.5, "normalize": False})
    assert labels(opened(free))[6:] == ["lambda"]


def test_what_a_configuration_tells_apart_itself() -> None:
    models = [
        {
            "model": "/m/math",
            "parameters": {"weight": [{"filter": "mlp", "value": 0}, {"value": -1}]},
        },
        {"model": "/m/code", "parameters": {"weight": [0.1, "2e-1"]}},
        {"model": "/m/chat", "parameters": {"weight": [0.1, 0.2, 0.3, 0.4, 0.5]}},
        {"model": "/m/base"},
    ]
    space = opened(document(models=models, parameters={"lambda": -0.5}))
    assert [(one.name, one.low, one.high, one.first) for one in space.dimensions] == [
        ("models[0].parameters.weight[1].value", -2.0, 0.0, -1.0),
        ("models[1].parameters.weight[0]", 0.0, 0.2, 0.1),
        ("models[1].parameters.weight[1]", 0.0, 0.4, 0.2),
        ("parameters.lambda", -1.0, -0.125, -0.5),
    ]
    assert len(set(labels(space))) == 4


@pytest.mark.parametrize(
    ("names", "filters"),
    [
        (["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "wte"], [".attn.", ".mlp.", "*"]),
        (["l.0.attention.q", "l.0.feed_forward.w"], [".attention.", "*"]),
        (["l.0.attention.q", "l.1.attention.q"], []),
        (["l.0.self_attn.q", "l.0.linear_attn.q", "x"], [".self_attn.", ".linear_attn.", "*"]),
        (["encoder.0.w", "encoder.1.w"], []),
    ],
)
def test_kinds_of_tensors(names: list[str], filters: list[str]) -> None:
    """What is of one kind has one value, by whatever names."""
    weight = opened(document(), names).document["models"][0]["parameters"]["weight"]
    assert ([one["filter"] for one in weight] if filters else []) == filters
    assert isinstance(weight, list) == bool(filters)
    if ".linear_attn." in filters:
        assert weight[0]["value"] is weight[1]["value"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (document(parameters={"lambda": {"search": [0, 1]}}), "leaves values open itself"),
        (document(parameters={"lambda": {"search": [1, 0]}}), "the first must be smaller"),
        (document("tees"), "merge_method"),
        (document(parameters={"weight": 0, "lambda": 0}), "has none of these"),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": "/m/math", "layer_range": [0, 2]}]}],
            },
            "has slices",
        ),
    ],
)
def test_what_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        opened(content)
    assert str(caught.value).startswith("merge.yaml: ")
