"""Whatever is written: a configuration or one `ConfigError`, and the same again when normalised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from hypothesis import given
from hypothesis import strategies as st

from della_dist.config import (
    METHODS,
    MergeConfig,
    config_from_mapping,
    layer_fraction,
    parse_config,
)
from della_dist.errors import ConfigError

T = TypeVar("T")

TOP_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "seed", "granularity", "rescale", "on_nonfinite",
    "extra_tensors", "slices", "modules", "output",
)  # fmt: skip
PARAMETERS = (
    "weight", "density", "drop_rate", "epsilon", "window_size", "normalize", "rescale", "lambda",
    "int8_mask",
)  # fmt: skip
KEYS = (*TOP_KEYS, *PARAMETERS, "model", "filter", "value", "adapter")
WORDS = ("della", "ties", "linear", "base", "x", "./x", "~", "true", "none", "l1", "1e-3", "bf16")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(KEYS), scalars),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
documents = st.dictionaries(
    st.one_of(st.sampled_from(TOP_KEYS), st.text(max_size=5)), anything, max_size=6
)


def outcome(function: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """Return the result, or the message of the one error that is allowed."""
    try:
        return function(*args), ""
    except ConfigError as error:
        return None, str(error)


def check(made: MergeConfig | None, message: str) -> None:
    assert "\n" not in message
    assert "pydantic" not in message
    assert len(message) < 2000
    if made is not None:
        assert config_from_mapping(made.normalized()) == made


yamlish = st.one_of(st.characters(), st.sampled_from("{}[]:,-&*!|>'\"#\n \t?%@"))


@given(st.text(alphabet=yamlish))
def test_any_text(text: str) -> None:
    check(*outcome(parse_config, text, "c.yaml"))


@given(anything)
def test_any_yaml(value: object) -> None:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    check(*outcome(parse_config, yaml.dump(value, Dumper=Dumper, allow_unicode=True), "c.yaml"))


@given(documents, st.sampled_from(sorted(METHODS)), st.booleans())
def test_any_mapping(document: dict[str, Any], method: str, whole: bool) -> None:
    if whole:
        document = {"models": [{"model": "x"}], "base_model": "b", **document}
        document["merge_method"] = method
    check(*outcome(config_from_mapping, document, "c.yaml"))


def settings_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return values, gradients of them, and conditions on either."""
    points = st.one_of(values, st.lists(values, min_size=1, max_size=5))
    condition = st.fixed_dictionaries(
        {"value": points}, optional={"filter": st.sampled_from(["*", "mlp", "attn", "norm", "a"])}
    )
    conditions = st.lists(condition, min_size=1, max_size=4).map(
        # What has no filter comes last: filters behind it are refused.
        lambda found: sorted(found, key=lambda c: c.get("filter", "*") == "*")
    )
    return st.one_of(points, condition, conditions)


weights = st.floats(-4, 4, width=32)
own = {
    "weight": settings_of(weights),
    "density": settings_of(st.floats(0.001, 1)),
    "window_size": settings_of(st.floats(0, 0.001)),
}
shared = {
    **own,
    "normalize": settings_of(st.booleans()),
    "rescale": settings_of(st.sampled_from([True, False, "l1", "none"])),
    "lambda": settings_of(weights),
    "t": settings_of(weights),
}


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Return a configuration that is nearly always valid."""
    method = draw(st.sampled_from(sorted(METHODS)))
    takes = METHODS[method]
    least, most = (takes.num_models or n for n in (takes.least_models, 4))
    models = [
        {"model": f"e{i}", "parameters": draw(st.fixed_dictionaries({}, optional=own))}
        for i in range(draw(st.integers(least, most)))
    ]
    document: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": draw(st.fixed_dictionaries({}, optional=shared)),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "dtype": draw(st.sampled_from([None, "bfloat16", "float32"])),
        "granularity": draw(st.sampled_from(["row", "tensor"])),
    }
    if takes.has_base and not (takes.base_is_optional and draw(st.booleans())):
        document["base_model"] = "base"
    if takes.base_among is not None and (takes.base_among == "first" or draw(st.booleans())):
        document["base_model"] = draw(st.sampled_from([model["model"] for model in models]))
    if method == "slerp":
        document["parameters"].setdefault("t", draw(st.floats(-2, 2)))
    return document


NAMES = ("model.layers.0.mlp.w", "model.layers.1.attn.w", "model.norm.weight", "x")


@given(valid(), st.floats(0, 1))
def test_round_trip_and_bounds(document: dict[str, Any], t: float) -> None:
    made, message = outcome(config_from_mapping, document)
    if made is None:
        reasons = [
            "sum to zero",
            "keep probabilities",
            "no value",
            "at least 0",  # weights of `wudi`, and `t` of `nearswap`
            "belongs to another meaning of `epsilon`",  # window_size, with `ram`
        ]
        assert any(reason in message for reason in reasons)
        return
    plain = made.normalized()
    again = config_from_mapping(json.loads(json.dumps(plain)))
    assert again == made
    assert again.normalized() == plain
    for name in NAMES:
        settings, message = outcome(made.settings_for, name, t)
        if settings is None:
            assert f"tensor {name}" in message
            continue
        assert again.settings_for(name, t) == settings
        for density, epsilon in zip(settings.densities, settings.epsilons, strict=True):
            assert density - epsilon > 0
            assert density + epsilon <= 1
            assert epsilon >= 0
        assert len(settings.weights) == len(made.models)


@given(st.floats(2**-23, 1), st.floats(0, 1))
def test_density_and_epsilon_never_leave_their_bounds(density: float, part: float) -> None:
    epsilon = part * min(density * (1 - 1e-6), 1 - density, 0.499)
    if density - epsilon < 2**-24:
        return
    document = {
        "merge_method": "della",
        "base_model": "b",
        "models": [{"model": "x"}],
        "parameters": {"density": density, "epsilon": epsilon},
    }
    made = config_from_mapping(document).settings_for("a", 0)
    assert made.densities[0] - made.epsilons[0] > 0
    assert made.densities[0] + made.epsilons[0] <= 1
    assert abs(made.epsilons[0] - epsilon) <= 1e-9


@given(st.lists(st.text(alphabet="ab.0123456789", max_size=30)))
def test_layer_fraction_is_a_fraction(names: list[str]) -> None:
    fractions = layer_fraction(names)
    assert set(fractions) == set(names)
    assert all(0 <= t <= 1 for t in fractions.values())
