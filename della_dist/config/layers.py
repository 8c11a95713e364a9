"""Where in the depth of a model a tensor lies, told from its name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first part of the name that is all digits is the number of the layer.
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return the number of a tensor's layer, what stands before it and behind it; None: no layer.

    The number is the first part that is all digits: ``("model.layers.", 3, ".mlp.up")``.
    """
    found = _LAYER.search(name)
    if found is None:
        return None
    return name[: found.start(1)], int(found[1]), name[found.end() :]


def layer_fraction(names: Iterable[str]) -> dict[str, float]:
    """Return for every tensor name the place t at which gradients are read.

    The first all-digit part of a name is its layer, what stands before it (``model.layers.``)
    groups layers: t = layer / last layer of the group, 1 where the group has one layer. Tensors
    without a layer, before the layers or after them, are at 0. All as in mergekit.
    """
    places: dict[str, tuple[str, int] | None] = {}
    last: dict[str, int] = {}
    for name in names:
        found = layer_of(name)
        if found is None:
            places[name] = None
            continue
        prefix, layer, _ = found
        places[name] = (prefix, layer)
        if layer > last.get(prefix, 0):
            last[prefix] = layer
    fractions = {}
    for name, place in places.items():
        if place is None:
            fractions[name] = 0.0
        else:
            fractions[name] = place[1] / last[place[0]] if place[0] in last else 1.0
    return fractions
