"""The configuration: what it means, and one clear paragraph for everything that is wrong."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from della_dist.config import (
    METHODS,
    MergeConfig,
    config_from_mapping,
    layer_fraction,
    load_config,
    parse_config,
    parse_dtype,
)
from della_dist.config.output import OutputForm
from della_dist.config.parameters import default_epsilon
from della_dist.config.reading import read_yaml
from della_dist.config.tokenizer import TokenizerPolicy, TokenSource
from della_dist.errors import ConfigError
from della_dist.specs.recipe import Angles, Balance, MergeSettings, Overlap

CONFIGS = Path(__file__).parents[2] / "configs"
TENSOR = "model.layers.3.mlp.up_proj.weight"


def config(method: str = "della", *, experts: int = 2, **keys: Any) -> MergeConfig:
    """Return a configuration of experts e0, e1, ... with `keys` at the top level."""
    return config_from_mapping(mapping(method, experts=experts, **keys), "c.yaml")


def mapping(method: str = "della", *, experts: int = 2, **keys: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"e{i}"} for i in range(experts)],
        **keys,
    }
    if method != "linear":
        whole.setdefault("base_model", "base")
    return whole


def settings(method: str = "della", *, t: float = 0.0, **keys: Any) -> MergeSettings:
    return config(method, **keys).settings_for(TENSOR, t)


def refused(text: str | dict[str, Any]) -> str:
    read: Callable[[Any, str], object] = config_from_mapping
    if isinstance(text, str):
        read = parse_config
    with pytest.raises(ConfigError) as caught:
        read(text, "c.yaml")
    message = str(caught.value)
    assert message.startswith("c.yaml")
    assert "\n" not in message
    assert "pydantic" not in message
    assert message[-1] in ".?"
    return message


# ---------------------------------------------------------------- the example files


@pytest.mark.parametrize(
    "path", [CONFIGS / f"{name}.yaml" for name in METHODS], ids=lambda p: p.stem
)
def test_examples(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.merge_method == path.stem
    assert loaded.base_model == ("demo/base" if loaded.has_base else None)
    models = ["demo/math", "demo/code", "demo/chat"]
    count = loaded.method.num_models or 3
    assert [m.model for m in loaded.models] == models[: 2 if loaded.slices else count]
    assert loaded.output_dtype == "BF16"
    for part in [part.config for part in loaded.slices] or [loaded]:
        part.settings_for(TENSOR, 0.3)
    assert config_from_mapping(loaded.normalized()) == loaded


def test_there_are_examples() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*METHODS, "lora", "adapter_out"}
    assert load_config(CONFIGS / "adapter_out.yaml").output == OutputForm(64)
    assert load_config(CONFIGS / "lora.yaml").models[0].model == "org/model+org/adapter"


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("method", "drop", "elect", "rescale", "normalize"),
    [
        ("della", "magprune", True, "inverse", True),
        ("della_linear", "magprune", False, "inverse", False),
        ("dare_ties", "random", True, "inverse", False),
        ("dare_linear", "random", False, "inverse", False),
        ("ties", "magnitude", True, "none", True),
        ("breadcrumbs", "outliers", False, "none", False),
        ("breadcrumbs_ties", "outliers", True, "none", False),
        ("task_arithmetic", "none", False, "none", False),
        ("linear", "none", False, "none", True),
        ("passthrough", "none", False, "none", False),
        ("wudi", "magprune", False, "inverse", True),
        ("iso_c", "magprune", False, "inverse", True),
        ("tsv", "magprune", False, "inverse", True),
    ],
)
def test_methods(method: str, drop: str, elect: bool, rescale: str, normalize: bool) -> None:
    takes = METHODS[method]
    models = [{"model": f"e{m}"} for m in range(takes.num_models or 2)]
    made = settings(method, models=models, parameters={"density": 0.5, takes.weighted_by: 0.25})
    keeps_all = drop == "none"
    assert made == MergeSettings(
        drop=drop,  # type: ignore[arg-type]
        elect=elect,
        rescale=rescale,  # type: ignore[arg-type]
        normalize=normalize,
        lambda_=0.8 if method == "wudi" else 1.0,
        balance=None if takes.balance is None else Balance(takes.balance),
        granularity="row",
        on_nonfinite="error",
        seed=0,
        weights=(0.25,) * len(models),
        densities=(1.0 if keeps_all else 0.5,) * len(models),
        epsilons=(0.15 if drop == "magprune" else 0.0,) * len(models),
        gammas=(0.01 if drop == "outliers" else 0.0,) * len(models),
    )


def test_outliers_that_are_dropped() -> None:
    """Each expert has its own gamma; what is not given leaves the density as it is."""
    models = [
        {"model": "a", "parameters": {"gamma": [0.0, 0.2], "density": 0.5}},
        {
            "model": "b",
            "parameters": {"density": [{"filter": "mlp", "value": 0.995}, {"value": 1}]},
        },
        {"model": "c", "parameters": {"gamma": 0.3, "density": 0}},
    ]
    made = config("breadcrumbs", models=models)
    found = made.settings_for("model.layers.1.mlp.up_proj.weight", 0.5)
    assert found.gammas == (0.1, 1 - 0.995, 0.0)
    assert (found.densities, found.weights) == ((0.5, 0.995, 1.0), (1.0, 1.0, 0.0))
    assert made.settings_for("model.norm.weight", 1.0).gammas == (0.2, 0.0, 0.0)
    assert made.notes()[-1] == "density of c is 0: nothing of the delta is kept there."
    everything = config("breadcrumbs_ties", parameters={"gamma": 0.3}).notes()
    assert "gamma of e0, e1 has no effect where density is 1: everything is kept, unscaled." in (
        everything
    )


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"gamma": 1}, "`parameters.gamma` must be at least 0 and below 1, not 1"),
        ({"gamma": -0.1}, "must be at least 0 and below 1, not -0.1"),
        ({"gamma": True}, "must be a number, not true"),
        ({"density": 0.9, "gamma": 0.2}, "for e0 is more than all of a delta: gamma must be at "
                                         "most 0.1 at this density"),
        ({"density": [0.2, 0.9], "gamma": 0.2}, "density 0.9 with gamma 0.2 for e0"),
    ],
)  # fmt: skip
def test_outliers_are_refused(parameters: dict[str, Any], part: str) -> None:
    assert part in refused(mapping("breadcrumbs", parameters=parameters))
    assert settings("breadcrumbs", parameters={"density": 0.8, "gamma": 0.2}).gammas == (0.2,) * 2


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"ridge": 0}, "`parameters.ridge` must be at least 1e-06"),
        ({"ridge": -1}, "`parameters.ridge` must be at least 1e-06"),
        ({"side": "inn"}, "must be auto or in or out, not 'inn'; did you mean `in`?"),
        ({"weight": -0.5}, "the weights (-0.5, -0.5) must be at least 0"),
        ({"density": 0}, "a density of 0 drops an expert altogether"),
    ],
)
def test_what_matrices_are_not_merged_by(parameters: dict[str, Any], part: str) -> None:
    assert part in refused(mapping(merge_method="wudi", parameters=parameters))
    assert "does not go with wudi" in refused(mapping(merge_method="wudi", output={"adapter": 4}))


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.is_decomposed])
def test_what_singular_values_have_no_use_for(method: str) -> None:
    made = config(method, parameters={"ridge": 0.1, "side": "out", "weight": [-0.5, 1.0]})
    for name in ("ridge", "side"):
        assert f"{name}: accepted, has no effect with {method}." in made.notes()
    found = made.settings_for(TENSOR, 0.0)
    assert found.weights == (-0.5, -0.5)
    assert found.balance == Balance(METHODS[method].balance or "wudi")
    assert "does not go with" in refused(mapping(merge_method=method, output={"adapter": 4}))
    assert "drops an expert" in refused(mapping(merge_method=method, parameters={"density": 0}))


def test_every_method_is_tested() -> None:
    assert len(METHODS) == 23


def test_nearswap_and_arcee_fusion_have_no_weights() -> None:
    given: dict[str, Any] = {"experts": 1, "parameters": {"weight": 0.3, "t": [0.5, 0]}}
    made = config("nearswap", **given)
    assert (made.settings_for(TENSOR, 0.5).limit, made.settings_for(TENSOR, 0.5).weights) == (
        0.25,
        (1.0,),
    )
    assert (made.settings_for(TENSOR, 1.0).limit, made.settings_for(TENSOR, 1.0).weights) == (
        None,
        (0.0,),
    )
    assert "weight: accepted, has no effect with nearswap." in made.notes()
    fused = config("arcee_fusion", **given)
    assert fused.settings_for(TENSOR, 0.5) == MergeSettings(
        weights=(1.0,), drop="importance", elect=False, rescale="none", normalize=False
    )
    assert "t: accepted, has no effect with arcee_fusion." in fused.notes()


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({}, "`parameters.t` has no value here: it says how far"),
        ({"t": -0.1}, "`parameters.t` must be at least 0, not -0.1: it is how far an element goes"),
        ({"t": "far"}, "`parameters.t` must be a number, not 'far'"),
    ],
)
def test_nearswap_is_refused(parameters: dict[str, Any], part: str) -> None:
    assert part in refused(mapping("nearswap", experts=1, parameters=parameters))
    assert settings("nearswap", experts=1, parameters={"t": 2000}).limit == 2000  # not slerp's


def test_sce_selects_and_weighs_by_itself() -> None:
    given = {"select_topk": [{"filter": "mlp", "value": [0.5, 0]}, {"value": 1}], "weight": 0.3}
    made = config("sce", parameters=given)
    common: dict[str, Any] = {"drop": "variance", "rescale": "none"}
    mlp = "model.layers.1.mlp.up_proj.weight"
    for name, t, density, weight in ((mlp, 0.5, 0.25, 1.0), (mlp, 1, 1.0, 0.0), ("x", 1, 1.0, 1.0)):
        assert made.settings_for(name, t) == MergeSettings(
            weights=(weight,) * 2, densities=(density,) * 2, by_energy=weight == 1, **common
        )
    assert "weight: accepted, has no effect with sce." in made.notes()
    assert any(note.startswith("sce: weights are those of the squares") for note in made.notes())


def test_ram_has_an_epsilon_of_its_own() -> None:
    common: dict[str, Any] = {
        "drop": "threshold",
        "elect": False,
        "normalize": False,
        "rescale": "none",
        "weights": (1.0, 1.0),
    }
    assert settings("ram") == MergeSettings(least=1e-5, overlap=Overlap(), **common)
    assert settings("ram", parameters={"epsilon": 3}).least == 3  # della's is below 0.5
    assert settings("ramplus_tl", parameters={"r": 0.5, "epsilon": 0}) == MergeSettings(
        least=0.0, overlap=Overlap(0.5, 0.2), **common
    )
    assert "r: accepted, has no effect with ram." in config("ram", parameters={"r": 1}).notes()
    models = [{"model": "a", "parameters": {"epsilon": 1e-5}}, {"model": "b"}]
    assert "`models[0].parameters.epsilon` holds for all experts alike" in refused(
        mapping("ram", models=models)
    )


@pytest.mark.parametrize(
    ("method", "parameters", "part"),
    [
        ("sce", {"select_topk": 1.5}, "must be from 0 to 1, not 1.5: it is the fraction of the"),
        ("sce", {"select_topk": -0.1}, "must be from 0 to 1, not -0.1"),
        ("ram", {"epsilon": -1e-5}, "`parameters.epsilon` must be at least 0, not -1e-05"),
        ("ram", {"window_size": 0.1}, "`parameters.window_size` belongs to another meaning"),
        ("ramplus_tl", {"r": -1}, "`parameters.r` must be at least 0, not -1"),
        ("ramplus_tl", {"alpha": "x"}, "`parameters.alpha` must be a number, not 'x'"),
    ],
)
def test_sce_and_ram_are_refused(method: str, parameters: dict[str, Any], part: str) -> None:
    assert part in refused(mapping(method, parameters=parameters))


# ---------------------------------------------------------------- weights that follow from angles


def test_slerp_goes_from_its_base() -> None:
    """Listed or not, and wherever: t = 0 is the base."""
    for models in (["b", "a"], ["a", "b"], ["b"]):
        made = config("slerp", models=[{"model": m} for m in models], base_model="a",
                      parameters={"t": 0.25})  # fmt: skip
        assert [m.model for m in made.models] == ["a", "b"]
        assert made.base_model is None  # nothing is subtracted; the first one has the files
        assert not made.has_base
        assert made.normalized()["base_model"] == "a"
        assert config_from_mapping(made.normalized()) == made
        found = made.settings_for(TENSOR, 0)
        assert found.weights == (0.75, 0.25)
        assert found.angles == Angles(rule="slerp")
        assert made.notes() == ()


def test_slerp_has_gradients_and_filters() -> None:
    written = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    made = config("slerp", experts=1, parameters={"t": written})
    assert made.settings_for(TENSOR, 0.75).weights == (0.25, 0.75)
    assert made.settings_for("model.norm.weight", 0.75).weights == (0.5, 0.5)
    slices = [
        {"sources": [{"model": m, "layer_range": [i, i + 4]} for m in names],
         "parameters": {"t": i / 10}}
        for i, names in ((0, ("base", "e")), (4, ("e", "base")))
    ]  # fmt: skip
    made = config_from_mapping({"merge_method": "slerp", "base_model": "base", "slices": slices})
    for part, t in zip(made.slices, (0.0, 0.4), strict=True):
        assert [m.model for m in part.config.models] == ["base", "e"]
        assert part.config.settings_for("x", 0).weights == (1 - t, t)
    assert config_from_mapping(made.normalized()) == made


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({}, ["`parameters.t` has no value here", "Write `t: 0.5`"]),
        ({"parameters": {"t": [{"filter": "mlp", "value": 0.5}]}}, ["end its list of conditions"]),
        ({"parameters": {"t": "half"}}, ["parameters.t", "must be a number"]),
        ({"parameters": {"t": 1001}}, ["parameters.t", "from -1000 to 1000"]),
        ({"base_model": None}, ["base_model", "slerp goes from it"]),
        ({"experts": 2}, ["`models` with the base, has 3; slerp takes 2"]),
        ({"models": [{"model": "base"}]}, ["with the base, has 1; slerp takes 2"]),
        (
            {"models": [{"model": "e0", "parameters": {"t": 0.5}}]},
            ["models[0].parameters.t", "write it as `parameters.t`"],
        ),
    ],
)
def test_slerp_is_refused(keys: dict[str, Any], parts: list[str]) -> None:
    whole = mapping("slerp", **{"experts": 1, **keys})
    if "parameters" not in keys and keys:
        whole["parameters"] = {"t": 0.5}
    message = refused(whole)
    assert all(part in message for part in parts), message


def test_slices_of_slerp_have_the_base_and_one_other() -> None:
    for names, part in (
        (("e", "f"), "lack the base"),
        (("base",), "1 models; the method takes 2"),
        (("base", "base"), "list the base twice"),
    ):
        sources = [{"model": m, "layer_range": [i, i + 4]} for i, m in enumerate(names)]
        message = refused(
            {"merge_method": "slerp", "base_model": "base", "slices": [{"sources": sources}],
             "parameters": {"t": 0.5}}
        )  # fmt: skip
        assert part in message, message


def test_nuslerp_goes_by_the_proportion_of_its_weights() -> None:
    for weights, t in (((1.0, 3.0), 0.75), ((0.2, 0.2), 0.5), ((1e-7, 3e-7), 0.75)):
        models = [{"model": f"e{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)]
        made = settings("nuslerp", models=models)
        assert list(made.weights) == pytest.approx([1 - t, t])
        assert made.angles == Angles(rule="nuslerp")
    for weights in ((1.0, -1.0), (0, 0)):
        models = [{"model": f"e{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)]
        with pytest.raises(ConfigError, match="sum to zero, and the way from one model to the"):
            settings("nuslerp", models=models)
    rows = settings("nuslerp", parameters={"nuslerp_flatten": False})
    assert rows.angles == Angles(rule="nuslerp", by_row=True)
    assert settings("nuslerp", parameters={"nuslerp_row_wise": True}).angles == made.angles


def test_multislerp_averages_by_its_weights() -> None:
    models = [{"model": f"e{i}", "parameters": {"weight": w}} for i, w in enumerate((1, 2, 5))]
    made = settings("multislerp", models=models, parameters={"eps": 1e-3})
    assert list(made.weights) == [0.125, 0.25, 0.625]
    assert made.angles == Angles(rule="multislerp", eps=1e-3)
    as_they_are = settings("multislerp", models=models, parameters={"normalize_weights": False})
    assert list(as_they_are.weights) == [1, 2, 5]
    alone = settings("multislerp", experts=1, parameters={"weight": 0.3})
    assert list(alone.weights) == [1]


def test_karcher_and_model_stock_have_no_weights() -> None:
    parameters = {"weight": 0.3, "max_iter": 7, "tol": 1e-3, "filter_wise": True}
    made = config("karcher", experts=3, base_model="e0", parameters=parameters)
    found = made.settings_for(TENSOR, 0)
    assert [*found.weights, found.lambda_] == [1, 1, 1, 1]
    assert found.angles == Angles(rule="karcher", max_iter=7, tol=1e-3)
    assert "weight: accepted, has no effect with karcher." in made.notes()
    assert "filter_wise: accepted, has no effect with karcher." in made.notes()
    found = settings("model_stock", experts=3, parameters=parameters)
    assert list(found.weights) == [1, 1, 1]
    assert found.angles == Angles(rule="model_stock", by_row=True)


def test_where_the_base_of_angles_stands() -> None:
    """Deltas to it are merged where it is given; to `karcher` it is one of the models."""
    for method in ("nuslerp", "multislerp"):
        for base in (None, "base"):
            made = config(method, base_model=base)
            assert (made.base_model, made.has_base) == (base, base is not None)
            assert [m.model for m in made.models] == ["e0", "e1"]
            assert config_from_mapping(made.normalized()) == made
    made = config("karcher", base_model="base")
    assert [m.model for m in made.models] == ["e0", "e1", "base"]
    assert not made.has_base
    assert made.base_model == "base"  # whose files the output has
    assert made.notes() == ("base_model: base is one of the models, as in mergekit.",)
    assert config_from_mapping(made.normalized()) == made
    listed = config("karcher", base_model="e1")
    assert [m.model for m in listed.models] == ["e0", "e1"]
    assert listed.notes() == ()


@pytest.mark.parametrize(
    ("method", "keys", "parts"),
    [
        ("nuslerp", {"experts": 3}, ["`models` lists 3; nuslerp takes 2"]),
        ("nuslerp", {"experts": 1}, ["`models` lists 1; nuslerp takes 2"]),
        ("model_stock", {"experts": 1}, ["`models` lists 1; model_stock takes at least 2"]),
        ("model_stock", {"base_model": None}, ["base_model", "deltas to a base"]),
        (
            "nuslerp",
            {"parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
            ["parameters.nuslerp_row_wise", "every column", "Leave it out"],
        ),
        ("nuslerp", {"parameters": {"nuslerp_flatten": 2}}, ["must be true or false"]),
        (
            "nuslerp",
            {
                "models": [
                    {"model": "e0", "parameters": {"weight": 1}},
                    {"model": "e1", "parameters": {"weight": -0.9999}},
                ]
            },
            ["the weights lead -9999 times", "at most 1000"],
        ),
        (
            "multislerp",
            {
                "models": [
                    {"model": "e0", "parameters": {"weight": 1}},
                    {"model": "e1", "parameters": {"weight": -1}},
                ]
            },
            ["the weights (1, -1) sum to zero", "set `normalize_weights: false`"],
        ),
        ("multislerp", {"parameters": {"eps": 0}}, ["parameters.eps", "above 0 and at most 1"]),
        ("karcher", {"parameters": {"tol": 2}}, ["parameters.tol", "above 0 and at most 1"]),
        ("karcher", {"parameters": {"max_iter": 0}}, ["max_iter", "from 1 to 10000, not 0"]),
        ("karcher", {"parameters": {"max_iter": 1.5}}, ["a whole number"]),
        ("karcher", {"parameters": {"max_iter": True}}, ["a whole number"]),
        ("karcher", {"parameters": {"iter": 3}}, ["parameters.iter", "no known key"]),
    ],
)
def test_weights_of_angles_are_refused(method: str, keys: dict[str, Any], parts: list[str]) -> None:
    message = refused(mapping(method, **keys))
    assert all(part in message for part in parts), message


def test_our_keys() -> None:
    made = settings(
        granularity="tensor", on_nonfinite="zero", seed=2**64 - 1, rescale="l1", t=0.0,
        parameters={"lambda": 0.5, "normalize": False},
    )  # fmt: skip
    assert (made.granularity, made.on_nonfinite, made.seed) == ("tensor", "zero", 2**64 - 1)
    assert (made.rescale, made.lambda_, made.normalize) == ("l1", 0.5, False)
    assert config(extra_tensors="ignore").extra_tensors == "ignore"


@pytest.mark.parametrize(
    ("method", "written", "meant"),
    [
        ("della", True, "inverse"),
        ("della", False, "none"),
        ("della", "none", "none"),
        ("della", "l1", "l1"),
        ("dare_ties", "true", "inverse"),
        ("ties", True, "l1"),
        ("ties", False, "none"),
        ("ties", "l1", "l1"),
        ("task_arithmetic", True, "none"),
        ("linear", False, "none"),
    ],
)
def test_rescale(method: str, written: object, meant: str) -> None:
    assert settings(method, rescale=written).rescale == meant
    assert settings(method, parameters={"rescale": written}).rescale == meant


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "linear"])
def test_inverse_needs_a_keep_probability(method: str) -> None:
    assert "no keep probability" in refused(mapping(method, rescale="inverse"))
    assert "parameters.rescale" in refused(mapping(method, parameters={"rescale": "inverse"}))


def test_unknown_methods() -> None:
    assert "did you mean `della_linear`" in refused(mapping("dela_linear"))
    message = refused(mapping("core_space"))
    assert all(name in message for name in METHODS)


# ---------------------------------------------------------------- density and epsilon


@pytest.mark.parametrize(
    ("parameters", "density", "epsilon"),
    [
        ({"density": 0.3, "epsilon": 0.1}, 0.3, 0.1),
        ({"drop_rate": 0.7, "window_size": 0.2}, 0.3, 0.1),
        ({"density": 0.3}, 0.3, 0.15),
        ({"density": 0.2}, 0.2, 0.1),
        ({"density": 0.875}, 0.875, 0.125),
        ({"density": 0.7, "epsilon": 0.3}, 0.7, 0.3),
        ({"drop_rate": 0.3, "epsilon": 0.3}, 0.7, 0.3),
        ({"density": 0.9, "epsilon": 0.1}, 0.9, 0.1),
        ({"density": 1}, 1.0, 0.0),
        ({"density": 1.0, "epsilon": 0}, 1.0, 0.0),
        ({"drop_rate": 0}, 1.0, 0.0),
        ({}, 1.0, 0.0),
        ({"epsilon": 0.1}, 1.0, 0.0),
        ({"density": "5e-1", "epsilon": "1e-3"}, 0.5, 0.001),
    ],
)
def test_keep_probabilities(parameters: dict[str, object], density: float, epsilon: float) -> None:
    made = settings(parameters=parameters)
    assert made.densities == (density, density)
    assert made.epsilons == pytest.approx((epsilon, epsilon), abs=1e-12)
    assert made.densities[0] + made.epsilons[0] <= 1
    assert made.densities[0] - made.epsilons[0] > 0


def test_drop_rate_and_density_are_the_same_number() -> None:
    for percent in range(1, 100):
        a = config(parameters={"density": float(f"0.{percent:02d}")})
        b = config(parameters={"drop_rate": float(f"0.{100 - percent:02d}")})
        assert a == b, percent


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"density": 1.01}, ["parameters.density", "from 0 to 1", "not 1.01"]),
        ({"density": -0.5}, ["from 0 to 1", "not -0.5"]),
        ({"drop_rate": 1.1}, ["parameters.drop_rate", "from 0 to 1", "not 1.1"]),
        ({"drop_rate": -0.1}, ["from 0 to 1", "not -0.1"]),
        ({"epsilon": -0.1}, ["parameters.epsilon", "at least 0"]),
        ({"epsilon": 0.5}, ["below 0.5"]),
        ({"window_size": 1}, ["parameters.window_size", "below 1"]),
        ({"density": 0.9, "epsilon": 0.2}, ["0.7 to 1.1", "at most 0.1", "e0"]),
        ({"density": 0.2, "epsilon": 0.2}, ["below 0.2"]),
        ({"drop_rate": 0.7, "epsilon": 0.3}, ["below 0.3"]),
        ({"density": [0.3, 0.9, 0.3], "epsilon": 0.2}, ["density 0.9"]),
        ({"density": [0.5, 0.9], "epsilon": [0.1, 0.4, 0.1]}, ["density 0.7 with epsilon 0.4"]),
        ({"density": [{"filter": "x", "value": [0.3, -1]}]}, ["parameters.density[0].value[1]"]),
        (
            {"density": 0.5, "drop_rate": 0.5},
            ["is given twice: `density` and `drop_rate` (= 1 - density)"],
        ),
        ({"epsilon": 0.1, "window_size": 0.2}, ["is given twice: `epsilon` and `window_size`"]),
    ],
)
def test_bounds(parameters: dict[str, object], parts: list[str]) -> None:
    message = refused(mapping(parameters=parameters))
    assert all(part in message for part in parts), message


def test_density_1_keeps_everything_whatever_epsilon_is() -> None:
    made = config(parameters={"density": 1, "epsilon": 0.4})
    assert made.settings_for(TENSOR, 0).densities == (1, 1)
    assert made.settings_for(TENSOR, 0).epsilons == (0, 0)
    assert any("has no effect where density is 1" in note for note in made.notes())
    assert not any("density is 1" in n for n in config(parameters={"density": 1}).notes())


@pytest.mark.parametrize("written", [{"density": 0}, {"drop_rate": 1}, {"density": 1e-9}])
@pytest.mark.parametrize("method", ["della", "della_linear", "dare_ties", "dare_linear", "ties"])
def test_density_0_keeps_nothing(method: str, written: dict[str, object]) -> None:
    """As if the expert had no delta; an average is divided by its weight all the same."""
    for normalize in (False, True):
        whole = mapping(method, experts=3, parameters={"normalize": normalize, "density": 0.5})
        for i, model in enumerate(whole["models"]):
            model["parameters"] = {"weight": (0.5, 1.0, 2.5)[i]}
        whole["models"][1]["parameters"] |= written
        made = config_from_mapping(whole)
        found = made.settings_for(TENSOR, 0)
        assert list(found.densities) == [0.5, 1, 0.5]
        divides = normalize and method.endswith("_linear")
        assert list(found.weights) == ([0.125, 0, 0.625] if divides else [0.5, 0, 2.5])
        assert found.normalize == (normalize and not divides)
        assert any("density of e1 is 0" in note for note in made.notes())


def test_bounds_of_filters_are_checked_at_the_tensor() -> None:
    made = config(
        parameters={
            "density": [{"filter": "mlp", "value": 0.9}, {"value": 0.5}],
            "epsilon": [{"filter": "up_proj", "value": 0.3}, {"value": 0.1}],
        }
    )
    made.settings_for("model.layers.0.mlp.down_proj.weight", 0)
    with pytest.raises(ConfigError, match=r"tensor a\.mlp\.up_proj: .*at most 0\.1"):
        made.settings_for("a.mlp.up_proj", 0)


def test_epsilon_only_matters_to_magprune() -> None:
    made = config("dare_ties", parameters={"density": 0.9, "epsilon": 0.4})
    assert made.settings_for(TENSOR, 0).epsilons == (0.0, 0.0)
    assert "epsilon: accepted, has no effect with dare_ties." in made.notes()


def test_default_epsilon_always_fits() -> None:
    for density in (2.0**-24, 1e-6, 0.1, 0.3, 0.5, 0.85, 0.9999999999999999, 1.0):
        epsilon = default_epsilon(density)
        assert density - epsilon > 0
        assert density + epsilon <= 1


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "della_linear"])
def test_weights_that_sum_to_zero(method: str) -> None:
    whole = mapping(method, parameters={"normalize": True})
    whole["models"] = [
        {"model": "x", "parameters": {"weight": 0.1}},
        {"model": "y", "parameters": {"weight": -0.1}},
    ]
    assert "(0.1, -0.1) sum to zero" in refused(whole)
    whole["parameters"] = {"normalize": False}
    made = config_from_mapping(whole).settings_for(TENSOR, 0)
    assert made.weights == (0.1, -0.1)


def test_weights_that_cross_zero_in_a_gradient() -> None:
    whole = mapping("linear")
    whole["models"][1]["parameters"] = {"weight": [-2, 1]}
    made = config_from_mapping(whole)
    made.settings_for("a", 0.5)
    with pytest.raises(ConfigError, match="tensor a: the weights"):
        made.settings_for("a", 1 / 3)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, "nan", "1_0", "x", None, 1e39, {}])
def test_weights_are_finite_numbers(value: object) -> None:
    assert "parameters.weight" in refused(mapping(parameters={"weight": value}))


# ---------------------------------------------------------------- settings that vary


def test_gradients() -> None:
    made = config(parameters={"weight": [0, 1, 0.5]})
    found = [made.settings_for("a", t).weights[0] for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found == [0, 0.5, 1, 0.75, 0.5]


def test_switches_are_chosen_not_interpolated() -> None:
    made = config(parameters={"normalize": [True, False, True], "rescale": ["l1", "none"]})
    assert [made.settings_for("a", t).normalize for t in (0, 0.4, 0.5, 0.9, 1)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert [made.settings_for("a", t).rescale for t in (0, 0.9, 1)] == ["l1", "l1", "none"]


def test_first_matching_filter_holds() -> None:
    made = config(
        parameters={
            "weight": [
                {"filter": "mlp", "value": [1, 2]},
                {"filter": "layers.3.", "value": 5},
                {"filter": "*", "value": 7},
                {"value": 9},
            ]
        }
    )
    assert made.settings_for(TENSOR, 0.5).weights[0] == 1.5
    assert made.settings_for("model.layers.3.self_attn.q", 0.5).weights[0] == 5
    assert made.settings_for("model.norm", 1).weights[0] == 7


def test_filter_behind_what_matches_everything() -> None:
    with pytest.raises(ConfigError, match=r"weight\[2\]\.filter` is 'norm', and has no effect"):
        config(
            parameters={
                "weight": [
                    {"filter": "mlp", "value": 1},
                    {"value": 7},
                    {"filter": "norm", "value": 9},
                ]
            }
        )


def test_single_condition_without_a_list() -> None:
    made = config(parameters={"weight": {"filter": "mlp", "value": 0.5}})
    assert made.settings_for(TENSOR, 0).weights == (0.5, 0.5)
    assert made.settings_for("norm", 0).weights == (1.0, 1.0)


def test_precedence() -> None:
    whole = mapping(
        parameters={"weight": [{"filter": "norm", "value": 3}, {"filter": "mlp", "value": 4}]}
    )
    whole["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 2}]}
    made = config_from_mapping(whole)
    assert made.settings_for("mlp", 0).weights == (2, 4)  # the expert's own before the common one
    assert made.settings_for("norm", 0).weights == (3, 3)  # the common one where nothing matches
    assert made.settings_for("embed", 0).weights == (1, 1)  # the default last


def test_own_spelling_wins_over_common_spelling() -> None:
    whole = mapping(parameters={"density": 0.5, "epsilon": 0.1})
    whole["models"][0]["parameters"] = {"drop_rate": 0.9, "window_size": 0.1}
    made = config_from_mapping(whole).settings_for("a", 0)
    assert made.densities == (0.1, 0.5)
    assert made.epsilons == (0.05, 0.1)


def test_t_is_a_fraction() -> None:
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="t must be"):
            config().settings_for("a", t)


def test_settings_for_many_tensors_is_fast() -> None:
    whole = mapping(
        experts=8,
        parameters={
            "weight": [{"filter": f"proj_{i}", "value": [0.1, i]} for i in range(8)],
            "density": [0.3, 0.6],
        },
    )
    made = config_from_mapping(whole)
    names = [f"model.layers.{i % 64}.experts.{i}.proj_{i % 8}" for i in range(100_000)]
    started_s = time.process_time()
    fractions = layer_fraction(names)
    for name in names:
        made.settings_for(name, fractions[name])
    assert time.process_time() - started_s < 10  # 0.25 s where all is well


# ---------------------------------------------------------------- models and locations


def test_base_among_the_models_is_left_out() -> None:
    whole = mapping()
    whole["models"].insert(0, {"model": "./base/", "parameters": None})
    whole["models"].insert(2, {"model": "sub/../base", "parameters": {}})
    assert config_from_mapping(whole) == config()
    whole["models"][0]["parameters"] = {"weight": 1, "density": 0.2}
    assert config_from_mapping(whole) == config()
    assert sum("counts for nothing" in note for note in config_from_mapping(whole).notes()) == 1
    assert not any("counts for nothing" in note for note in config().notes())


def test_same_expert_twice() -> None:
    whole = mapping()
    whole["models"].append({"model": str(Path.cwd() / "e0")})
    assert "the same checkpoint as `models[0].model`" in refused(whole)


def test_only_the_base() -> None:
    assert "no expert" in refused(mapping(models=[{"model": "base"}]))
    assert "no expert" in refused(mapping(models=[]))


def test_base_is_needed() -> None:
    assert "`base_model` is missing" in refused(mapping(base_model=None))


def test_linear_and_a_base() -> None:
    made = config("linear", base_model="e0")
    assert made.base_model is None
    assert not made.has_base
    assert config("linear", base_model="e1").base_model == "e1"
    assert "not averaged itself" not in config("linear", base_model="e1").notes()[0]
    other = config("linear", base_model="other")
    assert other.base_model == "other"
    assert "those of other, which is not averaged itself" in other.notes()[0]
    assert config_from_mapping(other.normalized()) == other


def test_name() -> None:
    assert config(name="mine") == config()
    assert "name: accepted, has no effect with della." in config(name="mine").notes()
    assert "`name` must be a word, not 3" in refused(mapping(name=3))


@pytest.mark.parametrize(
    ("location", "part"),
    [
        ("s3://AKIA:secret@bucket/model", "Credentials belong"),
        ("https://host/model?token=secret", "with a query"),
        ("s3://AKIA:sec/ret@bucket/model", "Credentials belong"),
        ("s3:///model", "without a bucket"),
        ("s3://bucket/../model", "cannot go up"),
        ("s3:/bucket/model", "Write s3://bucket/model"),
        ("file://host/model", "Write file:///"),
        ("", "path of a checkpoint"),
        (" ", "path of a checkpoint"),
        ("a\nb", "path of a checkpoint"),
        (3, "path of a checkpoint"),
        (["x"], "path of a checkpoint"),
        ("~no-such-user-here/x", "home directory"),
    ],
)
def test_locations(location: object, part: str) -> None:
    assert part in refused(mapping(models=[{"model": location}]))
    assert part in refused(mapping(base_model=location))


def test_paths_of_pathlib() -> None:
    path = Path("models") / "e0"
    parsed = config(base_model=path.parent, models=[{"model": path}])
    assert (parsed.base_model, parsed.models[0].model) == ("models", "models/e0")
    assert json.dumps(parsed.normalized())
    message = refused(mapping(base_model=Path("s3://bucket/base")))  # pathlib drops a slash
    assert "Write s3://bucket/base" in message


@pytest.mark.parametrize("value", [None, [], "merge_method: della", 3, b"x", {"a"}, [("a", 1)]])
def test_what_is_no_mapping(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^c.yaml: must be a mapping of keys to values"):
        config_from_mapping(value, "c.yaml")


@pytest.mark.parametrize("key", [1, None, ("a", "b"), Path("seed")])
def test_keys_that_are_no_text(key: object) -> None:
    assert "is no known key" in refused({**mapping(), key: 1})  # type: ignore[dict-item]
    assert "is no known key" in refused(mapping(parameters={key: 1}))


@pytest.mark.parametrize(
    "value",
    [
        "s3://KEY:SECRET@b\n",
        {"s3:/KEY:SECRET@b": "x"},
        ["s3;//KEY:SECRET@b"],
        "s3:KEY:SECRET@b+l",
        f"s3://KEY:SECRET{'x' * 100}@b",
    ],
)
def test_no_message_shows_credentials(value: object) -> None:
    for key in ("base_model", "models", "dtype", "seed", "parameters", "merge_method", "tokenizer"):
        assert "SECRET" not in refused({**mapping(), key: value})
    assert "SECRET" not in refused(mapping(models=[{"model": value}]))
    assert "SECRET" not in refused({**mapping(), str(value): 1})
    with pytest.raises(ConfigError) as caught:
        parse_config(f"a: {{'{value}': 1, '{value}': 2}}" if isinstance(value, str) else str(value))
    assert "SECRET" not in str(caught.value)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config(base_model="~/b").base_model == "/home/someone/b"
    assert config(base_model="org/name").base_model == "org/name"


# ---------------------------------------------------------------- dtype, tokenizer, seed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float16", "F16"),
        ("fp16", "F16"),
        ("bfloat16", "BF16"),
        ("bf16", "BF16"),
        ("torch.float32", "F32"),
        ("F64", "F64"),
        (None, None),
    ],
)
def test_dtype(name: str | None, expected: str | None) -> None:
    assert parse_dtype(name) == expected
    assert config(dtype=name).output_dtype == expected


def test_out_dtype_wins() -> None:
    assert config(dtype="float32", out_dtype="bfloat16").output_dtype == "BF16"
    assert "did you mean `bfloat16`" in refused(mapping(dtype="bloat16"))
    assert "`out_dtype`" in refused(mapping(out_dtype="int64"))


def test_tokenizer() -> None:
    plain = config()
    assert plain.tokenizer is None
    assert config(chat_template="auto") == plain
    union = config(tokenizer={})
    assert union == config(tokenizer={"source": None}) == config(tokenizer_source="union") != plain
    base = config(tokenizer_source="base")
    assert base == config(tokenizer={"source": "base"}) != plain
    assert config(tokenizer_source="base/") == base  # the base by its name
    assert config(tokenizer_source="union").tokenizer == TokenizerPolicy("union")
    own = config(tokenizer={"source": "./e1", "tokens": {}, "pad_to_multiple_of": None})
    assert own.tokenizer == TokenizerPolicy("e1")
    assert config_from_mapping(own.normalized()) == own == config(tokenizer_source="e1")
    moved = own.with_locations({"base": "b", "e0": "x", "e1": "y"})
    assert moved.tokenizer == TokenizerPolicy("y")
    assert "one of the models" in refused(mapping(tokenizer_source="org/model"))
    assert "must be a mapping" in refused(mapping(tokenizer="union"))
    assert "both given" in refused(mapping(tokenizer={"source": "base"}, tokenizer_source="base"))
    both = mapping(tokenizer_source="base", allow_different_tokenizers=True)
    assert "by position" in refused(both)


def test_tokens() -> None:
    e1 = {"model": {"path": "./e1"}}  # as mergekit writes it at length
    written = {
        "<zero>": {"source": {"kind": "zero"}},
        "<of>": {"source": e1, "force": True},
        "<as>": {"source": {"kind": "model_token", "model": e1, "token": "x"}},
        "<at>": {"source": {"kind": "model_token", "model": "base", "token_id": 0}},
    }
    policy = TokenizerPolicy(
        "union",  # where nothing is said, as in mergekit
        {
            "<zero>": TokenSource(None),
            "<of>": TokenSource("e1", force=True),
            "<as>": TokenSource("e1", "x"),
            "<at>": TokenSource("base", 0),
        },
        8,
    )
    own = config(tokenizer={"tokens": written, "pad_to_multiple_of": 8})
    assert own.tokenizer == policy
    assert config_from_mapping(own.normalized()) == own
    where = own.with_locations({"base": "b", "e0": "x", "e1": "y"}).tokenizer
    assert where is not None
    assert where.tokens["<as>"] == TokenSource("y", "x")


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"pad_to_multiple_of": 0}, "`tokenizer.pad_to_multiple_of` is 0"),
        ({"pad_to_multiple_of": True}, "whole number"),
        ({"tokens": ["<a>"]}, "`tokenizer.tokens` must be a mapping"),
        ({"tokens": {"a": 1}}, "`tokenizer.tokens.a` must be a mapping"),
        ({"tokens": {5: {"source": "e1"}}}, "in quotes"),
        ({"tokens": {"a": {}}}, "`tokenizer.tokens.a.source` is missing"),
        ({"tokens": {"a": {"source": "e1", "force": "so"}}}, "`tokenizer.tokens.a.force`"),
        ({"tokens": {"a": {"source": "e1", "forced": True}}}, "did you mean `force`"),
        ({"tokens": {"a": {"source": "e9"}}}, "one of the models that are merged"),
        ({"tokens": {"a": {"source": {"kind": "one"}}}}, "zero or model_token"),
        ({"tokens": {"a": {"source": {"kind": "zero", "model": "e1"}}}}, "no known key"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "token": "b"}}}}, "model` is missing"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "e1"}}}}, "either `token`"),
        ({"token": {}}, "did you mean `tokens`"),
    ],
)  # fmt: skip
def test_wrong_tokenizer_blocks(block: dict[str, Any], said: str) -> None:
    assert said in refused(mapping(tokenizer=block))


def test_chat_templates_that_are_none() -> None:
    for text in ("{% for m in messages %}", "{{ bos_token", "{% nothing %}{{ a }}"):
        said = refused(mapping(chat_template=text))
        assert "`chat_template` is a jinja template that cannot be read" in said
        assert "(line 1)" in said
    for text, what in (
        ("{{ messages | tojsn }}", "there is no filter 'tojsn' (line 1)"),
        ("{% if a %}{{ a | tojsn }}{% endif %}", "there is no filter 'tojsn'"),
        ("{% if a is strung %}{{ a }}{% endif %}", "there is no test 'strung' (line 1)"),
        ("{{ a | map('nope') | b }}", "there is no filter 'b' (line 1); there is no filter 'nope'"),
        ("{{ a | selectattr('x', 'odder') }}", "there is no test 'odder' (line 1)"),
        ("{% include 'x' %}", "there are no other templates to take in (line 1)"),
        ("{% generation %}{{ a }}", "Unexpected end of template."),
        ("{% for m in a %}{% generation %}{% endfor %}{% endgeneration %}", "Encountered unknown"),
        ("{% block a %}{% endblock %}{% block a %}{% endblock %}", "block 'a' defined twice"),
    ):
        assert f"cannot be read: {what}" in refused(mapping(chat_template=text))
    for text in (
        "{% if 'fromjson' is filter %}{{ a | fromjson }}{% endif %}",
        "{%+ generation %}{{ a }}{% endgeneration +%}",
    ):
        assert config(chat_template=text).chat_template == text
    known = "{{ a | tojson(indent=2) | trim }}{% if a is string and b is not none %}{% endif %}"
    assert config(chat_template=known).chat_template == known
    tags = (
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert config(chat_template=tags).chat_template == tags
    assert "`slices` lists none" in refused({"merge_method": "linear", "slices": []})


def test_chat_templates() -> None:
    plain = config()
    chatml = config(chat_template="chatml")
    assert "<|im_start|>" in str(chatml.chat_template)
    assert config_from_mapping(chatml.normalized()) == chatml != plain
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert config(chat_template=text).chat_template == text
    for wrong in ("chatlm", "", 3, ["chatml"]):
        assert "chatml, llama3, alpaca" in refused(mapping(chat_template=wrong))


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "1", None])
def test_seed(seed: object) -> None:
    assert "`seed` must be a whole number" in refused(mapping(seed=seed))


def test_seed_of_many_digits() -> None:
    assert "not a huge number" in refused(mapping(seed=10**5000))


def test_with_seed() -> None:
    assert config().with_seed(7) == config(seed=7)
    assert config().with_seed(7).settings_for("a", 0).seed == 7
    with pytest.raises(ConfigError, match="the seed must be"):
        config().with_seed(-1)


@pytest.mark.parametrize("key", ["granularity", "on_nonfinite", "extra_tensors", "rescale"])
def test_words(key: str) -> None:
    values: tuple[Any, ...] = ("x", 3, None, [], {})
    for value in values:
        assert f"`{key}` must be" in refused({**mapping(), key: value})


# ---------------------------------------------------------------- unknown keys

SLICES = [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"merge_methd": 1}, ["`merge_methd`", "`merge_method`"]),
        ({"densty": 1}, ["did you mean `parameters.density`"]),
        ({"density": 1}, ["write it as `parameters.density`"]),
        ({"parameters": {"lamda": 1}}, ["`parameters.lamda`", "`lambda`"]),
        ({"parameters": {"lambda_": 1}}, ["`parameters.lambda_`", "`lambda`"]),
        ({"parameters": {"seed": 1}}, ["write `seed` at the top level"]),
        ({"parameters": {"qqq": 1}}, ["known are alpha, density"]),
        ({"models": [{"modle": "x"}]}, ["`models[0].modle`", "`model`"]),
        ({"models": [{"model": "x", "weight": 1}]}, ["`models[0].weight`", "`parameters.weight`"]),
        (
            {"models": [{"model": "x", "parameters": {"wieght": 1}}]},
            ["`models[0].parameters.wieght`", "`weight`"],
        ),
        (
            {"models": [{"model": "x", "parameters": {"normalize": True}}]},
            ["`models[0].parameters.normalize` holds for all experts alike"],
        ),
        ({"modules": {}}, ["`modules` must be a mapping of the names of modules"]),
        ({"modules": ["encoder"]}, ["`modules` must be a mapping of the names of modules"]),
        ({"modules": {1: {}}}, ["`modules` names 1, which is no word"]),
        (
            {"modules": {"encoder": {"slices": []}, "decoder": {}}},
            ["2 problems", "`modules.decoder` gives neither", "`modules.encoder` gives neither"],
        ),
        (
            {"modules": {"x": {"slices": SLICES, "models": [{"model": "a"}]}}},
            ["`modules.x` gives both `slices` and `models`"],
        ),
        ({"modules": {"x": {"slices": SLICES}}}, ["`modules` and `models` are both given"]),
        ({"modules": {"text": {"slice": []}}}, ["`modules.text.slice` is no", "`slices`"]),
        (
            {"modules": {"text": {"slices": [{"source": []}]}}},
            ["`modules.text.slices[0].source` is no known key; did you mean `sources`"],
        ),
        ({"modules": {"text": {"dtype": "bf16"}}}, ["`modules.text.dtype`", "at the top level"]),
        ({"parameters": {"weight": [{"filtr": "x", "value": 1}]}}, ["weight[0]", "`filter`"]),
        ({"parameters": {"weight": [{"filter": "x"}]}}, ["has no `value`"]),
        ({"parameters": {"weight": [{"filter": 1, "value": 1}]}}, ["weight[0].filter"]),
        ({"parameters": {"weight": [{"value": 1}, 2]}}, ["weight[1]", "filter"]),
        ({"parameters": {"weight": [1, {"value": 1}]}}, ["weight[1]", "number"]),
        ({"parameters": {"weight": []}}, ["empty list"]),
        ({"parameters": {"weight": [0.5] * 5000}}, ["5000 points"]),
        ({"parameters": {"normalize": "maybe"}}, ["true or false"]),
        ({"parameters": 3}, ["`parameters` must be a mapping"]),
        ({"models": 3}, ["`models` must be a list"]),
        ({"models": ["x"]}, ["`models[0]` must be a mapping"]),
        ({"merge_method": 3}, ["`merge_method` must be a word"]),
        ({3: 4}, ["`3` is no known key"]),
        ({"a\nb" * 200: 4}, ["`a\\nb", "..."]),
    ],
)
def test_mistakes(change: dict[Any, Any], parts: list[str]) -> None:
    message = refused({**mapping(), **change})
    assert all(part in message for part in parts), message


def test_modules_mean_the_same_in_any_order_and_when_normalised() -> None:
    whole = {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    modules = {"visual": whole, "language_model": {"slices": SLICES}}
    made = config_from_mapping({"merge_method": "linear", "modules": modules})
    turned = dict(reversed(modules.items()))
    assert made == config_from_mapping({"merge_method": "linear", "modules": turned})
    plain = made.normalized()
    assert list(plain["modules"]) == ["text_decoder", "vision_tower"]
    assert config_from_mapping(plain) == made


def test_every_problem_is_said() -> None:
    """Up to ten, those first that others may follow from."""
    models = [{"model": f"e{i}", "parameters": {"weigth": 1}} for i in range(3)]
    message = refused({**mapping(models=models, seed=-1), "dype": "bfloat16", "int8_mask": True})
    assert message.count("\n") == 0
    assert "6 problems. (1) `models[0].parameters.weigth` is no known key" in message
    assert "`dype` is no known key; did you mean `dtype`?" in message
    assert "`int8_mask` is a parameter; write it as `parameters.int8_mask`" in message
    assert "(6) `seed` must be a whole number" in message
    other = {**mapping(seed=-1), "merge_method": "core_space"}
    assert "2 problems. (1) `merge_method` is 'core_space', which is not" in refused(other)
    many = {**mapping(), **{f"key{i}": 1 for i in range(30)}}
    assert "30 problems. (1) `key0`" in refused(many)
    assert refused(many).endswith("And 20 more.")
    assert refused(many).count("known are") == 1  # 400 characters, once


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"parameters": {"density": 2, "weight": [{"filter": 3, "value": "x"}, {"valu": 1}, 4]}},
            [
                "6 problems",
                "`parameters.density` must be from 0 to 1",
                "`parameters.weight[0].filter` must be text",
                "`parameters.weight[0].value` must be a number",
                "`parameters.weight[1].valu` is no known key; did you mean `value`?",
                "`parameters.weight[1]` has no `value`",
                "`parameters.weight[2]` is 4 in a list of conditions",
            ],
        ),
        (
            {"parameters": {"weight": [1, "x", "y"], "lamda": 1, "dropt": 2}},
            ["4 problems. (1) `parameters.lamda`", "weight[1]` must", "weight[2]` must"],
        ),
        (
            {"parameters": {"density": 0.9, "epsilon": 0.3}},
            ["2 problems", "for e0 gives", "for e1 gives"],
        ),
        (
            {"models": [{"model": m} for m in ("x", "x", "y", "y")], "base_model": None},
            ["3 problems", "`base_model` is missing", "`models[1].model`", "`models[3].model`"],
        ),
        (
            {
                "tokenizer": {
                    "source": "no",
                    "tokens": {"a": {"source": "p"}, "b": {"source": "q"}},
                },
                "allow_different_tokenizers": True,
            },
            ["4 problems", "merges rows by position", "'no'", "'p'", "'q'"],
        ),
        (
            {"tokenizer": {"sorce": 1, "tokens": {"a": 1, "b": {}}, "pad_to_multiple_of": 0}},
            ["4 problems", "`tokenizer.sorce`", ".tokens.a`", ".tokens.b.source`", "multiple_of`"],
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token"}, "force": 3}}}},
            ["3 problems", "source.model` is missing", "either `token` or", "force` must be true"],
        ),
        (
            {
                "base_model": {
                    "model": 3,
                    "rename": [{"from": "a"}, {"from": "", "to": "b"}],
                    "x": 1,
                }
            },
            ["4 problems", "`base_model.x`", "_model.model`", "rename[0].to`", "rename[1].from`"],
        ),
        (
            {"parameters": {"density": [{"value": 1}, {"filter": "a", "value": 1}] * 2}},
            ["2 problems", "density[1].filter`", "density[3].filter`"],
        ),
        (
            {"modules": {"x": {"slices": SLICES}}, "slices": SLICES},
            ["`modules`, `slices` and `models` are all given"],
        ),
        ({"models": ["a", "b/c"]}, ["2 problems", "write `- model: a`", "write `- model: b/c`"]),
        ({"models": [{"weight": 1}]}, ["`models[0].model` is missing", "`model: org/name`"]),
        (
            {"dtype": "bloat", "seed": -1, "parameters": {"density": 0.9, "epsilon": 0.3}},
            ["4 problems", "`dtype`", "`seed`", "for e0 gives", "for e1 gives"],
        ),
        ({"tokenizer_source": "unoin"}, ["did you mean `union`?"]),
        ({"tokenizer_source": "model:e1"}, ["did you mean `e1`?"]),
        ({"chat_template": "chatmal"}, ["did you mean `chatml`?"]),
        ({"granularity": "raw"}, ["must be row or tensor, not 'raw'; did you mean `row`?"]),
        ({"random_seed": 1}, ["and no key; write `seed`"]),
        (
            {"cuda": True, "out_shard_size": "2B", "lazy_unpickle": True},
            ["3 problems", "write --device cuda", "write --shard-size", "nothing need be written"],
        ),
    ],
)
def test_several_problems_of_one_place(keys: dict[str, Any], parts: list[str]) -> None:
    message = refused(mapping(**keys))
    assert all(part in message for part in parts), message


def test_models_in_mergekits_long_form() -> None:
    long: list[Any] = [
        {"model": {"path": "org/a", "revision": "v1"}},
        {"model": {"path": "b"}, "lora": {"path": "org/l"}},
        {"path": "c"},
        {"model": "d"},
    ]
    short = ["org/a@v1", "b+org/l", "c", "d"]
    made = config(models=[{"model": one} for one in long], slices=None, base_model={"path": "base"})
    assert made == config(models=[{"model": one} for one in short])
    assert config(models=[{"model": " e0 "}, {"model": "e1 "}]) == config()
    wrong = refused(mapping(models=[{"model": {"model": {"pth": "a"}}}, {"model": {"path": 3}}]))
    assert "must be the path of a checkpoint" in wrong
    assert "models[1].model" in wrong


def test_a_repository_is_one_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bases = ["user/base", "hf://user/base", "user/base@main", "hf://user/base@main"]
    slices = [{"base_model": base, **part} for base in bases for part in SLICES]
    assert config_from_mapping({"merge_method": "task_arithmetic", "slices": slices}).base_model
    (tmp_path / "user" / "base").mkdir(parents=True)  # which wins
    assert "one merge has one base" in refused({"merge_method": "ties", "slices": slices})


def test_keys_that_are_no_good_text() -> None:
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        config_from_mapping({**mapping(), "\ud800": 1})
    with pytest.raises(ConfigError, match="which must be text: a pattern of files"):
        config_from_mapping(mapping(node_labels={1: "disk=a"}))


def test_missing_keys() -> None:
    assert "`merge_method` is missing" in refused("models: [{model: x}]\n")
    assert "`models` is missing" in refused("merge_method: linear\n")


# ---------------------------------------------------------------- notes


def test_notes_of_a_plain_mergekit_file() -> None:
    notes = config(
        parameters={"density": 0.5, "weight": 0.3, "int8_mask": True, "rescale": True},
        dtype="bfloat16",
    ).notes()
    assert [note.partition(" ")[0] for note in notes] == [
        "epsilon", "rescale:", "int8_mask:",
    ]  # fmt: skip
    assert notes[0] == (
        "epsilon of e0, e1 is not given: 0.15, that is min(0.15, 1 - density, density / 2)."
    )
    assert "mergekit" in notes[1]
    assert notes[2] == "int8_mask: accepted, has no effect with della."


def test_no_notes_where_all_is_said() -> None:
    assert config(rescale="inverse", parameters={"density": 0.5, "epsilon": 0.1}).notes() == ()
    assert config("task_arithmetic", parameters={"rescale": False}).notes() == ()


def test_other_notes() -> None:
    whole = mapping(parameters={"density": [0.1, 1.0]}, rescale="inverse")
    notes = " ".join(config_from_mapping(whole).notes())
    assert "0 to 0.15" in notes
    assert "nothing is dropped" in " ".join(config("ties").notes())
    partly = {"density": [{"filter": "mlp", "value": 0.5}], "epsilon": 0.1}
    assert "no filter matches: 1, nothing" in " ".join(config(parameters=partly).notes())
    assert "most common" in " ".join(config(chat_template="auto").notes())
    assert "chat_template" not in " ".join(config(chat_template=None).notes())
    everything = "epsilon of e0, e1 has no effect where density is 1"
    for written in ({"epsilon": 0.1}, partly, {"density": 1, "epsilon": 0.1}):
        assert everything in " ".join(config(parameters=written).notes())
    assert everything not in " ".join(config(parameters={"density": 0.5, "epsilon": 0.1}).notes())
    without = config("linear", granularity="tensor", parameters={"lambda": 2}).notes()
    assert any(note.startswith("lambda: accepted") for note in without)
    assert any(note.startswith("granularity: accepted") for note in without)
    assert "l1" in " ".join(config("ties", rescale=True, parameters={"density": 0.5}).notes())


# ---------------------------------------------------------------- normalized, equality, pickling


def test_normalized_is_canonical() -> None:
    one = config(parameters={"density": 0.25, "epsilon": 0.1, "int8_mask": True}, rescale=True)
    whole = mapping(parameters={"rescale": "inverse", "normalize": 1, "lambda": "1e0"})
    for model in whole["models"]:
        model["parameters"] = {"drop_rate": 0.75, "window_size": 0.2, "weight": [1.0]}
    two = config_from_mapping(whole, "another.yaml")
    assert one == two
    assert json.dumps(one.normalized()) == json.dumps(two.normalized())
    assert one != one.with_seed(1)


def test_normalized_round_trip() -> None:
    made = config(
        "dare_linear",
        dtype="float32",
        seed=5,
        parameters={
            "weight": [{"filter": "mlp", "value": [0.1, 0.2]}],
            "density": {"filter": "*", "value": 0.4},
            "normalize": [{"filter": "norm", "value": True}],
            "rescale": ["l1", "inverse"],
        },
    )
    plain = made.normalized()
    again = config_from_mapping(json.loads(json.dumps(plain)))
    assert again == made
    assert again.normalized() == plain


def test_pickles() -> None:
    made = config(parameters={"density": [0.3, 0.5]})
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert again.settings_for("a", 0.5) == made.settings_for("a", 0.5)


def test_the_base_of_a_slice() -> None:
    """One merge has one base, wherever it is said."""

    def sliced(*bases: str, **keys: Any) -> dict[str, Any]:
        slices = [{**SLICES[0], "base_model": base} if base else SLICES[0] for base in bases]
        return {"merge_method": "ties", "slices": slices, **keys}

    plain = config_from_mapping(sliced("", base_model="base"), "c.yaml")
    assert config_from_mapping(sliced("base", base_model="base"), "c.yaml") == plain
    assert config_from_mapping(sliced("./base"), "c.yaml").base_model == "./base"
    for method in ("ties", "linear"):
        wrong = sliced("base", "other", base_model="base", merge_method=method)
        assert "`slices[1].base_model` is 'other', and elsewhere it is 'base'" in refused(wrong)
        wrong = sliced("base", "other", merge_method=method)
        assert "`slices[1].base_model` is 'other', and elsewhere it is 'base'" in refused(wrong)
        wrong = sliced("", "base", merge_method=method)
        assert "`slices[1].base_model` is not said of every slice" in refused(wrong)
    module = {"modules": {"text": {"slices": sliced("base")["slices"]}}, "merge_method": "ties"}
    assert config_from_mapping(module, "c.yaml") == plain
    linear = config_from_mapping(sliced("other", merge_method="linear"), "c.yaml")
    assert linear.base_model == "other"  # whose names and files it has


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("text", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("null", "is empty"),
        ("a: [1, 2", "line 2: not valid YAML"),
        ("a: 1\n  b: 2", "line 2: not valid YAML"),
        (
            "merge_method: ties\nmerge_method: della",
            "line 2: the key 'merge_method' is there twice",
        ),
        ("a: !!python/object/apply:os.system [x]", "line 1: the tag"),
        ("!!python/name:os.system", "tag"),
        ("a: !!float 1", "tag"),
        ("a: *x", "line 1: the alias *x stands for nothing"),
        ("a: &x [*x]", "line 1: the alias *x stands for nothing"),
        ("a: &x 1\n---\nb: *x", "line 3: the alias *x stands for nothing"),
        ("&x a: 1\n*x : 2", "a key must be a word"),
        ("a: &x 1\nb:\n  <<: *x", "`<<` takes over mappings, and 1 is none"),
        ("b: {<<: {c: 1}, <<: {d: 1}}", "the key '<<' is there twice"),
        ("a: &x " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 15 + "*x" + "]" * 15, "nested more than"),
        ("a: " + "[" * 40, "nested more than 32 deep"),
        # Above a thousand brackets in one line, a newer libyaml's own limit comes first.
        ("a: " + "[" * 50_000, "nest"),
        ("a: " + "{b: " * 5000, "nested more than 32 deep"),
        ("{[1]: 2}", "a key must be a word"),
        ("'': 1", "a key is empty"),
        ("a: 1\n---\nb: 2", "document 2: `name` is missing, and document 1 has none either"),
        ("a: \0", "not valid YAML"),
        ("a: " + "1" * 5000, "is not a number"),
        ("a: \ud800", "not valid Unicode"),
        ("a: " + "x" * (1 << 20), "more than 1 MiB"),
        ("a: 2001-99-99", "`a` is no known key"),
        ("<<: {a: 1}", "`a` is no known key"),
    ],
)
def test_hostile_yaml(text: str, part: str) -> None:
    started_s = time.process_time()
    assert part in refused(text)
    assert time.process_time() - started_s < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n\t- b", "Indent by spaces, not by tabs"),
        ("merge_method:linear\nmodels: [{model: a}]", "behind the colon of 'merge_method:linear'"),
        ("models:\n  - model: a\n    parameters:\n      weight:1\n      density: 1", "'weight:1'"),
        ("merge_method: linear\nmodels:\n  - model:a", "behind the colon of 'model:a'"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: 'weight:1'}]",
            "colon of 'weight:1'",
        ),
        ("models:\n  - model: a\n     parameters: {}", "Look at the indentation"),
        ("models:\n  - model: a\n  parameters: {}", "Look at the indentation"),
        ("a: 1\n b: 1", "Look at the indentation"),
        ('a: "b', "A quote is opened and not closed"),
        ("a: 'b", "A quote is opened and not closed"),
        ("x: 1\na: 'b\nc: 1\nd: 2\n", "line 2: not valid YAML"),  # where it is opened
        ("a: b: c", "Write a text with a colon in it in quotes, or a mapping as {key: value}"),
        ("a:\n  b: {c: 1},\n  d: 1", "Remove the comma at the end of the line"),
        ("models:\n  -model: a\n  -model: b", "put a space behind the dash of each"),
        ("models:\n  model: a\n  model: b", "begin each entry with a dash and a space"),
        ("a: &x 1\n---\nb: *x", "the anchor &x is that of another document"),
        (
            "merge_method: linear\nslices: [{model: a, layer_range: [0, 2]}]",
            "`slices[0].model` does not belong here; write `slices: [{sources:",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, layer_range: [0, 2]}]",
            "`models[0].layer_range` does not belong here; write `slices: [{sources:",
        ),
        ("merge_method: linear\nmodels:\n  -model: a", "put a space behind the dash"),
        ("models:\n  - model: a\n  -model: b", "Put a space behind the dash"),
        ("merge_method: linear\nmodels: {model: a}", "begin every entry with a dash and a space"),
        ("a: {b: 1", "opened and not closed, or a comma is missing"),
        ("a: [1 2, {b]", "opened and not closed, or a comma is missing"),
        ("a: @b", "Write a text that begins with @ in quotes"),
        ("```yaml\na: b\n```", "Remove the lines of ```"),
        ("a:\u00a0b\nc: d", "type plain spaces"),
        ('a: "C:\\models"', "write the text in single ones"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0,5}}]",
            "a number with a decimal point is meant",
        ),
    ],
)
def test_slips_get_a_hint(text: str, said: str) -> None:
    assert said in refused(text)


def test_hints_show_no_credentials() -> None:
    url = "s3:x//key:hunter2@bucket"
    for text in ("model:https://u:hunter2@host/b\nb: 1", f"models: [model:{url}]"):
        assert "hunter2" not in refused(f"merge_method: linear\n{text}")


def test_keys_that_hold_anchors() -> None:
    text = """
