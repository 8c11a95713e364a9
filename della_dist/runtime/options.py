"""How a merge is run: said once, for Python and for the command line."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from della_dist.errors import ConfigError
from della_dist.locations import is_url
from della_dist.planning.memory import DEFAULT_ALLOWED_MEM, MIN_ALLOWED_MEM, MIN_GPU_MEM
from della_dist.report.text import parse_size
from della_dist.wording import plural

if TYPE_CHECKING:
    from della_dist.config import MergeConfig

Engine: TypeAlias = Literal["auto", "local", "ray"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]

#: Workers, and threads of one: more are a slip of the hand.
MAX_PARALLEL = 1024


def _option(
    said: str, default: object, *, flag: str = "", metavar: str = "", **bounds: object
) -> Any:  # noqa: ANN401
    """Return a field that is an option of the command line, too.

    Parameters
    ----------
    said
        What it is, in a sentence.
    flag
        What the command line calls it, where that is not its name.
    metavar
        Of the command line: what is to be written there; empty for a switch.
    bounds
        ``choices``, or ``least`` and ``most`` of a number.
    """
    facts = {"said": said, "flag": flag, "metavar": metavar, **bounds}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a merge: the options of the command line, under the same names but four.

    ``memory_bytes`` is ``--memory``, ``shard_bytes`` is ``--shard-size`` (these and ``gpu_memory``
    also take text such as ``256MiB``), ``lease=False`` is ``--no-lease``, and ``check=False`` is
    ``--no-check``. `seed` alone changes what is computed; `shard_bytes` says in which files it
    lies.

    Raises
    ------
    ConfigError
        If one of them is of the wrong kind, or out of bounds.
    """

    engine: Engine = _option(
        "Where the merge runs: in this process (local), or on a Ray cluster; auto: on Ray where "
        "an address is given.",
        "auto",
        choices=get_args(Engine),
    )
    address: str | None = _option(
        "Ray cluster: auto, local, ray://HOST:10001 or HOST:PORT.  [default: one that runs, else "
        "one is started here]",
        None,
        metavar="TEXT",
    )
    locality: tuple[str, ...] = _option(
        "Ray nodes with this label have these input files on their own disks.",
        (),
        metavar="GLOB:KEY=VALUE",
    )
    workers: int | None = _option(
        "Shards merged at once; with ray: actors.  [default: 2; with ray as many as fit]",
        None,
        metavar="INTEGER",
        least=1,
        most=MAX_PARALLEL,
    )
    threads: int | None = _option(
        "Compute threads; with ray: of an actor.  [default: all cores; with ray 8 at most]",
        None,
        metavar="INTEGER",
        least=1,
        most=MAX_PARALLEL,
    )
    memory_bytes: int = _option(
        "Budget for buffers; with ray: of an actor.  [default: 1GiB]",
        DEFAULT_ALLOWED_MEM,
        flag="--memory",
        metavar="SIZE",
        least=MIN_ALLOWED_MEM,
    )
    device: Device = _option(
        "Where tensors are merged; auto: on a CUDA device where there is one.",
        "auto",
        choices=get_args(Device),
    )
    gpu_memory: int | None = _option(
        "Budget of each GPU's own memory, where one is used.  [default: 0.8 of what is free]",
        None,
        metavar="SIZE",
        least=MIN_GPU_MEM,
    )
    seed: int | None = _option(
        "Seed of the random words, instead of the configuration's.",
        None,
        metavar="INTEGER",
        least=0,
        most=(1 << 64) - 1,
    )
    shard_bytes: int | None = _option(
        "Largest output shard.  [default: from the output's size]",
        None,
        flag="--shard-size",
        metavar="SIZE",
        least=1,
    )
    keep_stages: bool = _option(
        "Keep the outputs of stages, in the folder OUT.stages, when all is done.", False
    )
    restart: bool = _option("Discard what an earlier run left in OUT, its stages included.", False)
    verify_resumed: bool = _option(
        "Read the shards of an earlier run whole, and merge again those that were altered.",
        False,
    )
    public: bool = _option(
        "Let everybody see the repository that is made on the Hugging Face Hub (hf://...).",
        False,
    )
    staging: str | None = _option(
        "Where shards for the Hub wait to be uploaded; with ray: on a disk that all nodes share.  "
        "[default: below HF_HOME]",
        None,
        metavar="DIR",
    )
    check: bool = _option(
        "Do not look at a sample of the weights first, whether the models belong together.",
        True,
        flag="--no-check",
    )
    allow_mismatch: bool = _option(
        "Merge models of another backbone, and damaged ones, all the same.", False
    )
    download: bool = _option(
        "Put inputs on the Hugging Face Hub into its cache first, instead of reading ranges.",
        False,
    )
    lease: bool = _option(
        "For stores without conditional writes: you see to it that one run writes to OUT.",
        True,
        flag="--no-lease",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _checked(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
        if self.engine == "local" and self.address is not None:
            raise ConfigError("--address is for --engine ray; leave it out, or choose that engine.")
        if self.device == "cpu" and self.gpu_memory is not None:
            raise ConfigError("--gpu-memory is for GPUs; leave it out with --device cpu.")

    @property
    def on_ray(self) -> bool:
        """Whether the merge runs on a Ray cluster."""
        return self.engine == "ray" or (self.engine == "auto" and self.address is not None)

    def applied_to(self, config: MergeConfig) -> MergeConfig:
        """Return the configuration with what the options say of it: seed and locality."""
        if self.seed is not None:
            config = config.with_seed(self.seed)
        return config.with_node_labels(self.locality)


def refuse_missing_ray(options: RunOptions) -> None:
    """Refuse a run on a cluster where Ray is not installed.

    Raises
    ------
    ConfigError
        If so. Whether a cluster answers is seen when the run begins.
    """
    if not options.on_ray:
        return
    try:
        importlib.import_module("ray")  # by name: it is only asked whether that works
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs Ray, which is not installed ({error}): "
            "pip install 'della-dist[ray]'."
        ) from error


def _described(documentation: str) -> str:
    """Return the documentation of the class with every option and what it is."""
    lines = [f"{o.name}\n    {o.metadata['said']}" for o in fields(RunOptions)]
    section = "\n".join(["Parameters", "----------", *lines, "", "Raises"])
    return inspect.cleandoc(documentation).replace("Raises", section)


if RunOptions.__doc__ is not None:  # not with python -OO
    RunOptions.__doc__ = _described(RunOptions.__doc__)


def flag_of(option: Field[Any]) -> str:
    """Return what the command line calls an option."""
    return option.metadata["flag"] or f"--{option.name.replace('_', '-')}"


def _checked(option: Field[Any], value: Any) -> object:  # noqa: ANN401
    """Return the value of an option as it is kept.

    Raises
    ------
    ConfigError
        If it is of the wrong kind, or out of bounds.
    """
    facts, default = option.metadata, option.default
    called = f"{option.name} ({flag_of(option)})"
    if "choices" in facts:
        if not isinstance(value, str) or value not in facts["choices"]:
            choices = " or ".join(facts["choices"])
            raise ConfigError(f"{called} is {value!r}; it must be {choices}.")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{called} is {value!r}; it must be True or False.")
    elif isinstance(default, tuple):
        if isinstance(value, str) or not all(isinstance(text, str) for text in _items(value)):
            raise ConfigError(f"{called} is {value!r}; it must be texts like GLOB:KEY=VALUE.")
        return tuple(value)
    elif "least" in facts:
        return _whole(called, value, option)
    elif facts.get("metavar") == "DIR" and isinstance(value, str) and is_url(value):
        raise ConfigError(f"{called} is {value}; it must be a directory on a disk, not a URL.")
    elif value is not None and not (isinstance(value, str) and value):
        if facts["metavar"] == "DIR":
            raise ConfigError(f"{called} is {value!r}; it must be the path of a directory.")
        raise ConfigError(
            f"{called} is {value!r}; it must be auto, local, ray://HOST:10001 or HOST:PORT."
        )
    return value


def _items(value: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield what is in a value; something that is no text if it holds nothing."""
    try:
        yield from value
    except TypeError:
        yield None


def _whole(called: str, value: Any, option: Field[Any]) -> int | None:  # noqa: ANN401
    """Return a number within its bounds, as a Python integer; None where that is the default."""
    least, most = option.metadata["least"], option.metadata.get("most", 0)
    if value is None and option.default is None:
        return None
    if option.metadata["metavar"] == "SIZE":
        return checked_size(called, value, least)
    whole = _integer(called, value, "")
    if not least <= whole <= most:
        raise ConfigError(f"{called} is {whole}; it must be from {least} to {most}.")
    return whole


def checked_size(called: str, value: Any, least: int) -> int:  # noqa: ANN401
    """Return a number of bytes that is given as one, or as text such as ``256MiB``.

    Raises
    ------
    ConfigError
        If it is none, or below `least`; it is spoken of as `called`.
    """
    if isinstance(value, str):
        try:
            whole = parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{called}: {error}.") from None
    else:
        whole = _integer(called, value, " or text such as '256MiB'")
    if whole < least:
        at_least = f"{least >> 20} MiB" if least >= 1 << 20 else plural(least, "byte")
        raise ConfigError(f"{called} is {plural(whole, 'byte')}; it must be at least {at_least}.")
    return whole


def _integer(called: str, value: Any, or_what: str) -> int:  # noqa: ANN401
    try:  # an array has an index if it has one entry
        return operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{called} is {value!r}; it must be a whole number{or_what}.") from None
