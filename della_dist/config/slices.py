"""``slices`` and ``modules``: an output put together of layers, every slice merged by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from della_dist.config.base import Base
from della_dist.config.methods import Method
from della_dist.config.model import ExpertModel, MergeConfig
from della_dist.config.modules import ALL_LAYERS, TEXT, Module, Slice, stack_called
from della_dist.config.problem import Problem, gathering, shown, together
from della_dist.config.rescale import with_rescale
from della_dist.config.schema import Block, Document, ModuleDocument, SliceDocument, Source
from della_dist.config.settings import Setting
from della_dist.locations import place

#: ``(of_experts, *blocks)`` to settings; see `della_dist.config.load`.
Settle = Callable[..., dict[str, Setting[Any]]]
#: The slices of every module by its name; None is the name of slices at the top level. Empty: whole
#: models are merged.
Modules = Mapping[str | None, Sequence[SliceDocument]]


def lifted(document: Document) -> Document:
    """Return a document that says at the top level what its only module, or every slice, says.

    Raises
    ------
    Problem
        If more than one of `models`, `slices` and `modules` is given.
    """
    given = [key for key in ("modules", "slices", "models") if getattr(document, key)]
    if len(given) > 1:
        *others, last = (f"`{key}`" for key in given)
        which = "both" if len(given) == 2 else "all"
        raise Problem("", f"{', '.join(others)} and {last} are {which} given; keep one of them")
    document = _with_base_of_slices(document)
    if len(document.modules) != 1:
        return document
    (module,) = document.modules.values()
    said = {
        "models": module.models,
        "slices": module.slices,
        "parameters": _together(module.parameters, document.parameters),
    }
    return document.model_copy(update=said)


def _with_base_of_slices(document: Document) -> Document:
    """Return a document that names the base that all slices name; refuse several."""
    found = [(f"slices[{i}]", part.base_model) for i, part in enumerate(document.slices)]
    for name, module in document.modules.items():
        where = f"modules.{name}.slices"
        found += [(f"{where}[{i}]", part.base_model) for i, part in enumerate(module.slices)]
    given = [(f"{where}.base_model", base) for where, base in found if base is not None]
    if not given:
        return document
    top = document.base
    first = given[0][1] if top is None else top
    advice = "one merge has one base. Write it at the top level"
    with gathering() as problems:
        for where, own in given:
            if place(own) != place(first):
                problems.add(
                    where,
                    f"is {shown(own)}, and elsewhere it is {shown(first)}: {advice}, and merge "
                    "layers of another one in a document of their own",
                )
    if top is not None:
        return document
    if len(given) < len(found):
        raise Problem(given[0][0], f"is not said of every slice: {advice}")
    return document.model_copy(update={"base_model": Base(first)})


def module_documents(document: Document) -> Modules:
    """Return the slices of every module, with parameters that hold for all of a module in each.

    Parameters
    ----------
    document
        As `lifted` returns it.

    Raises
    ------
    Problem
        If a slice has a `rescale` that means nothing for the method.
    """
    method = document.merge_method
    if document.slices:
        name = next(iter(document.modules), None)
        where = "" if name is None else f"modules.{name}."
        return {name: _with_parameters(document.slices, {}, method, where)}
    if document.models:
        return {}
    modules: dict[str | None, Sequence[SliceDocument]] = {}
    for name, module in document.modules.items():
        where = f"modules.{name}."
        own = with_rescale(module.parameters, method, f"{where}parameters.rescale")
        slices = module.slices or (_whole(module),)
        modules[name] = _with_parameters(slices, own, method, where)
    return modules


def _with_parameters(
    slices: Sequence[SliceDocument], shared: Block, method: str, where: str
) -> list[SliceDocument]:
    blocks = [
        with_rescale(part.parameters, method, f"{where}slices[{i}].parameters.rescale")
        for i, part in enumerate(slices)
    ]
    return [
        part.model_copy(update={"parameters": _together(block, shared)})
        for part, block in zip(slices, blocks, strict=True)
    ]


def _whole(module: ModuleDocument) -> SliceDocument:
    """Return the slice that has all layers of the models of a module."""
    sources = [
        Source.model_construct(
            model=entry.model,
            layer_range=ALL_LAYERS,
            rename=entry.rename,
            parameters=entry.parameters,
        )
        for entry in module.models
    ]
    return SliceDocument.model_construct(sources=tuple(sources), parameters={})


def _together(first: Block, second: Block) -> Block:
    """Return the parameters of two blocks; the second holds where the first says nothing."""
    both = {name: first[name].then(second.get(name)) for name in first}
    return {**second, **both}


def with_modules(
    config: MergeConfig, documents: Modules, shared: Block, settle: Settle
) -> MergeConfig:
    """Return `config`, whose models are all that any slice names, with its modules.

    Parameters of a source come before those of its slice, and those before the shared ones.

    Raises
    ------
    Problem
        All that is wrong with the slices.
    """

    def made(name: str | None, i: int, document: SliceDocument) -> Slice | Problem:
        try:
            return _slice(config, document, shared, settle)
        except Problem as problem:
            module = "" if name is None else f"modules.{name}."
            if document.sources[0].layer_range == ALL_LAYERS:
                return Problem(f"{module}models", problem.message)
            return problem.inside(f"{module}slices[{i}]")

    found = {
        name: [made(name, i, document) for i, document in enumerate(slices)]
        for name, slices in documents.items()
    }
    problems = _repeated(documents)
    problems += [one for slices in found.values() for one in slices if isinstance(one, Problem)]
    if problems:
        raise together(problems)
    modules = [
        Module(
            name if name is None else stack_called(name),
            tuple(one for one in slices if isinstance(one, Slice)),
        )
        for name, slices in found.items()
    ]
    if len(modules) == 1 and modules[0].name == TEXT:
        modules = [replace(modules[0], name=None)]
    return replace(config, modules=tuple(modules))


def _repeated(documents: Modules) -> list[Problem]:
    """Return what is wrong with names that are those of one stack."""
    first: dict[str | None, str | None] = {}
    return [
        Problem(f"modules.{name}", f"is the same stack of layers as `modules.{known}`")
        for name in documents
        if (known := first.setdefault(name and stack_called(name), name)) != name
    ]


def distinct_models(documents: Modules, base: str | None, *, without_base: bool) -> list[str]:
    """Return the models that slices name, in their order; perhaps without the base."""
    names: dict[str, str] = {}
    for slices in documents.values():
        for source in (source for document in slices for source in document.sources):
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
    if method.base_among == "first":
        experts = _base_first(experts, config.models[0].model)
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


def _base_first(sources: Sequence[Source], base: str) -> list[Source]:
    bases = [source for source in sources if place(source.model) == place(base)]
    if len(bases) != 1:
        raise Problem(
            ".sources",
            f"{'list the base twice' if bases else 'lack the base'}, {shown(base)}; the method "
            "goes from it to the other model of every slice",
        )
    return sorted(sources, key=lambda source: source is not bases[0])


def _check_sources(
    sources: Sequence[Source], experts: Sequence[Source], bases: Sequence[Source], method: Method
) -> None:
    if not experts:
        raise Problem(".sources", "lists no expert, only the base; give at least one")
    if len(bases) > 1:
        raise Problem(".sources", "lists the base twice; it is one")
    if (wrong := method.wrong_number(len(experts))) is not None:
        raise Problem(".sources", f"lists {len(experts)} models; the method takes {wrong} a slice")
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
