"""``slices``: an output put together of layers, each slice merged from ranges of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from della_dist.config.methods import Method
from della_dist.config.model import ExpertModel, MergeConfig, Slice
from della_dist.config.problem import Problem, shown
from della_dist.config.schema import Block, SliceDocument, Source
from della_dist.config.settings import Setting
from della_dist.locations import place

#: ``(of_experts, *blocks)`` to settings; see `della_dist.config.load`.
Settle = Callable[..., dict[str, Setting[Any]]]


def with_slices(
    config: MergeConfig, documents: Sequence[SliceDocument], shared: Block, settle: Settle
) -> MergeConfig:
    """Return `config`, whose models are all that any slice names, with its slices.

    Parameters of a source come before those of its slice, and those before the shared ones.
    """

    def part(i: int) -> Slice:
        try:
            return _slice(config, documents[i], shared, settle)
        except Problem as problem:
            raise problem.inside(f"slices[{i}]") from None

    return replace(config, slices=tuple(map(part, range(len(documents)))))


def distinct_models(
    documents: Sequence[SliceDocument], base: str | None, *, without_base: bool
) -> list[str]:
    """Return the models that slices name, in their order; perhaps without the base."""
    names: dict[str, str] = {}
    for document in documents:
        for source in document.sources:
            names.setdefault(place(source.model), source.model)
    if without_base and base is not None:
        names.pop(place(base), None)
    return list(names.values())


def _slice(config: MergeConfig, document: SliceDocument, shared: Block, settle: Settle) -> Slice:
    method, base = config.method, config.base_model
    spelled = {place(model.model): model.model for model in config.models}
    is_base = [
        method.has_base and base is not None and place(source.model) == place(base)
        for source in document.sources
    ]
    experts = [s for s, listed in zip(document.sources, is_base, strict=True) if not listed]
    bases = [s for s, listed in zip(document.sources, is_base, strict=True) if listed]
    _check_sources(document.sources, experts, bases, method)
    ranges = tuple(source.layer_range for source in experts)
    base_range = None
    if method.has_base:
        if not bases and len(set(ranges)) > 1:
            raise Problem(
                ".sources",
                "take different layers of the experts, so that the base must be listed as well: "
                "its `layer_range` says which of its layers they are compared with",
            )
        base_range = bases[0].layer_range if bases else ranges[0]
    models = tuple(
        ExpertModel(
            spelled[place(source.model)],
            settle(True, source.parameters, document.parameters, shared),
        )
        for source in experts
    )
    settings = settle(False, document.parameters, shared)
    part = replace(config, models=models, settings=settings, remarks=())
    return Slice(part, ranges, base_range)


def _check_sources(
    sources: Sequence[Source], experts: Sequence[Source], bases: Sequence[Source], method: Method
) -> None:
    if not experts:
        raise Problem(".sources", "lists no expert, only the base; give at least one")
    if len(bases) > 1:
        raise Problem(".sources", "lists the base twice; it is one")
    if method.num_models not in (None, len(experts)):
        raise Problem(
            ".sources",
            f"lists {len(experts)} models; the method takes {method.num_models} a slice",
        )
    seen: dict[object, int] = {}
    for i, source in enumerate(sources):
        length = source.layer_range[1] - source.layer_range[0]
        first = sources[0].layer_range[1] - sources[0].layer_range[0]
        if length != first:
            raise Problem(
                f".sources[{i}].layer_range",
                f"has {length} layers, and that of the first source {first}: every source of a "
                "slice has as many",
            )
        key = (place(source.model), source.layer_range)
        if seen.setdefault(key, i) != i:
            raise Problem(
                f".sources[{i}].model",
                f"is {shown(source.model)} again, with the same layers. Name it once, and give it "
                "a larger weight instead",
            )
