"""The checkpoints that a configuration names, opened: models, and models with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from della_dist.config import MergeConfig
from della_dist.errors import InputError
from della_dist.locations import is_url, model_and_adapters, place
from della_dist.planning.content import Content
from della_dist.planning.views.adapters import AdaptedModel, with_adapters
from della_dist.runtime.upstream import Stages
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.checkpoint import open_adapter, open_checkpoint

#: Directories that are opened at once.
_AT_ONCE = 16


def open_inputs(
    config: MergeConfig, stages: Stages, content: Content
) -> tuple[
    MergeConfig, list[CheckpointIndex], Mapping[int, AdaptedModel], tuple[CheckpointIndex, ...]
]:
    """Return the checkpoints that are merged, which of them have adapters, and what else is read.

    And the configuration, with the model of each adapter that stands alone.

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
        If one cannot be opened, or an adapter does not fit its model.
    """
    locations = config.locations()
    opened = _opened([model_and_adapters(location) for location in locations], stages)
    inputs: dict[str, int] = {}
    chains: list[tuple[str, ...]] = []
    names: dict[str, str] = {}
    for number, location in enumerate(locations):
        chain = _chain(location, locations[0] if config.base_model else None, opened)
        names[location] = "+".join(chain)
        if chain in chains and len(chain) > 1 and not config.slices:
            raise InputError(
                f"{location} and {locations[chains.index(chain)]} are the same checkpoint. Name "
                "it once, and give it a larger weight instead."
            )
        chains.append(chain)
        if len(chain) == 1:
            inputs.setdefault(place(location), number)
    others: list[CheckpointIndex] = []

    def number_of(location: str) -> int:
        number = inputs.setdefault(place(location), len(locations) + len(others))
        if number == len(locations) + len(others):
            others.append(opened[location])
        return number

    checkpoints, adapted = [], {}
    for number, (location, chain) in enumerate(zip(locations, chains, strict=True)):
        if len(chain) == 1:
            checkpoints.append(opened[location])
            continue
        model, *adapters = [(number_of(part), opened[part]) for part in chain]
        adapted[number] = with_adapters(names[location], number, model, adapters, content)
        checkpoints.append(adapted[number].index)
    return config.with_locations(names), checkpoints, adapted, tuple(others)


def _opened(chains: list[tuple[str, ...]], stages: Stages) -> dict[str, CheckpointIndex]:
    """Return every directory that is named, opened."""
    is_adapter = {part: i > 0 for chain in chains for i, part in enumerate(chain)}

    def opened(location: str) -> CheckpointIndex:
        if location in stages:
            return stages[location].checkpoint
        return (open_adapter if is_adapter[location] else open_checkpoint)(location)

    if not any(map(is_url, is_adapter)):
        return {location: opened(location) for location in is_adapter}
    with ThreadPoolExecutor(min(_AT_ONCE, len(is_adapter))) as pool:  # a few round trips each
        return dict(zip(is_adapter, pool.map(opened, is_adapter), strict=True))


def _chain(
    location: str, base: str | None, opened: Mapping[str, CheckpointIndex]
) -> tuple[str, ...]:
    """Return the model and the adapters that are meant; an adapter alone is one of the base."""
    chain = model_and_adapters(location)
    if not opened[chain[0]].is_adapter:
        return chain
    if base is None or base == location or opened[model_and_adapters(base)[0]].is_adapter:
        raise InputError(
            f"{chain[0]} is an adapter, and it is not said of which model. Write "
            f"MODEL+{chain[0]}, or name the model as `base_model`."
        )
    return (*model_and_adapters(base), *chain)
