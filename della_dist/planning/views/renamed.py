"""Checkpoints with the names that a configuration gives to their tensors (``rename``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from della_dist.config.renames import Rename
from della_dist.errors import InputError
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry


def renamed(checkpoint: CheckpointIndex, rules: Sequence[Rename]) -> CheckpointIndex:
    """Return a checkpoint whose names have become others, one rule after another.

    Raises
    ------
    InputError
        If a rule matches nothing, or two tensors get one name.
    """
    if checkpoint.is_adapter:
        raise InputError(
            f"{checkpoint.location} is an adapter, whose names say more than where its tensors "
            "belong: `rename` is for models. Give it as MODEL+ADAPTER to rename those of its model."
        )
    names = {name: name for name in checkpoint.tensors}
    for rule in rules:
        after = {name: rule(now) for name, now in names.items()}
        if after == names:
            raise InputError(
                f"{checkpoint.location}: no name of a tensor becomes another by `rename` from "
                f"{rule.pattern!r} to {rule.to!r}. Its names are like "
                f"{next(iter(names.values()), 'nothing')}."
            )
        names = after
    tensors: dict[str, TensorEntry] = {}
    for before, name in names.items():
        if name in tensors:
            other = next(n for n, now in names.items() if now == name)
            raise InputError(
                f"{checkpoint.location}: `rename` calls both {other} and {before} {name}. Let "
                "every tensor have a name of its own."
            )
        if not name or not name.isprintable():
            raise InputError(f"{checkpoint.location}: `rename` calls {before} {name!r}, no name.")
        entry = checkpoint.tensors[before]
        tensors[name] = entry if name == before else replace(entry, name=name)
    return replace(checkpoint, tensors=tensors)
