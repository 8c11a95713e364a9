"""``modules``: which stack of layers each is, by its name and by what the models are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from della_dist.config import MergeConfig
from della_dist.config.modules import DECODER, ENCODER, TEXT, Slice
from della_dist.config.problem import Problem, together
from della_dist.errors import ConfigError, InputError
from della_dist.planning.views.stacks import find_stack, has_one_stack, stacks_of
from della_dist.specs.checkpoint import CheckpointIndex


def with_stacks(config: MergeConfig, checkpoints: Sequence[CheckpointIndex]) -> MergeConfig:
    """Return a configuration whose modules are called as stacks that the models have.

    The only stack of a model has no name, as where its slices stand at the top level. Slices of all
    layers of their models get the numbers of these.

    Parameters
    ----------
    config
        With or without modules.
    checkpoints
        The inputs, the reference first, which decides what the models are.

    Raises
    ------
    ConfigError
        If a name is that of no stack, or two are of the same.
    InputError
        If slices have no name, and a model has no stack that is the likeliest.
    """
    if not config.modules:
        return config
    reference = checkpoints[0]
    has = stacks_of(reference)
    if config.modules[0].name is None and TEXT not in has:
        raise InputError(
            f"{reference.location} is an encoder and a decoder, and `slices` does not say of which "
            "it takes layers. Write them below what they are of: "
            f"`modules: {{{ENCODER}: {{slices: [...]}}, {DECODER}: {{slices: [...]}}}}`, one of "
            "them or both."
        )
    modules = list(config.modules)
    if len(modules) == 1 and has_one_stack(reference):
        modules = [replace(modules[0], name=None)]
    problems = [
        Problem(
            f"modules.{module.name}",
            f"is no stack of layers of {reference.location}, which has {' and '.join(has)}. Name "
            "those alone: what stands beside them is merged with their first or last slice",
        )
        for module in modules
        if module.name not in (None, *has)
    ]
    if problems:
        raise ConfigError(f"{config.source}: {together(problems)}")
    by_place = {c.location: c for c in checkpoints}
    modules = [
        replace(m, slices=tuple(_with_all_layers(s, m.stack, by_place) for s in m.slices))
        for m in modules
    ]
    return replace(config, modules=tuple(modules))


def _with_all_layers(part: Slice, stack: str, checkpoints: dict[str, CheckpointIndex]) -> Slice:
    """Return a slice whose ranges are numbers.

    Raises
    ------
    InputError
        If its models have different numbers of layers.
    """
    if not part.is_whole:
        return part
    counts = {
        model: len(find_stack(checkpoints[model], stack).layers) for model, _, _ in part.sources()
    }
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise InputError(
                f"{other} has {counts[other]} layers in its {stack}, and {first} {counts[first]}: "
                "every source of a slice has as many. Give a `layer_range` of each (`slices`)."
            )
    ranges = {model: (0, count) for model, count in counts.items()}
    return replace(
        part,
        ranges=tuple(ranges[model.model] for model in part.config.models),
        base_range=None if part.base_range is None else ranges[first],
    )