x-defaults: &defaults {density: 0.5}
ours:
  math: &math {<<: *defaults, weight: 0.3}
merge_method: ties
base_model: base
models:
  - {model: a, parameters: *math}
  - {model: b, parameters: {<<: *defaults, weight: 1}}
"""
    loaded = parse_config(text)
    assert loaded == config(
        "ties",
        models=[
            {"model": "a", "parameters": {"density": 0.5, "weight": 0.3}},
            {"model": "b", "parameters": {"density": 0.5, "weight": 1}},
        ],
    )
    notes = [note for note in loaded.notes() if "anchors" in note]
    assert notes == [
        f"{key}: read only where its anchors are named." for key in ("ours", "x-defaults")
    ]
    # What nothing elsewhere names is misspelled, as is what only some other document has.
    for wrong in (
        text.replace("parameters: *math", "parameters: {weight: 1}"),
        text.replace("*defaults", "{density: 0.5}"),
        f"{text}weigths: &w 1\n",
        f"{text}dtyp: &d bfloat16\nout_dtype: *d\n",
        f"{text}weigths: [&w 1, *w]\n",
        f"{text}name: x\n---\nweigths: &defaults 1\nmerge_method: linear\nmodels: [{{model: x}}]",
    ):
        assert "is no known key" in refused(wrong)


def test_aliases_and_merge_keys() -> None:
    text = """
