"""``rename``: names that no table knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, InputError, OutputError
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.verify import verify
from tests.adapters import by_peft, largest_difference, save_adapter
from tests.layouts import (
    adding,
    merging,
    named,
    renamed,
    save_models,
    weights,
)
from tests.merging import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as in files and as in memory, a base and an expert of each."""
    return save_models(tmp_path_factory.mktemp("models"))


def test_rename(folder: Path, tmp_path: Path) -> None:
    """Names that no table knows, of the base as well as of an expert."""
    llama = folder / "llama"
    odd = ("model.layers.", "net.blocks/"), ("model.", "net."), ("lm_head.", "out.")
    base = renamed(llama / "base", tmp_path / "base", *odd)
    expert = renamed(llama / "expert", tmp_path / "expert", *odd)
    rules = (r"^net\.blocks/(\d+)", r"model.layers.\1"), ("^net[.]", "model.")
    content = merging(llama / "base", [expert]).normalized()
    with pytest.raises(InputError, match="none of the 21 tensors"):
        open_plan(config_from_mapping(content))
    content["models"][0] |= named(expert, *rules, ("^out", "lm_head"))
    run(config_from_mapping(content), tmp_path / "a")
    run(merging(llama / "base", [llama / "expert"]), tmp_path / "plain")
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")
    content["base_model"] = named(base, *rules, ("^out", "lm_head"))
    config = config_from_mapping(content)
    assert config == config_from_mapping(config.normalized())
    run(config, tmp_path / "b")
    assert weights(tmp_path / "b") == weights(tmp_path / "plain")
    assert "rename:" in (tmp_path / "b" / "README.md").read_text()
    assert verify(str(tmp_path / "b"), recompute=5).recomputed
    content["models"][0] |= named(expert, *rules, ("^out[.]", "lm_head."))
    with pytest.raises(OutputError, match="rename"):  # another configuration
        run(config_from_mapping(content), tmp_path / "b")


def test_rename_of_slices(folder: Path, tmp_path: Path) -> None:
    llama = folder / "llama"
    odd = renamed(llama / "expert", tmp_path / "odd", ("model.", "net."))

    def passed_through(first: dict[str, Any], second: dict[str, Any]) -> MergeConfig:
        sources = [{"sources": [{**one, "layer_range": [0, 2]}]} for one in (first, second)]
        return config_from_mapping({"merge_method": "passthrough", "slices": sources})

    base = {"model": str(llama / "base")}
    run(passed_through(base, {"model": str(llama / "expert")}), tmp_path / "plain")
    run(passed_through(base, named(odd, ("^net", "model"))), tmp_path / "renamed")
    assert weights(tmp_path / "renamed") == weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ([{"from": "(", "to": "x"}], r"rename\[0\]` is wrong: the pattern '\(' is no regular"),
        ([{"from": "(a+)+b", "to": "x"}], "too involved"),
        ([{"from": ".*.*.*a", "to": "x"}], "at most 2 repetitions"),
        ([{"from": "a", "to": r"\1"}], "invalid group reference"),
        ([{"from": "a"}], r"rename\[0\].to` must be text"),
        ([{"from": "", "to": "a"}], "is empty"),
        ([{"from": "a", "to": "b", "name": 1}], "is no known key"),
        ({"from": "a", "to": "b"}, "must be a list of rules"),
        ([3], "must be a rule"),
    ],
)
def test_rules_that_are_wrong(rules: object, part: str) -> None:
    model = {"model": "m", "rename": rules}
    for content in (
        {"merge_method": "linear", "models": [model]},
        {"merge_method": "task_arithmetic", "base_model": model, "models": [{"model": "e"}]},
    ):
        with pytest.raises(ConfigError, match=part):
            config_from_mapping(content)


def test_rules_are_for_models(folder: Path, tmp_path: Path) -> None:
    model = folder / "llama" / "base"
    adapter = save_adapter(model, tmp_path / "adapter")
    content = adding(model, adapter).normalized()
    content["models"][0] |= named(adapter, ("model", "net"))
    with pytest.raises(InputError, match=r"is an adapter, .* `rename` is for models"):
        open_plan(config_from_mapping(content))
    odd = renamed(model, tmp_path / "odd", ("model.", "net."))
    content["models"][0] |= named(Path(f"{odd}+{adapter}"), ("^net", "model"))
    run(config_from_mapping(content), tmp_path / "out")
    assert largest_difference(tmp_path / "out", by_peft(model, adapter)) < 2e-7


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (("nowhere", "there"), "no name of a tensor becomes another"),
        ((r"\d+", "0"), "calls both"),
        (("^.*$", ""), "calls lm_head.weight '', no name"),
    ],
)
def test_rules_that_do_not_fit(folder: Path, rule: tuple[str, str], part: str) -> None:
    content = merging(folder / "llama" / "base", [folder / "llama" / "expert"]).normalized()
    content["models"][0] |= named(folder / "llama" / "expert", rule)
    with pytest.raises(InputError, match=part):
        open_plan(config_from_mapping(content))
