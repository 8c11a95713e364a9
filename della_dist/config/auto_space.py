"""The values of a configuration that are worth a search, left open: lambda, and weights.

Every weight is searched from 0 to twice what it is, in attention, MLP and the rest each, and lambda
from a quarter of what it is to twice. The configuration as it is comes first, then lambda alone,
then weights that are the same in all kinds, then each by itself.
Where weights are divided by their sum, and where there is one expert, weights do not tell how far a
tensor goes: then lambda is searched in each kind of tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from della_dist.config import scalars
from della_dist.config.load import config_from_mapping
from della_dist.config.methods import Method
from della_dist.config.model import MergeConfig
from della_dist.config.problem import Problem
from della_dist.config.space import Space, has_ranges
from della_dist.errors import ConfigError

#: Parts of the names of tensors by kind; what has none of them is the rest.
KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": (
        ".self_attn.",
        ".attn.",
        ".attention.",
        ".self_attention.",
        ".linear_attn.",
        ".cross_attn.",
        ".encoder_attn.",
        ".SelfAttention.",
        ".EncDecAttention.",
    ),
    "MLP": (
        ".mlp.",
        ".ffn.",
        ".feed_forward.",
        ".block_sparse_moe.",
        ".DenseReluDense.",
        ".intermediate.",
        ".output.dense.",
        ".fc1.",
        ".fc2.",
    ),
}
#: Lambda is searched from and to so many times what it is.
LEAST_LAMBDA, MOST_LAMBDA = 0.25, 2.0
#: Weights are searched from 0 to so many times what they are.
MOST_WEIGHT = 2.0
#: Times what it is, lambda alone is tried so, after the configuration as it is.
LAMBDAS = (0.5, 0.35, 0.7, 1.4)
#: A gradient of more values is left as it is.
MOST_POINTS = 4

_LAMBDA = "lambda"
#: A filter that all names have.
_ANY = "*"


def auto_space(document: Mapping[str, Any], source: str, names: Collection[str]) -> Space:
    """Return a configuration with lambda and the weights of experts left open.

    Parameters
    ----------
    document
        A configuration without anything left open. Where it has filters or gradients of its own,
        each of their values is searched, and kinds of tensors are not told apart.
    source
        What messages call it.
    names
        Of the tensors that are merged.

    Raises
    ------
    ConfigError
        If it is wrong, or has nothing to be searched.
    """
    try:
        is_space = has_ranges(document)
    except Problem as problem:
        raise ConfigError(f"{source}: {problem}") from None
    if is_space:
        raise ConfigError(f"{source}: leaves values open itself. Leave out --auto.")
    config = config_from_mapping(document, source)
    if config.modules:
        raise ConfigError(
            f"{source}: --auto opens what a configuration has under `models`, and this one has "
            "slices. Write `{search: [low, high]}` in the place of its numbers, and leave out "
            "--auto."
        )
    method = config.method
    opened = deepcopy(dict(document))
    experts = [one for one in opened["models"] if one["model"] != config.base_model]
    shared = _block(opened)
    weight = method.weighted_by
    has_weights = weight in method.uses and len(experts) > 1
    if has_weights:
        own = shared.pop(weight, 1.0)
        for one in experts:
            block = _block(one)
            block[weight] = _opened(block.get(weight, own), _weight, _kinds(names))
    by_kind = not has_weights or _is_divided(config, method)
    if _LAMBDA in method.uses:
        kinds = _kinds(names) if by_kind else ()
        shared[_LAMBDA] = _opened(shared.get(_LAMBDA, method.lambda_), _lambda, kinds)
    if not has_ranges(opened):
        raise ConfigError(
            f"{source}: --auto opens lambda and the weights of two experts or more that are not 0, "
            f"and here {config.merge_method} has none of these. Write `{{search: [low, high]}}` in "
            "the place of other numbers, and leave out --auto."
        )
    space = Space(opened, source)
    groups = _groups([one.name for one in space.dimensions])
    lambdas = groups.get(f"parameters.{_LAMBDA}", [])
    then = [
        {name: times * float(space.first[name] or 0.0) for name in lambdas} for times in LAMBDAS
    ]
    tied = [names for names in groups.values() if len(names) > 1]
    return Space(opened, source, then if lambdas else (), tied)


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of values by the parameter that they are of."""
    groups: dict[str, list[str]] = {}
    for name in names:
        before, dot, after = name.partition("parameters.")
        parameter = before + dot + after.partition("[")[0]
        groups.setdefault(parameter, []).append(name)
    return groups


def _block(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of an entry, to be changed."""
    block = dict(entry.get("parameters") or {})
    entry["parameters"] = block
    return block


def _is_divided(config: MergeConfig, method: Method) -> bool:
    """Tell whether weights are divided by their sum."""
    found = config.settings.get("normalize")
    if found is None or method.is_balanced:
        return False
    return any(point for branch in found.branches for point in branch.points)


def _kinds(names: Collection[str]) -> list[list[str]]:
    """Return the filters of each kind that these tensors are of; nothing if they are of one."""
    # As in a configuration, a tensor is of the first kind that its name has a part of.
    kinds = []
    left = list(names)
    for parts in KINDS.values():
        found = [part for part in parts if any(part in name for name in left)]
        if found:
            kinds.append(found)
        left = [name for name in left if not any(part in name for part in found)]
    if left or not kinds:
        kinds.append([_ANY])
    else:
        kinds[-1] = [_ANY]
    return kinds if len(kinds) > 1 else []


def _weight(value: float) -> dict[str, Any]:
    return {"search": sorted((0.0, MOST_WEIGHT * value)), "first": value}


def _lambda(value: float) -> dict[str, Any]:
    if value < 0:
        return {"search": [MOST_LAMBDA * value, LEAST_LAMBDA * value], "first": value}
    return {"search": [LEAST_LAMBDA * value, MOST_LAMBDA * value], "first": value, "log": True}


def _opened(own: Any, ranged: Any, kinds: Sequence[Sequence[str]]) -> Any:  # noqa: ANN401
    """Return what a parameter is, with its numbers left open."""
    if isinstance(own, Mapping):
        return {**own, "value": _opened(own.get("value"), ranged, ())}
    if isinstance(own, list):
        points = list(_points(own))
        if len(points) > MOST_POINTS:
            return own
        return [_opened(one, ranged, ()) for one in own]
    value = scalars.number(own)  # which may be text
    if value == 0:
        return own
    if not kinds:
        return ranged(value)
    conditions = []
    for filters in kinds:
        node = ranged(value)  # one value for all names of a kind
        conditions += [{"filter": one, "value": node} for one in filters]
    return conditions


def _points(own: list[Any]) -> Iterator[float]:
    """Yield the numbers of a gradient; nothing of conditions."""
    return (one for one in own if not isinstance(one, Mapping))
