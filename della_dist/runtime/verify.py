"""Check an output against its manifest, and against its inputs."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from della_dist.config import config_from_mapping
from della_dist.errors import InputError, OutputError, VerificationError
from della_dist.plan.build import MergePlan
from della_dist.plan.fingerprint import OUTPUT_VERSION, explain_difference, identity
from della_dist.runtime.backend import choose_backend
from della_dist.runtime.checksums import check_shard
from della_dist.runtime.context import MergeContext
from della_dist.runtime.inputs import InputStores, open_plan
from della_dist.runtime.meter import Meter
from della_dist.runtime.options import RunOptions, budget, connections, with_remote
from della_dist.runtime.worker import digest_tensor
from della_dist.storage.manifest import (
    MANIFEST_NAME,
    TENSORS_NAME,
    TensorRecord,
    load_manifest,
    load_tensors,
    model_digest,
)
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store

#: Differences named in the error; the rest is counted.
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """What was found to be as written."""

    output: str
    model_digest: str
    num_files: int
    num_tensors: int
    bytes_read: int
    recomputed: tuple[str, ...]
    """Names of the tensors that were recomputed from the inputs."""
    elapsed_s: float


def verify(out: str, *, recompute: int = 0) -> VerifySummary:
    """Check every byte of the output in `out`; recompute `recompute` random tensors.

    Raises
    ------
    OutputError
        If `out` holds no finished output.
    VerificationError
        If something is not as it was written; names files, tensors and shards.
    InputError
        If tensors are to be recomputed and the inputs are gone or were changed.
    """
    started_s = time.monotonic()
    store = open_store(out)
    if not store.exists(MANIFEST_NAME):
        raise OutputError(
            f"{out} holds no finished output of della-dist ({MANIFEST_NAME} is missing). "
            "If a merge into it was interrupted, run that merge again first."
        )
    manifest = load_manifest(store.read(MANIFEST_NAME))
    differences, bytes_read = _check_files(store, manifest["files"])
    tensors: list[TensorRecord] = []
    if not any(TENSORS_NAME in d for d in differences):
        tensors = load_tensors(store.read(TENSORS_NAME))
        if model_digest(tensors) != manifest["model_digest"]:
            differences.append(f"{TENSORS_NAME} does not have the manifest's model digest")
    with ThreadPoolExecutor(budget(RunOptions()).threads) as pool:
        mine: dict[str, list[TensorRecord]] = {}
        for tensor in tensors:
            mine.setdefault(tensor.shard, []).append(tensor)
        checks = [
            pool.submit(check_shard, store, shard, mine.get(shard["name"], []))
            for shard in manifest["shards"]
        ]
        for shard, check in zip(manifest["shards"], checks, strict=True):
            bytes_read += shard["size_bytes"]
            differences += check.result()
    if differences:
        shown = "; ".join(differences[:MAX_NAMED])
        more = len(differences) - MAX_NAMED
        raise VerificationError(
            f"{out} is not as it was written: {shown}{f'; and {more} more' if more > 0 else ''}. "
            "Restore it from a copy, or merge again with --restart."
        )
    recomputed = _recompute(out, manifest, tensors, recompute) if recompute else ()
    return VerifySummary(
        output=str(out),
        model_digest=manifest["model_digest"],
        num_files=len(manifest["files"]) + len(manifest["shards"]) + 1,
        num_tensors=len(tensors),
        bytes_read=bytes_read,
        recomputed=recomputed,
        elapsed_s=time.monotonic() - started_s,
    )


def _check_files(store: Store, files: list[Mapping[str, Any]]) -> tuple[list[str], int]:
    differences = []
    total = 0
    for file in files:
        name = file["name"]
        if not store.exists(name):
            differences.append(f"{name} is missing")
            continue
        data = store.read(name)
        total += len(data)
        if len(data) != file["size_bytes"]:
            differences.append(f"{name} has {len(data)} bytes, not {file['size_bytes']}")
        elif hashlib.sha256(data).hexdigest() != file["sha256"]:
            differences.append(f"{name} was changed")
    return differences, total


def _recompute(
    out: str, manifest: Mapping[str, Any], tensors: list[TensorRecord], count: int
) -> tuple[str, ...]:
    plan = _plan_of(out, manifest)
    chosen = sorted(random.sample(tensors, min(count, len(tensors))), key=lambda t: t.name)
    memory = with_remote(budget(RunOptions(workers=1)), plan, None)
    layout = {t.name: t for shard in plan.shards for t in shard.tensors}
    with ThreadPoolExecutor(memory.threads) as compute:
        context = MergeContext(
            plan,
            choose_backend("auto"),
            memory,
            compute,
            Meter(),
            threading.Event(),
            InputStores(connections(memory)),
        )
        differences = [
            f"tensor {tensor.name} in shard {tensor.shard}"
            for tensor in chosen
            if digest_tensor(context, layout[tensor.name]) != tensor.blake3
        ]
    if differences:
        raise VerificationError(
            f"{out}: recomputed from the inputs, {', '.join(differences[:MAX_NAMED])} "
            f"({len(differences)} of {len(chosen)}) come out differently. The output was not made "
            "from these inputs by this version: merge again with --restart."
        )
    return tuple(t.name for t in chosen)


def _plan_of(out: str, manifest: Mapping[str, Any]) -> MergePlan:
    if manifest["output_version"] != OUTPUT_VERSION:
        raise InputError(
            f"{out} was written by della_dist {manifest['tool']['version']}, whose bytes this "
            "version does not reproduce. Recompute it with that version."
        )
    config = config_from_mapping(manifest["config"], f"the configuration in {out}/{MANIFEST_NAME}")
    plan = open_plan(config, shard_bytes=manifest["shard_bytes"])
    now = identity(plan)
    differences = explain_difference(manifest["inputs"], now["inputs"], "inputs")
    differences += explain_difference(manifest.get("stage"), now["stage"], "stage")
    if differences:
        raise InputError(
            f"{out} cannot be recomputed, its inputs were changed: {'; '.join(differences[:4])}. "
            "Put back the files it was merged from."
        )
    return plan
