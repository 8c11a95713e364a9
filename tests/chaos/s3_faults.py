"""Merges from S3 to S3 of which a fifth of all requests fail, and what that costs.

Plain functions, for the tests beside this file and for whoever wants the figures.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from della_dist.config import MergeConfig, load_config
from della_dist.demo import make_family
from della_dist.report.summary import MergeSummary
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.verify import verify
from tests.remote import upload_inputs
from tests.servers.faults import FaultName
from tests.servers.moto import make_bucket, moto_server, s3_client, s3_environment
from tests.servers.proxy import Proxy, Rule, faulty_proxy

BUCKET = "chaos"
#: Output shards of two parts and three; tensors that take several requests each.
SHARD_BYTES = 20_000_000
PROBABILITY = 0.2
#: Each makes a request fail. Cut bodies befall answers that have one.
FAULTS: dict[str, FaultName] = {
    "500 InternalError": "internal_error",
    "503 SlowDown": "slow_down",
    "connection reset": "reset",
    "reset in the answer": "reset_body",
    "answer cut": "close_body",
    "answer cut, length changed too": "shorten",
    "answer lost, request performed": "lost_response",
}
MIXED = "all of them"


@dataclass(frozen=True, slots=True)
class Scene:
    """A family of checkpoints in an S3 bucket, and what merging it must give."""

    endpoint: str
    config: MergeConfig
    """Reads the inputs from S3."""
    model_digest: str
    """Of the undisturbed merge of local files."""


@dataclass(frozen=True, slots=True)
class FaultyMerge:
    """One merge through a faulty network."""

    name: str
    num_requests: int
    faults: Counter[str]
    seconds: float
    summary: MergeSummary
    leavings: list[str]
    """Multipart uploads and objects below ``.della/`` that are still there."""


def rules(name: str) -> list[Rule]:
    """Return the rules by which a fifth of all requests fail."""
    if name != MIXED:
        return [Rule(FAULTS[name], PROBABILITY)]
    each = 1 - (1 - PROBABILITY) ** (1 / len(FAULTS))
    return [Rule(fault, each) for fault in FAULTS.values()]


def make_scene(folder: Path, endpoint: str) -> Scene:
    """Make a family, merge it locally, and upload it."""
    family = make_family(
        folder / "family",
        hidden=1024,
        intermediate=2816,
        layers=1,
        heads=8,
        vocab=5120,
        num_experts=2,
        shard_size_bytes=24 << 20,
    )
    config = load_config(family.config_path)
    local = merge(config, str(folder / "local"), RunOptions(device="cpu", shard_bytes=SHARD_BYTES))
    make_bucket(endpoint, BUCKET)
    with pointed_at(endpoint):
        return Scene(endpoint, upload_inputs(config, f"s3://{BUCKET}/in"), local.model_digest)


@contextlib.contextmanager
def pointed_at(endpoint: str, **more: str) -> Iterator[None]:
    """Send S3 clients of this process to an endpoint."""
    wanted = {**s3_environment(endpoint), **more}
    before = {name: os.environ.get(name) for name in (*wanted, "AWS_PROFILE", "AWS_SESSION_TOKEN")}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update(wanted)
    # fsspec hands out old instances by their arguments, and those keep their old endpoint.
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run(scene: Scene, proxy: Proxy, out: str, name: str, *, seed: int = 0) -> FaultyMerge:
    """Merge through `proxy`, and verify the output without it."""
    proxy.forget()
    proxy.use(*(rules(name) if name else ()), seed=seed)
    started_s = time.monotonic()
    with pointed_at(proxy.endpoint):
        options = RunOptions(device="cpu", shard_bytes=SHARD_BYTES, memory_bytes=192 << 20)
        summary = merge(scene.config, f"s3://{BUCKET}/{out}", options)
    seconds = time.monotonic() - started_s
    seen, faults = proxy.seen(), proxy.faults()
    proxy.use()
    with pointed_at(scene.endpoint):
        verify(f"s3://{BUCKET}/{out}", recompute=1)
    return FaultyMerge(name, len(seen), faults, seconds, summary, leavings(scene.endpoint, out))


def leavings(endpoint: str, out: str, bucket: str = BUCKET) -> list[str]:
    """Return what a finished run must not leave behind."""
    with contextlib.closing(s3_client(endpoint)) as client:
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{out}/").get("Uploads", ())
        state = client.list_objects_v2(Bucket=bucket, Prefix=f"{out}/.della/").get("Contents", ())
    return [f"upload to {upload['Key']}" for upload in uploads] + [entry["Key"] for entry in state]


def write_config(scene: Scene, path: Path) -> Path:
    """Write the configuration as a file, for the command line."""
    path.write_text(yaml.safe_dump(scene.config.normalized()))
    return path


def figures() -> list[tuple[str, ...]]:
    """Run a merge with every fault, and return a table: its head, then a row each."""
    rows: list[tuple[str, ...]] = [("faults", "requests", "failed", "seconds", "same bytes")]
    with (
        tempfile.TemporaryDirectory() as folder,
        moto_server() as endpoint,
        faulty_proxy(endpoint) as proxy,
    ):
        scene = make_scene(Path(folder), endpoint)
        for i, name in enumerate(("", *FAULTS, MIXED)):
            rows.append(_row(run(scene, proxy, f"out{i}", name), scene))
    return rows


def _row(done: FaultyMerge, scene: Scene) -> tuple[str, ...]:
    same = done.summary.model_digest == scene.model_digest and not done.leavings
    return (
        done.name or "none",
        str(done.num_requests),
        str(sum(done.faults.values())),
        f"{done.seconds:.1f}",
        "yes" if same else "NO",
    )