merge_method: della
base_model: base
models:
  - model: a
    parameters: &common
      weight: 0.5
      density: &kept [0.4, 0.6]
      epsilon: 0.1
  - model: b
    parameters: *common
  - model: c
    parameters: {epsilon: 0.2, <<: [{weight: 2}, *common]}
  - model: d
    parameters: {density: *kept, "weight": 1}
---
"""
    half, twice = ({"density": [0.4, 0.6], "weight": w} for w in (0.5, 2))
    written = config(
        models=[
            {"model": "a", "parameters": {**half, "epsilon": 0.1}},
            {"model": "b", "parameters": {**half, "epsilon": 0.1}},
            {"model": "c", "parameters": {**twice, "epsilon": 0.2}},
            {"model": "d", "parameters": {**half, "weight": 1}},
        ]
    )
    assert parse_config(text) == written


def test_aliases_are_as_pyyaml_reads_them() -> None:
    text = """
a: &a {x: 1, y: &y [1, {z: 2}]}
b: {<<: *a, x: 3}
c: {x: 3, <<: [*a, {x: 4, w: *y}]}
d: [*a, *y, *y]
e: {<<: {<<: *a, v: 1}}
"""
    assert read_yaml(text, "c.yaml")[0] == [yaml.safe_load(text)]


def test_large_yaml_is_fast() -> None:
    filters = "".join(f"    - {{filter: x{i}, value: 0.5}}\n" for i in range(20_000))
    text = f"merge_method: linear\nmodels: [{{model: x}}]\nparameters:\n  weight:\n{filters}"
    started_s = time.process_time()
    assert parse_config(text).settings_for("x7", 0).weights == (0.5,)
    assert time.process_time() - started_s < 10


def test_numbers_of_yaml() -> None:
    text = "merge_method: linear\nmodels: [{model: x}]\nparameters: {weight: [1e-3, 1.5, -2, .5]}"
    parsed = parse_config(text)
    found = [parsed.settings_for("a", i / 3).weights[0] for i in range(4)]
    assert found == pytest.approx([0.001, 1.5, -2, 0.5])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", "8"), ("00.5_0", "0.5"), ("0_5", "5"), ("01", "1"), ("-017", "-15")),
        *(("1_000", "1000"), ("0x1F", "31"), ("0b1", "1"), ("1:30", "90"), ("1:30.5", "90.5")),
        *(("-1:30:00", "-5400"), ("0x_1", "1"), ("1_0.5e+3", "10500.0"), ("00", "0")),
    ],
)
def test_numbers_that_yaml_1_1_reads_in_its_own_way(text: str, value: str) -> None:
    lines = "merge_method: linear\nmodels:\n  - {model: x}\nparameters:\n  weight: %s"
    message = refused(lines % text)
    assert message.startswith(f"c.yaml, line 5: '{text}' is {value} to YAML 1.1 readers.")
    assert "decimal" in message
    assert "quotes" in message
    # Wherever they stand: a path or a filter would be another one.
    for line in (f"base_model: {text}", f"seed: {text}", f"node_labels: {{a: {text}}}"):
        assert f"'{text}' is {value} to YAML" in refused(f"merge_method: della\n{line}\n")


def test_quoted_numbers_are_text() -> None:
    text = "merge_method: linear\nmodels: [{model: '010'}, {model: \"1:30\"}, {model: 08}]"
    assert [m.model for m in parse_config(text).models] == ["010", "1:30", "08"]


@pytest.mark.parametrize("text", ["7", "1.5", "true", "on"])
def test_paths_that_yaml_does_not_read_as_text(text: str) -> None:
    message = refused(f"merge_method: linear\nmodels: [{{model: {text}}}]")
    assert "must be the path of a checkpoint" in message
    assert "in quotes" in message


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_bytes(b"merge_method: \xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 14 is 0xff\)"):
        load_config(path)
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        load_config(str(path))
    path.write_bytes(b"\xef\xbb\xbfmerge_method: linear\r\nmodels: [{model: x}]\r\n")
    assert load_config(path).merge_method == "linear"
    with pytest.raises(ConfigError, match="cannot read"):
        load_config("a\0b")


# ---------------------------------------------------------------- layers


def test_layer_fraction() -> None:
    assert layer_fraction(
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.experts.7.w",
            "model.layers.1.x",
            "model.layers.4.x",
            "visual.blocks.0.x",
            "visual.blocks.2.x",
            "only.0.x",
            "model.norm.weight",
            "lm_head.weight",
            "transformer.wte.weight",
            "wpe.weight",
            "tok_embeddings.weight",
            "embed_out.weight",
            "layer1.weight",
            "9.weight",
            "h.99999999999999999999.x",
        ]
    ) == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.mlp.experts.7.w": 0,
        "model.layers.1.x": 0.25,
        "model.layers.4.x": 1,
        "visual.blocks.0.x": 0,
        "visual.blocks.2.x": 1,
        "only.0.x": 1,
        "model.norm.weight": 0,
        "lm_head.weight": 0,
        "transformer.wte.weight": 0,
        "wpe.weight": 0,
        "tok_embeddings.weight": 0,
        "embed_out.weight": 0,
        "layer1.weight": 0,
        "9.weight": 1,
        "h.99999999999999999999.x": 0,
    }


def test_import_is_light() -> None:
    code = (
        "import sys, della_dist.config\n"
        "heavy = ('torch', 'ray', 'fsspec', 'pyarrow', 'click', 'numpy', 'numba')\n"
        "sys.exit(any(m in sys.modules for m in heavy))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
