"""Servers and networks for tests do what their users count on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.servers.moto import make_bucket, moto_server, s3_client, s3_environment
from tests.servers.namespaces import Host, network
from tests.servers.proxy import Rule, faulty_proxy
from tests.servers.ray_cluster import RAY_ENVIRONMENT
from tests.servers.rgw import rgw_server

FETCH = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=1)"
RUN_ACTOR = """
import json, sys, boto3, ray
ray.init(address="auto", log_to_driver=False)

class Reader:
    def read(self, bucket):
        node = ray.get_runtime_context().get_node_id()
        (address,) = [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node]
        return address, boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"]

print(json.dumps(ray.get(
    ray.remote(num_cpus=1, resources={"there": 1})(Reader).remote().read.remote(sys.argv[1])
)))
"""


@pytest.fixture
def private_folder() -> Iterator[Path]:
    # Not tmp_path: the paths of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ns") as folder:
        yield Path(folder)


def reaches(host: Host, url: str) -> bool:
    try:
        host.run([sys.executable, "-c", FETCH, url])
    except subprocess.CalledProcessError:
        return False
    return True


@pytest.mark.slow
def test_hosts_are_cut_and_healed(private_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with network(2, private=[private_folder]) as net, moto_server(net.address) as endpoint:
        one, other = net.hosts
        assert reaches(one, endpoint)
        one.cut()
        assert not reaches(one, endpoint)
        assert reaches(other, endpoint)
        one.heal()
        assert reaches(one, endpoint)
        one.run(["touch", str(private_folder / "mine")])
        assert one.run(["ls", str(private_folder)]) == "mine\n"
        assert other.run(["ls", str(private_folder)]) == ""
        left = one.popen(["sleep", "100"])
    assert left.wait(1) < 0
    assert one.namespace not in subprocess.check_output(["ip", "netns"], text=True)
    assert "timed out" in capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_ray_and_s3_across_hosts(private_folder: Path) -> None:
    pytest.importorskip("ray")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    with network(2, private=[private_folder]) as net, moto_server(net.address) as endpoint:
        make_bucket(endpoint, "bucket")
        head, worker = net.hosts
        env = {
            **RAY_ENVIRONMENT,
            **s3_environment(endpoint),
            "RAY_TMPDIR": str(private_folder),
        }
        for host in net.hosts:
            host.run(["mkdir", str(private_folder / "ray")])
        common = ["--object-store-memory=80000000"]
        head.run(
            [
                *ray,
                *("--head", f"--node-ip-address={head.address}", "--port=6379", "--num-cpus=0"),
                *("--include-dashboard=false", *common),
            ],
            env=env,
        )
        worker.run(
            [
                *ray,
                *(f"--address={head.address}:6379", f"--node-ip-address={worker.address}"),
                *("--num-cpus=1", '--resources={"there": 1}', *common),
            ],
            env=env,
        )
        output = head.run([sys.executable, "-c", RUN_ACTOR, "bucket"], env=env)
        assert json.loads(output.splitlines()[-1]) == [worker.address, 0]


@pytest.mark.rgw
def test_rgw_is_stricter_than_moto() -> None:
    with (
        rgw_server() as endpoint,
        faulty_proxy(endpoint) as proxy,
        closing(s3_client(proxy.endpoint)) as client,
    ):
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="key", Body=b"mine", IfNoneMatch="*")
        with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="bucket", Key="key", Body=b"other", IfNoneMatch="*")
        proxy.use(Rule("flip_request", match="^PUT", times=1))
        with pytest.raises(client.exceptions.ClientError, match="XAmzContentSHA256Mismatch"):
            client.put_object(Bucket="bucket", Key="key", Body=b"other")
        assert client.get_object(Bucket="bucket", Key="key")["Body"].read() == b"mine"
        where = {"Bucket": "bucket", "Key": "key"}
        where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
        tags = [client.upload_part(**where, PartNumber=n, Body=b"x")["ETag"] for n in (1, 2)]
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]
        with pytest.raises(client.exceptions.ClientError, match="EntityTooSmall"):
            client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
