"""What goes to AWS: EC2 nodes, Batch jobs, rights and the bucket's rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cluster_files import IMAGE, JOB_DEFINITIONS, OUTPUT, read, read_json, read_yaml
from tests.cluster_schemas import IAM_POLICY

BUCKET_ARN = "arn:aws:s3:::BUCKET"
OUTPUT_ARN = OUTPUT.replace("s3://", "arn:aws:s3:::") + "/*"


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def statements(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield every action with every resource it is allowed on, and the condition."""
    policy = read_json(name)
    jsonschema.Draft202012Validator(IAM_POLICY).validate(policy)
    for statement in policy["Statement"]:
        for action in as_list(statement["Action"]):
            for resource in as_list(statement["Resource"]):
                yield action, resource, statement.get("Condition", {})


def assert_aws_takes(service: str, operation: str, parameters: dict[str, Any]) -> None:
    """Check parameters, their names too, against AWS's own description of an operation."""
    session = pytest.importorskip("botocore.session").get_session()
    validate = pytest.importorskip("botocore.validate")
    shape = session.get_service_model(service).operation_model(operation).input_shape
    report = validate.ParamValidator().validate(parameters, shape)
    assert not report.has_errors(), report.generate_report()


def test_ray_aws_by_rays_own_schema() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(read_yaml("ray-aws.yaml"))


def test_ray_aws_head_is_on_demand_and_workers_are_spot() -> None:
    config = read_yaml("ray-aws.yaml")
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert {name: bool(t["resources"].get("GPU")) for name, t in types.items()} == {
        "cpu": False,
        "gpu": True,
    }
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        # The head may start instances; the workers have the rights of the merge alone.
        assert worker["node_config"]["IamInstanceProfile"]["Arn"].endswith(
            "instance-profile/della-dist"
        )
    assert config["max_workers"] == sum(worker["max_workers"] for worker in types.values())
    assert config["provider"]["cache_stopped_nodes"] is False
    assert config["provider"]["availability_zone"].count(",") == 0


def test_ray_aws_instances_by_awss_own_description() -> None:
    for node in read_yaml("ray-aws.yaml")["available_node_types"].values():
        assert_aws_takes(
            "ec2", "RunInstances", {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        )


@pytest.mark.parametrize("name", JOB_DEFINITIONS)
def test_job_definition(name: str) -> None:
    definition = read_json(name)
    assert_aws_takes("batch", "RegisterJobDefinition", definition)
    retry = definition["retryStrategy"]
    assert 1 < retry["attempts"] <= 10
    # What was refused once is refused again; everything else continues.
    assert retry["evaluateOnExit"] == [{"onExitCode": "2", "action": "EXIT"}]
    if definition["type"] == "multinode":
        nodes = definition["nodeProperties"]
        assert nodes["mainNode"] < nodes["numNodes"]
        (node_range,) = nodes["nodeRangeProperties"]
        assert node_range["targetNodes"] == "0:"
        container = node_range["container"]
    else:
        container = definition["containerProperties"]
    assert container["image"] == IMAGE
    assert f"/usr/local/bin/{container['command'][0]}" in read("Dockerfile")
    environment = {item["name"]: item["value"] for item in container["environment"]}
    assert environment["DELLA_OUT"] == OUTPUT
    assert [secret["name"] for secret in container["secrets"]] == ["RAY_AUTH_TOKEN"]
    for variable in [*environment, "RAY_AUTH_TOKEN"]:
        assert f"${{{variable}:" in read("aws-batch/entrypoint.sh"), variable
    resources = {item["type"]: int(item["value"]) for item in container["resourceRequirements"]}
    actors = resources["VCPU"] // int(environment["DELLA_THREADS"])
    buffers_mib = actors * int(environment["DELLA_MEMORY"].removesuffix("GiB")) * 1024
    assert buffers_mib + container["linuxParameters"]["sharedMemorySize"] < resources["MEMORY"]


def test_policy_has_the_rights_of_a_merge_and_no_others() -> None:
    granted: dict[str, set[str]] = {}
    for action, resource, condition in statements("iam-policy.json"):
        assert "*" not in action
        assert not condition
        granted.setdefault(resource, set()).add(action)
    # No prefix on ListBucket: with one, S3 answers 403 and not 404 to HEAD of an absent object.
    assert granted == {
        BUCKET_ARN: {"s3:ListBucket", "s3:ListBucketMultipartUploads"},
        f"{BUCKET_ARN}/models/*": {"s3:GetObject"},
        OUTPUT_ARN: {
            "s3:GetObject",
            "s3:PutObject",
            "s3:DeleteObject",
            "s3:AbortMultipartUpload",
            "s3:ListMultipartUploadParts",
        },
    }


def test_policy_reads_every_input() -> None:
    readable = {r for a, r, _ in statements("iam-policy.json") if a == "s3:GetObject"}
    config = read_yaml("merge.yaml")
    inputs = [config["base_model"], *(model["model"] for model in config["models"])]
    for url in inputs:
        arn = url.replace("s3://", "arn:aws:s3:::") + "/x"
        assert any(arn.startswith(resource.removesuffix("*")) for resource in readable), url


def test_head_policy_ends_only_its_own_instances() -> None:
    name = read_yaml("ray-aws.yaml")["cluster_name"]
    for action, resource, condition in statements("ray-aws-head-policy.json"):
        assert "*" not in action
        # Describing cannot be restricted; everything else is.
        assert resource != "*" or condition or action.startswith("ec2:Describe"), action
        if action == "ec2:TerminateInstances":
            assert condition == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": name}}
        if action == "iam:PassRole":
            assert resource == "arn:aws:iam::ACCOUNT:role/della-dist"


def test_lifecycle_rule_covers_the_output_alone() -> None:
    lifecycle = read_json("lifecycle.json")
    assert_aws_takes(
        "s3",
        "PutBucketLifecycleConfiguration",
        {"Bucket": "bucket", "LifecycleConfiguration": lifecycle},
    )
    (rule,) = lifecycle["Rules"]
    assert set(rule) == {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}
    assert rule["Status"] == "Enabled"
    assert OUTPUT.removeprefix("s3://BUCKET/").startswith(rule["Filter"]["Prefix"])
    # It must not abort what a long run is writing.
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] >= 2
