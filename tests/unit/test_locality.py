"""Tasks are preferred where their inputs lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError
from della_dist.planning.fingerprint import identity
from della_dist.planning.locality import file_labels, local_bytes
from della_dist.runtime.open_plan import open_plan
from tests.merging import config_for, save_family


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "in", num_experts=2, num_shards=2)
    return config_for(base, experts)


def test_bytes_by_label(config: MergeConfig, tmp_path: Path) -> None:
    plan = open_plan(config, shard_bytes=100_000)
    rules = {f"{tmp_path}/in/base/*-00001-of-*": "disk=a", "*/in/base/*": "disk=b"}
    labels = file_labels(plan, rules)
    base = config.base_model
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert labels == {(base, names[0]): "disk=a", (base, names[1]): "disk=b"}
    assert plan.base is not None
    for shard in plan.shards:
        expected: dict[str, int] = {}
        for tensor in shard.tensors:
            entry = plan.base.tensors[tensor.name]
            label = ("disk=a", "disk=b")[entry.shard]
            expected[label] = expected.get(label, 0) + entry.stop - entry.start
        assert local_bytes(plan, shard, labels) == expected
    assert file_labels(plan, {"*.bin": "disk=a"}) == {}


def test_labels_are_no_part_of_what_a_merge_is(config: MergeConfig) -> None:
    content = {**config.normalized(), "node_labels": {"*/base/*": "disk=a"}}
    labelled = config_from_mapping(content)
    assert labelled.node_labels == {"*/base/*": "disk=a"}
    assert identity(open_plan(labelled)) == identity(open_plan(config))
    more = labelled.with_node_labels(["s3://bucket/x*:zone=eu-1"])
    assert list(more.node_labels.items()) == [
        ("s3://bucket/x*", "zone=eu-1"),
        ("*/base/*", "disk=a"),
    ]


@pytest.mark.parametrize("rule", ["", "disk=a", ":disk=a", "/data:disk", "/data:=a", "/data:a=b c"])
def test_what_is_no_rule(config: MergeConfig, rule: str) -> None:
    with pytest.raises(ConfigError, match="--locality"):
        config.with_node_labels([rule])


@pytest.mark.parametrize("labels", [["a"], {"x": 1}, {"x": "a"}, {"x": "a = b"}])
def test_what_is_no_mapping_of_labels(config: MergeConfig, labels: object) -> None:
    with pytest.raises(ConfigError, match="node_labels"):
        config_from_mapping({**config.normalized(), "node_labels": labels})
