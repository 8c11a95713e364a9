"""della_dist: out-of-core DELLA merging of very large checkpoints, the same bytes every time.

`merge`, `plan`, `check` and `verify` are the commands of the same names as functions;
`della_dist.ops` has the functions that merge one tensor. Importing this module is cheap: everything
heavy is imported when a function is called or a type is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from della_dist.errors import (
    ConfigError,
    DellaDistError,
    FaultError,
    InputChangedError,
    InputError,
    MissingObjectError,
    OutputError,
    RunError,
    StorageError,
    TensorDataError,
    UnreachableError,
    UnsupportedError,
    VerificationError,
)
from della_dist.version import __version__

if TYPE_CHECKING:
    from della_dist.config import MergeConfig, config_from_mapping, load_config
    from della_dist.report.check import CheckSummary, ModelCheck, Oddity, PairCheck
    from della_dist.report.plan import PlannedFile, PlannedTask, PlanSummary, PlanTotal
    from della_dist.report.progress import (
        Goal,
        ShardUnderWay,
        Snapshot,
        Watch,
        WorkerCounts,
        WorkerStatus,
    )
    from della_dist.report.summary import MergeSummary, VerifySummary
    from della_dist.runtime.options import RunOptions

    Config = MergeConfig | Mapping[str, Any] | str | os.PathLike[str]

__all__ = [
    "CheckSummary",
    "ConfigError",
    "DellaDistError",
    "FaultError",
    "Goal",
    "InputChangedError",
    "InputError",
    "MergeConfig",
    "MergeSummary",
    "MissingObjectError",
    "ModelCheck",
    "Oddity",
    "OutputError",
    "PairCheck",
    "PlanSummary",
    "PlanTotal",
    "PlannedFile",
    "PlannedTask",
    "RunError",
    "RunOptions",
    "ShardUnderWay",
    "Snapshot",
    "StorageError",
    "TensorDataError",
    "UnreachableError",
    "UnsupportedError",
    "VerificationError",
    "VerifySummary",
    "Watch",
    "WorkerCounts",
    "WorkerStatus",
    "__version__",
    "check",
    "config_from_mapping",
    "load_config",
    "merge",
    "plan",
    "verify",
]

#: Where what is exported comes from, when it is asked for.
_LAZY = {
    **dict.fromkeys(("MergeConfig", "config_from_mapping", "load_config"), "config"),
    **dict.fromkeys(("CheckSummary", "ModelCheck", "Oddity", "PairCheck"), "report.check"),
    **dict.fromkeys(("PlanSummary", "PlanTotal", "PlannedFile", "PlannedTask"), "report.plan"),
    **dict.fromkeys(
        ("Goal", "ShardUnderWay", "Snapshot", "Watch", "WorkerCounts", "WorkerStatus"),
        "report.progress",
    ),
    "RunOptions": "runtime.options",
    **dict.fromkeys(("MergeSummary", "VerifySummary"), "report.summary"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a type that is asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def merge(
    config: Config,
    out: str | os.PathLike[str],
    options: RunOptions | None = None,
    *,
    watch: Watch | None = None,
) -> MergeSummary:
    """Merge the checkpoints that `config` names into `out`.

    Parameters
    ----------
    config
        The path of a YAML file, its content as a mapping, or a loaded configuration.
    out
        The output, a directory or a URL: new, empty, or that of the same merge, which is then
        continued.
    options
        How to run it; None: the defaults.
    watch
        Called once before the work starts, with what there is to do and a function that returns
        where the run is, whenever it is called and from any thread. Of several documents, called
        so for each that is merged (`Goal.stage`).

    Returns
    -------
    MergeSummary
        Model digest, counts, bytes, seconds.

    Raises
    ------
    DellaDistError
        See `della_dist.errors`: `ConfigError`, `InputError` and `OutputError` if the merge is
        refused, before anything is written; `StorageError` and `RunError` if it fails and may be
        continued.
    """
    from della_dist.runtime.run import merge as run

    if watch is not None and not callable(watch):
        raise ConfigError(f"watch is {watch!r}; it must be a function.")
    return run(_load(config), _location(out), _options(options), watch=watch)


def plan(
    config: Config, out: str | os.PathLike[str] | None = None, options: RunOptions | None = None
) -> PlanSummary:
    """Return what `merge` would do and take, after all its checks; writes nothing.

    Parameters and errors are those of `merge`.
    """
    from della_dist.runtime.describe import describe_plan

    return describe_plan(_load(config), None if out is None else _location(out), _options(options))


def check(
    config: Config,
    out: str | os.PathLike[str] | None = None,
    *,
    sample_bytes: int | str = 256 << 20,
) -> CheckSummary:
    """Return what a sample of the weights says of the models: whether they share a backbone.

    Parameters
    ----------
    config
        As of `merge`.
    out
        The output of the merge, which is compared with base and experts as well; None: it is not.
    sample_bytes
        What is read at most of the weights, of all models of a merge together: a mebibyte or
        more, also as text such as ``64MiB``.

    Raises
    ------
    DellaDistError
        What a merge would be refused for before it looks at weights; if `out` is no output of
        it.
    """
    from della_dist.runtime.check import check as run
    from della_dist.runtime.options import checked_size

    size = checked_size("sample_bytes (--sample)", sample_bytes, 1 << 20)
    return run(_load(config), None if out is None else _location(out), sample_bytes=size)


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

    if isinstance(recompute, bool) or not isinstance(recompute, SupportsIndex) or recompute < 0:
        raise ConfigError(f"recompute is {recompute!r}; it must be a number of tensors.")
    return run(_location(out), recompute=int(recompute))


def _load(config: Config) -> MergeConfig:
    from della_dist.config import MergeConfig, config_from_mapping, load_config

    if isinstance(config, (str, os.PathLike)):
        return load_config(Path(_text_path(config, "the configuration")))
    return config if isinstance(config, MergeConfig) else config_from_mapping(config)


def _location(out: str | os.PathLike[str]) -> str:
    return _text_path(out, "the output")


def _text_path(path: object, what: str) -> str:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {path!r}; its path must be text.")
    return text


def _options(options: RunOptions | None) -> RunOptions:
    from della_dist.runtime.options import RunOptions

    if options is None:
        return RunOptions()
    if not isinstance(options, RunOptions):
        raise ConfigError(f"the options are {options!r}; they must be a RunOptions.")
    return options
