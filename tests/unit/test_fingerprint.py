"""What a run is: everything the output depends on is in its identity, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from della_dist.config import config_from_mapping
from della_dist.plan.build import MergePlan, build_plan
from della_dist.plan.fingerprint import explain_difference, fingerprint, identity
from della_dist.specs import CheckpointIndex, ModelFacts, ShardFile, TensorEntry

TENSORS = {
    "model.embed_tokens.weight": (10, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}


def checkpoint(location: str, **changes: Any) -> CheckpointIndex:
    tensors = {
        name: TensorEntry(name, "BF16", shape, 0, 8, 8 + 2 * shape[0])
        for name, shape in TENSORS.items()
    }
    shard = replace(ShardFile("model.safetensors", 100, f"v-{location}", "0" * 64), **changes)
    return CheckpointIndex(location, (shard,), tensors, ("config.json",))


def settings(**keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "della",
        "base_model": "/base",
        "models": [{"model": "/a"}, {"model": "/b"}],
        "parameters": {"density": 0.5},
        **keys,
    }


def plan(
    keys: dict[str, Any] | None = None,
    shard_bytes: int | None = None,
    base: CheckpointIndex | None = None,
    expert: CheckpointIndex | None = None,
) -> MergePlan:
    config = config_from_mapping(settings() if keys is None else keys)
    experts = (checkpoint("/a"), expert or checkpoint("/b"))
    return build_plan(config, base or checkpoint("/base"), experts, shard_bytes=shard_bytes)


REFERENCE = identity(plan())

TIED = replace(checkpoint("/base"), model=ModelFacts(tie=True))

CHANGES: dict[str, tuple[Callable[[], MergePlan], str]] = {
    "seed": (lambda: plan(settings(seed=1)), "config.seed was 0, now 1"),
    "density": (
        lambda: plan(settings(parameters={"density": 0.25})),
        "config.models[0].parameters.density was 0.5, now 0.25",
    ),
    "method": (
        lambda: plan(settings(merge_method="ties")),
        'config.merge_method was "della", now "ties"',
    ),
    "dtype": (lambda: plan(settings(out_dtype="float32")), "config.out_dtype was null"),
    "nonfinite": (lambda: plan(settings(on_nonfinite="zero")), "config.on_nonfinite was"),
    "shards": (lambda: plan(shard_bytes=50), "shard_bytes was 268435456, now 50"),
    "size": (
        lambda: plan(expert=checkpoint("/b", size_bytes=101)),
        "inputs[2].shards[0].size_bytes was 100, now 101",
    ),
    "version": (
        lambda: plan(expert=checkpoint("/b", version="later")),
        'inputs[2].shards[0].version was "v-/b", now "later"',
    ),
    "header": (
        lambda: plan(base=checkpoint("/base", header_sha256="1" * 64)),
        "inputs[0].shards[0].header_sha256 was",
    ),
    "name": (
        lambda: plan(expert=checkpoint("/b", name="other.safetensors")),
        "inputs[2].shards[0].name was",
    ),
    "place": (
        lambda: plan(expert=checkpoint("/c")),
        'inputs[2].location was "/b", now "/c"',
    ),
    "more shards": (
        lambda: plan(
            expert=replace(checkpoint("/b"), shards=checkpoint("/b").shards * 2),
        ),
        "inputs[2].shards was",
    ),
    # config.json is in no header, and yet it decides which tensors are merged.
    "tied": (lambda: plan(base=TIED, expert=replace(TIED, location="/b")), "lm_head.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_run(change: str) -> None:
    make, words = CHANGES[change]
    if change == "tied":
        tied = (replace(TIED, location="/a"), replace(TIED, location="/b"))
        changed = identity(build_plan(config_from_mapping(settings()), TIED, tied))
        for index in changed["inputs"]:
            index["shards"][0]["version"] = f"v-{index['location']}"
    else:
        changed = identity(make())
    assert fingerprint(changed) != fingerprint(REFERENCE)
    assert any(words in line for line in explain_difference(REFERENCE, changed))


def test_order_of_the_experts_counts() -> None:
    keys = settings(models=[{"model": "/b"}, {"model": "/a"}])
    swapped = build_plan(
        config_from_mapping(keys), checkpoint("/base"), (checkpoint("/b"), checkpoint("/a"))
    )
    assert fingerprint(identity(swapped)) != fingerprint(REFERENCE)


def test_what_does_not_change_the_run() -> None:
    # The same thing said in other words, with comments and notes of its own.
    keys = settings(parameters={"drop_rate": 0.5, "int8_mask": True}, chat_template="auto")
    assert identity(plan(keys)) == REFERENCE
    assert identity(plan(settings(), shard_bytes=256 << 20)) == REFERENCE
    assert fingerprint(identity(plan())) == fingerprint(REFERENCE)


def test_survives_json() -> None:
    # It is compared with what a file says.
    read = json.loads(json.dumps(REFERENCE))
    assert read == REFERENCE
    assert fingerprint(read) == fingerprint(REFERENCE)
    assert explain_difference(read, REFERENCE) == []


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [{"c": 2, "d": 3}]}) == fingerprint(
        {"b": [{"d": 3, "c": 2}], "a": 1}
    )
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(REFERENCE))


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a was 1, now 2"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b[1] was 2, now 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a was [1], now [1, 2]"]),
        ({"a": 1}, {"b": 1}, ["a was 1, now null", "b was null, now 1"]),
        ({"a": {"b": 1}}, {"a": None}, ['a was {"b": 1}, now null']),
        ({"a": "x"}, {"a": 7}, ['a was "x", now 7']),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, ["a was 1, now 2", "z was 1, now 2"]),
    ],
)
def test_differences(old: Any, new: Any, lines: list[str]) -> None:
    assert explain_difference(old, new) == lines


def test_differences_are_short() -> None:
    (line,) = explain_difference({"a": "x" * 1000}, {"a": ["y"] * 1000})
    assert len(line) < 200
    assert line.count("...") == 2


@pytest.mark.parametrize(("old", "new"), [(True, 1), (1, 1.0), (0, False)])
def test_values_that_python_calls_equal(old: Any, new: Any) -> None:
    # JSON tells them apart, and so does the fingerprint: a difference that is refused must be told.
    assert fingerprint({"a": old}) != fingerprint({"a": new})
    assert explain_difference({"a": old}, {"a": new}) != []
