"""What lies in the output of a search: nothing, what the search merged itself, or another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from della_dist.config import MergeConfig
from della_dist.errors import OutputError, VerificationError
from della_dist.locations import local_path
from della_dist.planning.fingerprint import differences, identity
from della_dist.runtime.open_plan import downloaded, open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.records import PLAN_KEY, load_run
from della_dist.runtime.search.trials import Trials
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.storage.opening import open_output_store
from della_dist.storage.store import STATE_PREFIX


def merge_identity(config: MergeConfig, options: RunOptions) -> dict[str, Any]:
    """Return the identity of the merge of a configuration, as `options` change it."""
    config = options.applied_to(config)
    if options.download:
        config = downloaded(config, ())
    return identity(open_plan(config, shard_bytes=options.shard_bytes))


def to_discard(
    out: str,
    trials: Trials,
    config_of: Callable[[int], MergeConfig],
    options: RunOptions,
    best: int | None = None,
) -> bool:
    """Return whether what is in the output must give way to the best merge.

    Parameters
    ----------
    out
        A local directory.
    trials
        They tell what the search has merged.
    config_of
        What a trial merges, by its number.
    options
        How to merge.
    best
        Number of the trial that is to be merged now; None: it is not known yet.

    Raises
    ------
    OutputError
        If it is not what the search merged.
    """
    place = local_path(out)
    if options.restart or not place.exists():
        return options.restart
    if place.is_dir():
        names = {one.name for one in place.iterdir()}
        if not names:
            return False
        digest, recorded = _recorded(out)

        def holds(number: int) -> bool:
            assert recorded is not None
            now = merge_identity(config_of(number), options)
            return not differences({key: recorded.get(key) for key in now}, now)

        if recorded is None:  # killed before it could say what it merges
            if trials.written and names == {STATE_PREFIX.rstrip("/")}:
                return False
        elif best is not None and holds(best):
            return False
        elif (digest is not None and digest == trials.digest) or any(map(holds, trials.written)):
            return True
    raise OutputError(
        f"{out} is there already, and not by this search. Name another output, or remove what "
        "is there (--restart: a merge of della-dist)."
    )


def _recorded(out: str) -> tuple[str | None, Mapping[str, Any] | None]:
    """Return the digest of a complete merge, and what it or an unfinished one is of."""
    store = open_output_store(out)
    try:
        if store.exists(MANIFEST_NAME):
            manifest = load_manifest(store.read(MANIFEST_NAME))
            return manifest["model_digest"], manifest
        if store.exists(PLAN_KEY):
            return None, load_run(store).identity
    except (VerificationError, OutputError):  # damaged: nobody knows whose it is
        return None, {}
    return None, None
