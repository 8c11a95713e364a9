"""The checkpoints that a configuration names, opened: models, and models with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from della_dist.config import MergeConfig
from della_dist.config.renames import Rename
from della_dist.errors import InputError, each
from della_dist.locations import is_url, model_and_adapters, place
from della_dist.planning.content import Content
from della_dist.planning.views.adapters import AdaptedModel, with_adapters
from della_dist.planning.views.layouts import Layout, seen_as_reference
from della_dist.planning.views.renamed import renamed
from della_dist.runtime.upstream import Stages
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.checkpoint import open_adapter, open_checkpoint

#: Directories that are opened at once.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a merge reads."""

    config: MergeConfig
    """With the model of each adapter that stands alone."""
    checkpoints: tuple[CheckpointIndex, ...]
    """Those that are merged, the base first, with the names and the layout of the first one."""
    adapted: Mapping[int, AdaptedModel]
    """Which of them, by number, have adapters."""
    others: tuple[CheckpointIndex, ...]
    """What else is read."""
    layouts: Mapping[int, Layout]
    """By number, others included: which have other names or another layout in their files."""

    def models(self) -> list[CheckpointIndex]:
        """Return the checkpoints that are merged, without their adapters."""
        found = (*self.checkpoints, *self.others)
        number = {i: one.inputs[0] for i, one in self.adapted.items()}
        return [found[number.get(i, i)] for i in range(len(self.checkpoints))]


def open_inputs(config: MergeConfig, stages: Stages, content: Content) -> Inputs:
    """Return the checkpoints that a configuration names.

    Parameters
    ----------
    config
        With locations that are pinned.
    stages
        Those of the inputs that the same run makes, by location.
    content
        Knows the bytes of the inputs.

    Raises
    ------
    InputError, UnreachableError
        If one cannot be opened, is no model like the first one, or an adapter does not fit its
        model.
    """
    locations = config.locations()
    opened, adapters_of = _opened([model_and_adapters(location) for location in locations], stages)
    opened |= {
        location: renamed(opened[location], rules) for location, rules in _renames(config).items()
    }
    layouts = _layouts(config, opened)
    opened |= {location: layout.checkpoint for location, layout in layouts.items()}
    inputs: dict[tuple[str, bool], int] = {}
    chains: list[tuple[str, ...]] = []
    names: dict[str, str] = {}
    for number, location in enumerate(locations):
        base = locations[0] if config.base_model else None
        chain = _chain(location, base, opened, has_base=config.has_base)
        names[location] = "+".join(chain)
        if chain in chains and len(chain) > 1:
            advice = (
                "Name it in one way"
                if config.slices
                else "Name it once, and give it a larger weight instead"
            )
            first = locations[chains.index(chain)]
            raise InputError(f"{location} and {first} are the same checkpoint. {advice}.")
        chains.append(chain)
        if len(chain) == 1:
            inputs.setdefault((place(location), False), number)
    others: list[CheckpointIndex] = []

    def number_of(location: str, *, is_adapter: bool = False) -> int:
        next_one = len(locations) + len(others)
        number = inputs.setdefault((place(location), is_adapter), next_one)
        if number == next_one:
            others.append(adapter(location) if is_adapter else opened[location])
        return number

    def adapter(location: str) -> CheckpointIndex:
        return adapters_of[location] if location in adapters_of else opened[location]

    def with_its_adapters(number: int) -> AdaptedModel:
        model, *adapters = chains[number]
        return with_adapters(
            names[locations[number]],
            number,
            (number_of(model), opened[model]),
            [(number_of(one, is_adapter=True), adapter(one)) for one in adapters],
            content,
        )

    having = [number for number, chain in enumerate(chains) if len(chain) > 1]
    adapted = dict(zip(having, each(with_its_adapters, having), strict=True))
    checkpoints = [
        adapted[number].index if number in adapted else opened[location]
        for number, location in enumerate(locations)
    ]
    return Inputs(
        config.with_locations(names),
        tuple(checkpoints),
        adapted,
        layouts={number_of(location): layout for location, layout in layouts.items()},
        others=tuple(others),
    )


def _renames(config: MergeConfig) -> dict[str, tuple[Rename, ...]]:
    """Return what becomes of the names of each model, with adapters or without."""
    found: dict[str, tuple[Rename, ...]] = {}
    for location, rules in config.renames.items():
        model = model_and_adapters(location)[0]
        if found.setdefault(model, rules) != rules:
            raise InputError(
                f"{model} has other names by the `rename` of {location} than by another. Say the "
                "same wherever it stands."
            )
    return found


def _layouts(config: MergeConfig, opened: Mapping[str, CheckpointIndex]) -> dict[str, Layout]:
    """Return which models have other names or another layout than the reference."""
    reference = opened[model_and_adapters(config.locations()[0])[0]]
    if reference.is_adapter or (config.method.passes_through and not config.slices):
        return {}  # of one model, the names are its own
    others = {
        location: checkpoint
        for location, checkpoint in opened.items()
        if not checkpoint.is_adapter and checkpoint is not reference
    }
    found = each(
        lambda one: seen_as_reference(reference, one, in_layers=bool(config.slices)),
        others.values(),
    )
    return {where: one for where, one in zip(others, found, strict=True) if one is not None}


def _opened(
    chains: list[tuple[str, ...]], stages: Stages
) -> tuple[dict[str, CheckpointIndex], dict[str, CheckpointIndex]]:
    """Return every directory that is named, opened: first ones of a chain, and adapters."""

    def opened(one: tuple[str, bool]) -> CheckpointIndex:
        location, is_adapter = one
        if location in stages:
            return stages[location].checkpoint
        return (open_adapter if is_adapter else open_checkpoint)(location)

    named = list(dict.fromkeys((part, i > 0) for chain in chains for i, part in enumerate(chain)))
    if any(is_url(location) for location, _ in named):
        with ThreadPoolExecutor(min(_AT_ONCE, len(named))) as pool:  # a few round trips each
            found = each(opened, named, pool.map)
    else:
        found = each(opened, named)
    first: dict[str, CheckpointIndex] = {}
    adapters: dict[str, CheckpointIndex] = {}
    for (location, is_adapter), checkpoint in zip(named, found, strict=True):
        (adapters if is_adapter else first)[location] = checkpoint
    return first, adapters


def _chain(
    location: str, base: str | None, opened: Mapping[str, CheckpointIndex], *, has_base: bool
) -> tuple[str, ...]:
    """Return the model and the adapters that are meant; an adapter alone is one of the base."""
    chain = model_and_adapters(location)
    if not opened[chain[0]].is_adapter:
        return chain
    if base is None or base == location or opened[model_and_adapters(base)[0]].is_adapter:
        # A base that is the first of the models counts as that alone where no deltas are merged.
        or_base = ", or name the model as `base_model`" if has_base else ""
        raise InputError(
            f"{chain[0]} is an adapter, and it is not said of which model. Write "
            f"MODEL+{chain[0]}{or_base}."
        )
    return (*model_and_adapters(base), *chain)
