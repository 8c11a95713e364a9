"""Single values of a configuration: converted and checked, one function a kind.

Every function takes whatever YAML gave and raises `ValueError` with the end of a sentence about
the value ("must be ..., not ...").
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from della_dist.config.problem import check_keys, meant_word, nearest, shown
from della_dist.locations import check_location, is_url, of_parts
from della_dist.specs.recipe import MAX_FLOAT32, MIN_LIMIT

#: Bounds are checked with this tolerance, so that 0.7 + 0.3 may be 1.0000000000000002.
TOLERANCE = 1e-9

#: Random numbers are multiples of this: a smaller keep probability could not be met.
MIN_KEEP = 2.0**-24

#: How far beyond two models the line, or the arc, through them may be followed.
MAX_WAY = 1000

MAX_STEPS = 10_000

#: Of `wudi`: 1e-7 let the rounding of grids into up to 0.8 % of a delta of few directions.
LEAST_RIDGE = 1e-6

MAX_SEED = 2**64 - 1

#: A label of Ray's nodes, as its command line writes it.
NODE_LABEL = re.compile(r"[A-Za-z0-9./_-]+=[A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_TRUE = frozenset({"true", "yes", "on", "1", "t", "y"})
_FALSE = frozenset({"false", "no", "off", "0", "f", "n"})

#: Names of torch, mergekit and safetensors for the dtypes that can be written.
DTYPE_NAMES: Mapping[str, str] = {
    "float16": "F16",
    "fp16": "F16",
    "f16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float32": "F32",
    "fp32": "F32",
    "f32": "F32",
    "float": "F32",
    "float64": "F64",
    "fp64": "F64",
    "f64": "F64",
    "double": "F64",
}

#: What configurations call the dtypes, by the names of safetensors.
DTYPE_WORDS: Mapping[str, str] = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


def number(raw: object) -> float:
    """Return a finite number; text that is a number counts, as YAML reads 1e-3 as text."""
    if isinstance(raw, str) and len(raw) <= 400 and _NUMBER.fullmatch(raw.strip()):
        raw = float(raw)
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        raise ValueError(f"must be a number, not {shown(raw)}")  # noqa: TRY004
    if not abs(raw) <= MAX_FLOAT32:
        raise ValueError(f"must be a finite number, not {shown(raw)}")
    return float(raw) + 0.0  # -0.0 is 0.0


def ridge(raw: object) -> float:
    """Return what is added to a diagonal, as a part of its mean: not so little that grids show."""
    value = number(raw)
    if value < LEAST_RIDGE:
        raise ValueError(
            f"must be at least {LEAST_RIDGE:g}, not {shown(raw)}: below, rounding decides of what "
            "has changed in few directions"
        )
    return value


def part_of_the_way(raw: object) -> float:
    """Return the place between two models, which may lie beyond them."""
    value = number(raw)
    if abs(value) > MAX_WAY:
        raise ValueError(
            f"must be from -{MAX_WAY} to {MAX_WAY}, not {shown(raw)}: 0 is the base, 1 the other "
            "model"
        )
    return value


def not_negative(raw: object) -> float:
    """Return a number from 0 on."""
    value = number(raw)
    if value < 0:
        raise ValueError(f"must be at least 0, not {shown(raw)}")
    return value


def selected(raw: object) -> float:
    """Return the part of the elements that is merged."""
    value = number(raw)
    if not 0 <= value <= 1 + TOLERANCE:
        raise ValueError(
            f"must be from 0 to 1, not {shown(raw)}: it is the fraction of the elements, those at "
            "which the experts differ most, that is merged"
        )
    return min(value, 1.0)


def farthest(raw: object) -> float:
    """Return how far an element goes at most."""
    value = number(raw)
    if value < 0:
        raise ValueError(
            f"must be at least 0, not {shown(raw)}: it is how far an element goes from the base at "
            "most"
        )
    return 0.0 if value < MIN_LIMIT else value


def small(raw: object) -> float:
    """Return a number that other numbers count as zero beside."""
    value = number(raw)
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, not {shown(raw)}")
    return value


def steps(raw: object) -> int:
    """Return a number of steps at most."""
    if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= MAX_STEPS:
        raise ValueError(f"must be a whole number from 1 to {MAX_STEPS}, not {shown(raw)}")
    return raw


def density(raw: object) -> float:
    """Return a keep probability in [0, 1]."""
    value = number(raw)
    if value < 0 or value > 1 + TOLERANCE:
        raise ValueError(
            f"must be from 0 to 1, not {shown(raw)}: it is the fraction of the delta that is kept"
        )
    return _kept(value)


def gamma(raw: object) -> float:
    """Return the part of the delta that is dropped as outliers."""
    value = number(raw)
    if not 0 <= value < 1:
        raise ValueError(
            f"must be at least 0 and below 1, not {shown(raw)}: it is the fraction of the delta, "
            "the largest changes, that is dropped"
        )
    return value


def drop_rate(raw: object) -> float:
    """Return the density that belongs to a drop rate in [0, 1]."""
    value = number(raw)
    kept = float(1 - Decimal(repr(value)))  # 1 - 0.7 is 0.3, as if it had been written so
    if value < -TOLERANCE or kept < 0:
        raise ValueError(
            f"must be from 0 to 1, not {shown(raw)}: it is the fraction of the delta that is "
            "dropped"
        )
    return _kept(kept)


def _kept(value: float) -> float:
    """Return a fraction that random numbers can meet."""
    return 0.0 if value < MIN_KEEP else min(value, 1.0)


def epsilon(raw: object) -> float:
    """Return the half width of the window of keep probabilities."""
    value = number(raw)
    if not 0 <= value < 0.5:
        raise ValueError(
            f"must be at least 0 and below 0.5, not {shown(raw)}: keep probabilities run from "
            "density - epsilon, above 0, to density + epsilon, at most 1"
        )
    return value


def window_size(raw: object) -> float:
    """Return the half width that belongs to a window of full width."""
    value = number(raw)
    if not 0 <= value < 1:
        raise ValueError(
            f"must be at least 0 and below 1, not {shown(raw)}: keep probabilities run from "
            "density - window_size / 2, above 0, to density + window_size / 2, at most 1"
        )
    return value / 2


def switch(raw: object) -> bool:
    """Return a boolean."""
    text = str(raw).lower() if isinstance(raw, (bool, str)) else None
    if text in _TRUE or (isinstance(raw, (int, float)) and raw == 1):
        return True
    if text in _FALSE or (isinstance(raw, (int, float)) and raw == 0):
        return False
    raise ValueError(f"must be true or false, not {shown(raw)}")


def rescale(raw: object) -> str:
    """Return ``inverse``, ``l1``, ``none``, or mergekit's ``true`` and ``false``."""
    text = str(raw).lower() if isinstance(raw, (bool, str)) else None
    if text in ("inverse", "l1", "none", "true", "false"):
        return text
    raise ValueError(f"must be inverse, l1 or none (or true or false), not {shown(raw)}")


