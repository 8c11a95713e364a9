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

from della_dist.errors import ConfigError
from della_dist.version import __version__

if TYPE_CHECKING:
    from della_dist.config import MergeConfig
    from della_dist.runtime.run import MergeSummary
    from della_dist.runtime.verify import VerifySummary

    Config = MergeConfig | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["__version__", "merge", "plan", "verify"]


def merge(
    config: Config,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    **options: Any,  # noqa: ANN401
) -> MergeSummary:
    """Merge the checkpoints that `config` names into `out`.

    Parameters
    ----------
    config
        The path of a YAML file, its content as a mapping, or a loaded configuration.
    out
        The output, a directory or a URL: new, empty, or that of the same merge, which is then
        continued.
    seed
        Of the random words, instead of the configuration's.
    **options
        As in `della_dist.runtime.options.RunOptions`: ``engine``, ``workers``, ``threads``,
        ``memory_bytes`` and ``shard_bytes`` (numbers, or text such as ``256MiB``), ``device``,
        ``restart``, ``verify_resumed``, ``lease``, ``address``.

    Returns
    -------
    MergeSummary
        Model digest, counts, bytes, seconds.

    Raises
    ------
    DellaDistError
        See `della_dist.errors`: `ConfigError`, `InputError` and `OutputError` if the merge is
        refused, before anything is written; `StorageError` if it fails and may be continued.
    TypeError
        If there is no option of that name.
    """
    from della_dist.runtime.options import options_from
    from della_dist.runtime.run import merge as run

    chosen = options_from(options)
    return run(_load(config, seed), _location(out), chosen)


def plan(
    config: Config,
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int | None = None,
    **options: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return what `merge` would do and take, after all its checks; writes nothing.

    Parameters and errors are those of `merge`. The keys are those of ``della-dist plan --json``.
    """
    from della_dist.runtime.describe import describe_plan
    from della_dist.runtime.options import options_from

    chosen = options_from(options)
    return describe_plan(_load(config, seed), None if out is None else _location(out), chosen)


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

    if isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 0:
        raise ConfigError(f"recompute is {recompute!r}; it must be a number of tensors.")
    return run(_location(out), recompute=recompute)


def _load(config: Config, seed: int | None) -> MergeConfig:
    from della_dist.config import MergeConfig, config_from_mapping, load_config

    if isinstance(config, (str, os.PathLike)):
        loaded = load_config(Path(config))
    else:
        loaded = config if isinstance(config, MergeConfig) else config_from_mapping(config)
    return loaded if seed is None else loaded.with_seed(seed)


def _location(out: str | os.PathLike[str]) -> str:
    text = os.fspath(out) if isinstance(out, (str, os.PathLike)) else out
    if not isinstance(text, str):
        raise ConfigError(f"the output is {out!r}; it must be a path or a URL.")
    return text
