"""Check an output against its manifest, and against its inputs."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from della_dist.config import config_from_mapping
from della_dist.errors import InputError, VerificationError
from della_dist.locations import absolute, is_url
from della_dist.planning.build import MergePlan
from della_dist.planning.fingerprint import (
    METHOD_VERSIONS,
    OUTPUT_VERSION,
    explain_difference,
    identity,
    input_differences,
)
from della_dist.planning.layout import INDEX_NAME
from della_dist.report.summary import VerifySummary
from della_dist.runtime.budget import budget
from della_dist.runtime.in_memory import merging
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.checksums import check_shard, file_sha256
from della_dist.runtime.output.consistency import (
    check_header,
    check_index,
    check_links,
    check_table,
)
from della_dist.runtime.output.finished import open_finished
from della_dist.runtime.output.foreign import foreign_weights
from della_dist.runtime.output.records import CARD_NAME
from della_dist.runtime.stages.places import stage_places
from della_dist.runtime.task.merge import digest_tensor
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.local.bus_errors import survived
from della_dist.storage.manifest import MANIFEST_NAME, TensorRecord
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from della_dist.storage.tensor_table import TENSORS_NAME, load_tensors
from della_dist.wording import few

log = logging.getLogger("della_dist.run")

#: Differences named in the error; the rest is counted.
MAX_NAMED = 8


@survived()
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
    if is_url(out):
        free_large_buffers_at_once()
    store, manifest = open_finished(out)
    names = [f["name"] for f in (*manifest["shards"], *manifest["files"])]
    differences = check_links(store, [*names, MANIFEST_NAME])
    for name in foreign_weights(store, names):
        differences.append(f"{name} is not of this output, but would be loaded with it or instead")
    changed, edited, bytes_read = _check_files(store, manifest["files"])
    differences += changed
    tensors: list[TensorRecord] | None = None
    if not any(TENSORS_NAME in d for d in differences):
        try:
            tensors = load_tensors(store.read(TENSORS_NAME))
        except VerificationError:
            differences.append(f"{TENSORS_NAME} is no table of the tensors")
    if tensors is not None:
        differences += check_table(manifest, tensors)
        if not any(INDEX_NAME in d for d in differences):
            differences += check_index(store, manifest, tensors)
    shard_differences, shard_bytes = _check_shards(store, manifest["shards"], tensors)
    differences += shard_differences
    if differences:
        shown = few(differences, MAX_NAMED, separator="; ", longest=1000)
        raise VerificationError(
            f"{out} is not as it was written: {shown}. "
            "Restore it from a copy, or run the merge again with --verify-resumed."
        )
    assert tensors is not None
    recomputed = _recompute(out, manifest, tensors, recompute) if recompute else ()
    return VerifySummary(
        output=str(out),
        model_digest=manifest["model_digest"],
        num_files=len(names) + 1 - len(edited),
        num_tensors=len(tensors),
        bytes_read=bytes_read + shard_bytes,
        recomputed=recomputed,
        edited=edited,
        elapsed_s=time.monotonic() - started_s,
    )


def _check_files(
    store: Store, files: list[Mapping[str, Any]]
) -> tuple[list[str], tuple[str, ...], int]:
    """Return what is different about the small files, which were edited, and the bytes read."""
    differences = []
    edited = []
    total = 0
    for file in files:
        name = file["name"]
        if not store.exists(name):
            differences.append(f"{name} is missing")
            continue
        size_bytes = store.stat(name).size_bytes
        total += size_bytes
        is_card = name == CARD_NAME
        if size_bytes != file["size_bytes"] and not is_card:
            differences.append(f"{name} has {size_bytes} bytes, not {file['size_bytes']}")
        elif file_sha256(store, name) != file["sha256"]:
            if is_card:
                edited.append(name)
            else:
                differences.append(f"{name} was changed")
    return differences, tuple(edited), total


def _check_shards(
    store: Store, shards: list[Mapping[str, Any]], tensors: list[TensorRecord] | None
) -> tuple[list[str], int]:
    """Return what is different about the shards, and the bytes read; no table: bytes alone."""
    mine: dict[str, list[TensorRecord]] = {}
    for tensor in tensors or ():
        mine.setdefault(tensor.shard, []).append(tensor)

    def check(shard: Mapping[str, Any]) -> list[str]:
        name = shard["name"]
        changed = check_shard(store, shard, mine.get(name, []))
        if not changed and tensors is not None:
            changed = check_header(store, name, mine.get(name, []))
        log.debug("%s %s", name, "is as it was written" if not changed else "differs")
        return changed

    with ThreadPoolExecutor(budget(RunOptions()).threads) as pool:
        found = [difference for lines in pool.map(check, shards) for difference in lines]
    return found, sum(shard["size_bytes"] for shard in shards)


def _recompute(
    out: str, manifest: Mapping[str, Any], tensors: list[TensorRecord], count: int
) -> tuple[str, ...]:
    plan = _plan_of(out, manifest)
    chosen = sorted(random.sample(tensors, min(count, len(tensors))), key=lambda t: t.name)
    layout = {t.name: t for shard in plan.shards for t in shard.tensors}
    with merging(plan, RunOptions(workers=1)) as context:
        differences = [
            f"tensor {tensor.name} in shard {tensor.shard}"
            for tensor in chosen
            if digest_tensor(context, layout[tensor.name]) != tensor.blake3
        ]
    if differences:
        found = (
            f"{out}: recomputed from the inputs, {few(differences, MAX_NAMED)} "
            f"({len(differences)} of {len(chosen)}) come out differently. "
        )
        other = explain_difference(manifest.get("arithmetic"), identity(plan).get("arithmetic"))
        if other:
            raise VerificationError(
                f"{found}It was merged on another kind of machine ({few(other, separator='; ')}), "
                "where last digits of singular values are others: recompute it on one like that."
            )
        raise VerificationError(
            f"{found}The output was not made from these inputs by this version: merge again with "
            "--restart."
        )
    return tuple(t.name for t in chosen)


def _plan_of(out: str, manifest: Mapping[str, Any]) -> MergePlan:
    method = str(manifest["config"].get("merge_method"))
    versions = manifest["output_version"], manifest.get("method_version")
    if versions != (OUTPUT_VERSION, METHOD_VERSIONS.get(method)):
        raise InputError(
            f"{out} was written by della_dist {manifest['tool']['version']}, whose bytes this "
            "version does not reproduce. Recompute it with that version."
        )
    config = config_from_mapping(manifest["config"], f"the configuration in {out}/{MANIFEST_NAME}")
    moved = _moved_stages(out, manifest)
    config = config.with_locations({at: moved.get(at, at) for at in config.locations()})
    try:
        plan = open_plan(config, shard_bytes=manifest["shard_bytes"])
    except InputError as error:
        raise InputError(
            f"{out} cannot be recomputed: {error}{_of_stages(out, manifest)}"
        ) from error
    now = identity(plan)
    differences = input_differences(manifest["inputs"], now["inputs"])
    differences += explain_difference(manifest.get("stage"), now["stage"], "stage")
    if differences:
        shown = few(differences, 4, separator="; ", longest=1000)
        raise InputError(
            f"{out} cannot be recomputed, its inputs were changed: {shown}. Put back the files it "
            "was merged from."
        )
    return plan


def _missing_stages(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of stages of the same run that are not where they were."""
    return [
        stage
        for stage in manifest.get("stages", ())
        if not open_store(stage["location"]).exists(MANIFEST_NAME)
    ]


def _moved_stages(out: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return where stages are now that were moved together with the output, by where they were."""
    missing = _missing_stages(manifest)
    if not missing:
        return {}
    places = stage_places([stage["name"] for stage in missing], out)
    return {
        stage["location"]: absolute(places[stage["name"]])
        for stage in missing
        if open_store(places[stage["name"]]).exists(MANIFEST_NAME)
    }


def _of_stages(out: str, manifest: Mapping[str, Any]) -> str:
    """Return what to do where stages of the same run are gone; nothing where none is."""
    moved = _moved_stages(out, manifest)
    names = [s["name"] for s in _missing_stages(manifest) if s["location"] not in moved]
    if not names:
        return ""
    return (
        f" It was merged of stages ({few(names)}), which are removed when all is done: the same "
        "merge with --keep-stages makes them again, and keeps them."
    )