def one_of(*words: str) -> Callable[[object], Any]:
    """Return a function that takes these words alone."""

    def word(raw: object) -> str:
        if isinstance(raw, str) and raw in words:
            return str(raw)  # of numpy's kind of text, too
        hint = meant_word(raw, words)
        raise ValueError(f"must be {' or '.join(words)}, not {shown(raw)}{hint}")

    return word


def layer_range(raw: object) -> tuple[int, int]:
    """Return the first layer, and the one after the last."""
    if not isinstance(raw, (list, tuple)) or len(raw) != 2:
        raise ValueError(
            f"must be two numbers, the first layer and the one after the last, not {shown(raw)}"
        )
    for number in raw:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"has {shown(number)}; layers are whole numbers from 0 on")
    first, stop = raw
    if first >= stop:
        raise ValueError(f"is [{first}, {stop}], which has no layer: the second one is not in it")
    return first, stop


def node_labels(raw: object) -> dict[str, str]:
    """Return glob of files -> ``key=value`` label of the nodes that have them."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"must be a mapping of files to labels, not {shown(raw)}")  # noqa: TRY004
    for glob, label in raw.items():
        if not isinstance(glob, str):
            raise ValueError(f"has {shown(glob)}, which must be text: a pattern of files")  # noqa: TRY004
        if not isinstance(label, str) or not NODE_LABEL.fullmatch(label):
            raise ValueError(f"has {shown(label)} for {shown(glob)}; a label is written key=value")
    return dict(raw)


def seed(raw: object) -> int:
    """Return the seed of every random number."""
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 <= raw <= MAX_SEED:
        raise ValueError(f"must be a whole number from 0 to 2**64 - 1, not {shown(raw)}")
    return raw


def parse_dtype(raw: object) -> str | None:
    """Return the safetensors name of a dtype that can be written; None for None."""
    if raw is None:
        return None
    if not isinstance(raw, str):
        raise ValueError(f"must be the name of a dtype, not {shown(raw)}")  # noqa: TRY004
    name = raw.strip().lower().removeprefix("torch.")
    if name not in DTYPE_NAMES:
        choices = ("float16", "bfloat16", "float32", "float64")
        raise ValueError(
            f"is {shown(raw)}, not a dtype that can be written{nearest(name, choices)}"
        )
    return DTYPE_NAMES[name]


def location(raw: object) -> str:
    """Return where a checkpoint is, perhaps with adapters: URLs, or paths with ``~`` expanded."""
    raw = os.fspath(raw) if isinstance(raw, os.PathLike) else _written_shortly(raw)
    if not isinstance(raw, str):
        quotes = " (text that YAML reads otherwise stands in quotes)" * isinstance(
            raw, (int, float)
        )
        raise ValueError(f"must be the path of a checkpoint, not {shown(raw)}{quotes}")  # noqa: TRY004
    if not raw.strip() or not raw.isprintable():
        raise ValueError(f"must be the path of a checkpoint, not {shown(raw)}")
    text = str(raw)
    if text != text.strip() and not os.path.lexists(text):
        text = text.strip()
    return of_parts(text, _part)


def _written_shortly(raw: object) -> object:
    """Return what mergekit's long form of a model means: of the path, revision and adapter."""
    if not isinstance(raw, Mapping):
        return raw
    if "path" in raw:
        check_keys(raw, ("path", "revision"))
        revision = raw.get("revision")
        return raw["path"] if revision is None else f"{raw['path']}@{revision}"
    if "model" not in raw:
        return raw
    check_keys(raw, ("model", "lora"))
    parts = [_written_shortly(raw[key]) for key in ("model", "lora") if raw.get(key) is not None]
    texts = [part for part in parts if isinstance(part, str)]
    return "+".join(texts) if len(texts) == len(parts) else raw


def _part(location: str) -> str:
    check_location(location)
    if is_url(location) or not location.startswith("~"):
        return location
    return str(Path(location).expanduser())
