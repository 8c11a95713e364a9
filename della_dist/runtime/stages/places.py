"""Where the outputs of stages lie: in a folder beside OUT, on the same store, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from della_dist.errors import OutputError
from della_dist.locations import HUB_PREFIX, is_url, local_path, place
from della_dist.storage.opening import open_output_store

#: What the folder is called after OUT.
SUFFIX = ".stages"
#: URLs of these have a bucket first, beside which nothing lies.
_BUCKETS = ("s3://", "gs://", "az://")


def stages_root(out: str, staging: str | None = None) -> str:
    """Return the folder in which the outputs of the stages of a merge into `out` lie.

    Of an output on the Hub, beside the folder from which it is uploaded.

    Parameters
    ----------
    staging
        See `della_dist.storage.opening.open_output_store`.

    Raises
    ------
    OutputError
        If nothing lies beside `out`: it is a whole bucket, or the root of the file system.
    """
    if out.startswith(HUB_PREFIX):
        return open_output_store(out, staging=staging).shards_location + SUFFIX
    if is_url(out):
        canonical = place(out, is_output=True)
        if canonical.startswith(_BUCKETS) and "/" not in canonical.partition("://")[2]:
            raise OutputError(
                f"{out} is a whole bucket; the outputs of stages lie beside the last one. Choose "
                "an output in a folder of the bucket."
            )
        return out.rstrip("/") + SUFFIX
    path = local_path(out)
    if path.name in ("", ".."):
        path = Path(place(out, is_output=True))
    if not path.name:
        raise OutputError(
            f"{out} is the root of the file system; the outputs of stages lie beside the last one. "
            "Choose another output."
        )
    return f"{path}{SUFFIX}"


def stage_places(
    names: Sequence[str], out: str | None, staging: str | None = None
) -> dict[str, str]:
    """Return where the output of every stage is, by name; its name where OUT is not known."""
    if out is None:
        return dict(zip(names, names, strict=True))
    if not names:
        return {}
    root = stages_root(out, staging)
    return {name: f"{root}/{name}" for name in names}


def disk_of(location: str) -> int | None:
    """Return which file system a local output is or will be on; None of an object store."""
    if is_url(location):
        return None
    path = local_path(location).absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev
