"""della_dist: out-of-core DELLA merging of very large checkpoints, the same bytes every time.

`merge`, `plan` and `verify` are the commands of the same names as functions; `della_dist.ops` has
the functions that merge one tensor. Importing this module is cheap: everything heavy is imported
when a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# First of all: importing a subpackage sets the attribute of its name here, once, and from then on
# `plan` is to be the function. Modules are reached by their full names all the same.
import della_dist.plan  # noqa: F401
from della_dist.version import __version__

if TYPE_CHECKING:
    from della_dist.config import MergeConfig
    from della_dist.runtime.run import MergeSummary
    from della_dist.runtime.verify import VerifySummary

    Config = MergeConfig | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["__version__", "merge", "plan", "verify"]


def merge(config: Config, out: str | os.PathLike[str], **options: Any) -> MergeSummary:  # noqa: ANN401
    """Merge the checkpoints that `config` names into `out`.

    Parameters
    ----------
    config
        The path of a YAML file, its content as a mapping, or a loaded configuration.
    out
        The output, a directory or a URL: new, empty, or that of the same merge, which is then
        continued.
    **options
        As in `della_dist.runtime.run.RunOptions`: ``workers``, ``threads``, ``memory_bytes``,
        ``device``, ``shard_bytes``, ``restart``.

    Returns
    -------
    MergeSummary
        Model digest, counts, bytes, seconds.

    Raises
    ------
    DellaDistError
        See `della_dist.errors`: `ConfigError`, `InputError` and `OutputError` if the merge is
        refused, before anything is written; `StorageError` if it fails and may be continued.
    """
    from della_dist.runtime.options import RunOptions
    from della_dist.runtime.run import merge as run

    chosen = RunOptions(**options)
    return run(_load(config), os.fspath(out), chosen)


def plan(
    config: Config,
    out: str | os.PathLike[str] | None = None,
    **options: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return what `merge` would do and take, after all its checks; writes nothing.

    Parameters and errors are those of `merge`. The keys are those of ``della-dist plan --json``.
    """
    from della_dist.runtime.options import RunOptions
    from della_dist.runtime.plan import describe_plan

    chosen = RunOptions(**options)
    return describe_plan(_load(config), None if out is None else os.fspath(out), chosen)


def verify(out: str | os.PathLike[str], *, recompute: int = 0) -> VerifySummary:
    """Check every byte of the output in `out`; merge `recompute` random tensors again and compare.

    Raises
    ------
    VerificationError
        If something is not as it was written.
    DellaDistError
        If there is nothing to verify, or the inputs to recompute from are gone.
    """
    from della_dist.runtime.verify import verify as run

    return run(os.fspath(out), recompute=recompute)


def _load(config: Config) -> MergeConfig:
    from della_dist.config import MergeConfig, config_from_mapping, load_config

    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return config_from_mapping(config)
    return load_config(Path(config))
