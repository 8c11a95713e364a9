"""Open the checkpoints of a configuration, and plan their merge."""

from __future__ import annotations

import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from della_dist.config import MergeConfig
from della_dist.errors import InputError, each
from della_dist.locations import HUB_PREFIX, is_url, model_and_adapters, of_parts, place
from della_dist.planning.build import MergePlan, build_plan
from della_dist.report.text import format_bytes
from della_dist.runtime.adapted_inputs import open_inputs
from della_dist.runtime.companions.carried import Companions, find_companions
from della_dist.runtime.companions.experts import compare_files
from della_dist.runtime.companions.names import never_read
from della_dist.runtime.companions.vocabularies import needed_vocabularies
from della_dist.runtime.task.blas import arithmetic
from della_dist.runtime.task.content import StoredContent
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.upstream import (
    NO_STAGES,
    StageContent,
    Stages,
    records_behind,
    store_of,
)
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.checkpoint import check_directory, with_samples
from della_dist.storage.opening import DEFAULT_CONNECTIONS, open_store, resolved
from della_dist.storage.shard_files import torch_names
from della_dist.wording import plural

log = logging.getLogger("della_dist.run")


def open_plan(
    config: MergeConfig,
    *,
    shard_bytes: int | None = None,
    with_content: bool = True,
    stages: Stages = NO_STAGES,
) -> MergePlan:
    """Read the headers of every checkpoint that `config` names, check them, and plan the merge.

    Reads tensor data only for samples, and where bytes must be compared: of embeddings and output
    heads.

    Parameters
    ----------
    config
        The validated configuration.
    shard_bytes
        Data bytes of an output shard at most; None for the default.
    with_content
        Whether local shards are sampled, so that the plan has an identity: a mebibyte of each.
    stages
        Those of the inputs that the same run makes, by location.

    Raises
    ------
    InputError
        If a checkpoint is malformed, is given twice, or does not fit the others.
    ConfigError
        If parameters are out of bounds for some tensor.
    """
    written = config.locations()
    config = located(config, stages)
    # A reference that has no part in the mathematics may be an expert, too.
    first = 0 if config.has_base else len(written) - len(config.models)
    _refuse_repeated(
        list(zip(written, config.locations(), strict=True))[first:],
        "Name it in one way"
        if config.slices
        else "Merging a checkpoint with itself counts it "
        "twice: name each once, and give it a larger weight instead",
    )

    content = StageContent(StoredContent(InputStores(DEFAULT_CONNECTIONS).get), stages)
    stores = partial(store_of, stages=stages)
    inputs = open_inputs(config, stages, content)
    config, checkpoints = inputs.config, inputs.checkpoints
    for one in checkpoints:
        size = format_bytes(sum(shard.size_bytes for shard in one.shards))
        counts = plural(len(one.tensors), "tensor"), plural(len(one.shards), "file")
        log.debug("opened %s: %s in %s, %s", one.location, *counts, size)
    has_base = config.base_model is not None
    plan = build_plan(
        config,
        checkpoints[0] if has_base else None,
        checkpoints[has_base:],
        shard_bytes=shard_bytes,
        content=content,
        vocabularies=needed_vocabularies(config, inputs.models(), stores),
        adapted=inputs.adapted,
        others=inputs.others,
        layouts=inputs.layouts,
    )
    # Beside an adapter, files of the base would be taken for those of a model.
    is_model = plan.adapter is None
    companions = find_companions(plan, stores) if is_model else Companions((), ())
    plan = replace(
        plan,
        companions={r.name: r.sha256 for r in companions.records},
        companion_bytes={r.name: r.size_bytes for r in companions.records},
        arithmetic=arithmetic() if config.method.is_decomposed else {},
        stages=records_behind([c.location for c in plan.inputs], stages),
    )
    plan = replace(plan, file_notes=(*companions.notes, *compare_files(plan, stores)))
    return _with_content(plan, stages) if with_content else plan


def downloaded(config: MergeConfig, stages: Collection[str]) -> MergeConfig:
    """Return `config` with its checkpoints on the Hub pinned, once they are in the Hub's cache.

    Parameters
    ----------
    config
        Of one merge.
    stages
        What it calls the outputs of others of the same run.

    Raises
    ------
    InputError, StorageError
        If one is not to be had.
    """
    config = located(config, stages)
    names = [name for location in config.locations() for name in model_and_adapters(location)]
    for name in names:  # each downloads several files at once
        if name.startswith(HUB_PREFIX):
            from della_dist.storage.hub.download import download

            store = open_store(name)
            download(name, never_read(store.list(), torch_names(store.children("")[0])))
    return config


def located(config: MergeConfig, stages: Collection[str]) -> MergeConfig:
    """Return the configuration with checkpoints on the Hub pinned to the commit of this moment.

    Raises
    ------
    InputError
        If any of them is not there.
    """
    names = list(dict.fromkeys(config.locations()))

    def found(part: str) -> str:
        if part in stages:
            return part
        pinned = resolved(part)
        if not is_url(pinned):  # what is not there is said of all, wherever it should be
            check_directory(pinned)
        return pinned

    with ThreadPoolExecutor(len(names)) as pool:
        pinned = each(lambda name: of_parts(name, found), names, pool.map)
    return config.with_locations(dict(zip(names, pinned, strict=True)))


def _with_content(plan: MergePlan, stages: Stages) -> MergePlan:
    def sampled(checkpoint: CheckpointIndex) -> CheckpointIndex:
        stage = stages.get(checkpoint.location)
        return checkpoint if stage and stage.planned else with_samples(checkpoint)

    return replace(
        plan,
        base=None if plan.base is None else sampled(plan.base),
        experts=tuple(map(sampled, plan.experts)),
        others=tuple(map(sampled, plan.others)),
    )


def _refuse_repeated(named: list[tuple[str, str]], advice: str) -> None:
    """Refuse locations, each as it is written and as it is found, that are one place."""
    seen: dict[str, str] = {}
    for written, location in named:
        real = place(location, follow_links=True)
        if real in seen:
            raise InputError(f"{written} and {seen[real]} are the same checkpoint. {advice}.")
        seen[real] = written
