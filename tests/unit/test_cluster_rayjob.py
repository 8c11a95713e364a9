"""The RayJob: its keys by a strict schema, its numbers by what they have to do with each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster_files import IMAGE, commands, quantity_bytes, rayjob, read
from tests.cluster_schemas import RAYJOB, SERVICE_ACCOUNT

SPEC = rayjob()["spec"]
RAY = SPEC["rayClusterSpec"]
HEAD = RAY["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in RAY["workerGroupSpecs"]}
GROUPS = [HEAD, *WORKERS.values()]


def container(group: dict[str, Any]) -> dict[str, Any]:
    found = group["template"]["spec"]["containers"][0]
    assert isinstance(found, dict)
    return found


def options() -> dict[str, str]:
    """Options of the entrypoint's merge; those without a value have none here."""
    (arguments,) = commands(SPEC["entrypoint"], "della-dist")
    return {
        name: value
        for name, value in pairwise(arguments)
        if name.startswith("--") and not value.startswith("--")
    }


def test_has_only_keys_we_know() -> None:
    account, job = yaml.safe_load_all(read("rayjob.yaml"))
    jsonschema.Draft202012Validator(SERVICE_ACCOUNT).validate(account)
    jsonschema.Draft202012Validator(RAYJOB).validate(job)
    assert {group["template"]["spec"]["serviceAccountName"] for group in GROUPS} == {
        account["metadata"]["name"]
    }


@pytest.mark.parametrize("group", GROUPS, ids=["head", *WORKERS])
def test_requests_are_limits(group: dict[str, Any]) -> None:
    resources = container(group)["resources"]
    assert resources["requests"] == resources["limits"]
    assert container(group)["image"] == IMAGE


def test_autoscaler_requests_are_limits() -> None:
    resources = RAY["autoscalerOptions"]["resources"]
    assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("group", GROUPS, ids=["head", *WORKERS])
def test_object_store_fits_into_shared_memory(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    (shm,) = (
        mount for mount in container(group)["volumeMounts"] if mount["mountPath"] == "/dev/shm"
    )
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == shm["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    shm_bytes = quantity_bytes(volume["emptyDir"]["sizeLimit"])
    store_bytes = int(group["rayStartParams"]["object-store-memory"])
    # Ray refuses an object store below 75 MiB.
    assert 75 << 20 <= store_bytes <= shm_bytes
    assert shm_bytes < quantity_bytes(container(group)["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", WORKERS)
def test_ray_counts_what_the_pod_has(name: str) -> None:
    limits = container(WORKERS[name])["resources"]["limits"]
    params = WORKERS[name]["rayStartParams"]
    assert params["num-cpus"] == limits["cpu"]
    assert params.get("num-gpus") == limits.get("nvidia.com/gpu")


def test_head_has_no_actors_and_no_spot() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in HEAD["template"]["spec"]
    assert "nvidia.com/gpu" not in container(HEAD)["resources"]["limits"]


@pytest.mark.parametrize("name", WORKERS)
def test_workers_scale_from_none_and_take_spot(name: str) -> None:
    group = WORKERS[name]
    assert group["minReplicas"] == 0
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
    assert tolerated == ({"spot", "nvidia.com/gpu"} if name == "gpu" else {"spot"})


def test_all_actors_find_a_place() -> None:
    given = options()
    assert given["--device"] == "cpu"
    cpus_a_pod = int(WORKERS["cpu"]["rayStartParams"]["num-cpus"])
    actors_a_pod = cpus_a_pod // int(given["--threads"])
    assert actors_a_pod * WORKERS["cpu"]["maxReplicas"] == int(given["--workers"])
    # The comment says how many there are with GPUs, one an actor.
    gpus = WORKERS["gpu"]["maxReplicas"] * int(WORKERS["gpu"]["rayStartParams"]["num-gpus"])
    assert f"--device cuda --workers {gpus}" in read("rayjob.yaml")


@pytest.mark.parametrize("name", WORKERS)
def test_buffers_fit_into_the_pod(name: str) -> None:
    group = WORKERS[name]
    given = options()
    buffers = quantity_bytes(given["--memory"].removesuffix("B"))
    gpus = int(group["rayStartParams"].get("num-gpus", 0))
    actors = gpus or int(group["rayStartParams"]["num-cpus"]) // int(given["--threads"])
    shm = quantity_bytes(group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"])
    limit = quantity_bytes(container(group)["resources"]["limits"]["memory"])
    # Python with its libraries takes about 300 MiB an actor, Ray as much again.
    assert actors * (buffers + (600 << 20)) + shm <= limit


def test_configuration_is_mounted_where_the_merge_reads_it() -> None:
    (arguments,) = commands(SPEC["entrypoint"], "della-dist")
    (mount,) = (mount for mount in container(HEAD)["volumeMounts"] if mount["name"] == "config")
    assert arguments[1] == f"{mount['mountPath']}/merge.yaml"
    (volume,) = (v for v in HEAD["template"]["spec"]["volumes"] if v["name"] == "config")
    name = volume["configMap"]["name"]
    command = f"kubectl create configmap {name} --from-file=cluster/merge.yaml"
    assert command in read("rayjob.yaml")
    assert command in read("README.md")
