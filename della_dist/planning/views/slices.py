"""Slices: the layers of the output, taken from ranges of layers of the checkpoints, renumbered.

Of the stacks that a model has, those are cut that the configuration names: that of the text where
it names none. What stands beside their layers comes from the first slice of its stack (embeddings)
or from the last (the final norm, the head of a text), and from all of its sources; what belongs to
no such stack, other stacks included, from the first slice of the text, or of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from della_dist.config import MergeConfig, layer_fraction
from della_dist.config.modules import DECODER, TEXT, Module, Slice
from della_dist.errors import InputError, each
from della_dist.planning.facts import count_keys, described
from della_dist.planning.parts import Column, Part
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, ends_in
from della_dist.planning.views.slice_config import Layer, says_by_layer, what_is_lost
from della_dist.planning.views.stacks import (
    Stack,
    find_stack,
    is_of_all_layers,
    outside,
    place_of,
    shares_embeddings,
    split,
)
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.wording import few

#: Number of a checkpoint -> its stacks that are put together of slices, by what they are called.
Stacks = Mapping[int, Mapping[str, Stack]]


def _by_stack(config: MergeConfig) -> dict[str, Module]:
    return {module.stack: module for module in config.modules}


def layers_of(
    config: MergeConfig, checkpoints: Sequence[CheckpointIndex]
) -> dict[str, list[Layer]]:
    """Return what each layer of every stack is made of, by what it is called.

    The first source of a slice tells.
    """
    documents = {c.location: c.documents.get("config.json", {}) for c in checkpoints}
    return {
        stack: [
            (described(documents[model], stack), layer)
            for part in module.slices
            for model, layers, _ in part.sources()[:1]
            for layer in range(*layers)
        ]
        for stack, module in _by_stack(config).items()
    }


def sliced_parts(
    config: MergeConfig, checkpoints: Sequence[CheckpointIndex]
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Return the parts of an output of slices, and what a person should know.

    Parameters
    ----------
    config
        With modules that are called like stacks (`della_dist.planning.views.modules`).
    checkpoints
        The inputs, in the order of the plan.

    Raises
    ------
    InputError
        If a checkpoint's layers are not to be told apart, or it has too few of them.
    """
    numbers = {c.location: i for i, c in enumerate(checkpoints)}
    used = sorted({numbers[model] for part in config.slices for model, _, _ in part.sources()})
    modules = _by_stack(config)
    # What belongs to none of them goes with the text, or the decoder.
    names = sorted(modules, key=lambda name: name not in (TEXT, DECODER))
    stacks = {i: {name: find_stack(checkpoints[i], name) for name in names} for i in used}
    parts: list[Part] = []
    notes: list[str] = []
    each(
        lambda source: _refuse_range(*source, stacks, checkpoints),
        [
            (module, numbers[model], layers)
            for module in modules.values()
            for part in module.slices
            for model, layers, _ in part.sources()
        ],
    )
    for name, module in modules.items():
        of_it = {i: found[name] for i, found in stacks.items()}
        _refuse_others(checkpoints, of_it, strict=config.extra_tensors == "error")
        layers = list(_layers(module, numbers, of_it, checkpoints))
        parts += layers
        notes += _odd_layer(checkpoints[0], name, of_it, layers)
    left_out = [
        f"{checkpoints[i].location}: the layers that predict further tokens are left out "
        f"({stack.left_out[0]} and others)."
        for i, found in stacks.items()
        for stack in found.values()
        if stack.left_out
    ]
    others = {i: _others(checkpoints[i], stacks[i]) for i in used}
    for name, module in modules.items():
        ends = [
            _end(part, checkpoints, numbers, others, (name, in_front))
            for part, in_front in ((module.slices[0], True), (module.slices[-1], False))
        ]
        if name == TEXT:
            _refuse_rows(ends[0].reference, ends[1].reference, checkpoints)
        parts += ends
    _refuse_other_shapes(parts, stacks, checkpoints)
    _refuse_lost(config, checkpoints)
    return tuple(part for part in parts if part.reference.tensors), (*left_out, *notes)


def _refuse_range(
    module: Module,
    number: int,
    layers: tuple[int, int],
    stacks: Stacks,
    checkpoints: Sequence[CheckpointIndex],
) -> None:
    """Refuse layers that a checkpoint does not have."""
    has = len(stacks[number][module.stack].layers)
    if layers[1] > has:
        of_which = "" if module.name is None else f" in its {module.name}"
        raise InputError(
            f"{checkpoints[number].location} has {has} layers{of_which}, and `layer_range: "
            f"{list(layers)}` asks for more."
        )


def _refuse_others(
    checkpoints: Sequence[CheckpointIndex], stacks: Mapping[int, Stack], *, strict: bool
) -> None:
    """Refuse models whose layers cannot stand in one: by their names, or their sizes."""
    (number, first), *others = stacks.items()
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for tensors in first.layers.values():
        for rest, entry in tensors.items():
            shapes.setdefault(rest, set()).add(entry.shape)
    for i, stack in others:
        if stack.prefix != first.prefix:
            raise InputError(
                f"{checkpoints[i].location} calls its layers {stack.prefix}*, and "
                f"{checkpoints[number].location} {first.prefix}*: they are not of one model."
            )
        ours = {rest for tensors in stack.layers.values() for rest in tensors}
        if strict and (odd := sorted(ours ^ set(shapes))):
            has, lacks = (i, number) if odd[0] in ours else (number, i)
            raise InputError(
                f"layers of {checkpoints[has].location} have tensors that those of "
                f"{checkpoints[lacks].location} lack: *{few(odd)}. They do not make one model; if "
                "that is not so, set `extra_tensors: ignore`."
            )
        for layer, tensors in stack.layers.items():
            for rest, entry in tensors.items():
                if rest in shapes and entry.shape not in shapes[rest]:
                    there = " or ".join(map(str, map(list, sorted(shapes[rest]))))
                    raise InputError(
                        f"{checkpoints[i].location}: {stack.prefix}{layer}{rest} is "
                        f"{list(entry.shape)}, and in {checkpoints[number].location} {there}: "
                        "layers of other sizes do not make one model."
                    )


def _refuse_lost(config: MergeConfig, checkpoints: Sequence[CheckpointIndex]) -> None:
    """Refuse slices of which config.json would say what is not so."""
    donor = checkpoints[0]
    document = donor.documents.get("config.json", {})
    for stack, layers in layers_of(config, checkpoints).items():
        lost = [] if stack == TEXT else what_is_lost(described(document, stack), document, layers)
        for what in lost:
            raise InputError(
                f"{donor.location}: in its config.json, {what}, so that the {stack} cannot be put "
                f"together like this. Leave `modules.{stack}` out, or keep its layers up to there "
                "as they are."
            )


def _refuse_rows(front: Column, back: Column, checkpoints: Sequence[CheckpointIndex]) -> None:
    """Refuse an embedding and a head of other numbers of tokens."""
    head = back.tensors.get(CAUSAL_HEAD)
    embeddings = [e for n, e in front.tensors.items() if ends_in(n, EMBEDDINGS)]
    if head is None or not embeddings or head.shape[:1] in {e.shape[:1] for e in embeddings}:
        return
    raise InputError(
        f"{checkpoints[back.checkpoint].location}: its head has {head.shape[0]} rows, and the "
        f"embedding of {checkpoints[front.checkpoint].location} {embeddings[0].shape[0]}: the "
        "vocabularies differ. Let the first and the last slice be of one vocabulary."
    )


def _odd_layer(
    donor: CheckpointIndex, name: str, stacks: Mapping[int, Stack], parts: Sequence[Part]
) -> list[str]:
    """Return what to say of the first layer of another kind than where its number was."""
    stack = stacks.get(0)
    config = donor.documents.get("config.json", {})
    if stack is None or says_by_layer(described(config, name), count_keys(config, name)):
        return []
    there: dict[int, set[str]] = {}
    for part in parts:
        for tensor in part.reference.tensors:
            number, rest = split(stack.prefix, tensor)
            there.setdefault(number, set()).add(rest)
    for number, tensors in sorted(there.items()):
        if number in stack.layers and tensors != set(stack.layers[number]):
            return [
                f"layer {number} has other tensors than that of {donor.location}: if its code "
                "tells layers by their number, it will take it for another. Take slices that keep "
                "the pattern."
            ]
    return []


def _refuse_other_shapes(
    parts: Sequence[Part], stacks: Stacks, checkpoints: Sequence[CheckpointIndex]
) -> None:
    """Refuse what stands beside the layers in other sizes than the output's config.json says."""
    donor = checkpoints[0]
    of_layers = tuple(stack.prefix for found in stacks.values() for stack in found.values())
    for part in parts:
        for name, entry in part.reference.tensors.items():
            there = donor.tensors.get(name)
            if there is None or there.shape == entry.shape or name.startswith(of_layers):
                continue
            raise InputError(
                f"{checkpoints[part.reference.checkpoint].location}: {name} is "
                f"{list(entry.shape)}, and in {donor.location}, whose config.json the output has, "
                f"{list(there.shape)}. Take slices of models of one size."
            )


def has_two_ends(config: MergeConfig) -> bool:
    """Return whether the output's head is made of other checkpoints than its embedding."""
    text = _by_stack(config).get(TEXT)
    if text is None:
        return False
    first, last = text.slices[0], text.slices[-1]
    return [s[0] for s in first.sources()] != [s[0] for s in last.sources()] or (
        first.config.settings_for(CAUSAL_HEAD, 0.0) != last.config.settings_for(CAUSAL_HEAD, 0.0)
    )


def _layers(
    module: Module,
    numbers: Mapping[str, int],
    stacks: Mapping[int, Stack],
    checkpoints: Sequence[CheckpointIndex],
) -> Iterator[Part]:
    """Yield the layers of every slice of a module, numbered from 0."""
    first = 0
    for part in module.slices:
        columns, layers = [], {}
        prefix = stacks[numbers[part.sources()[0][0]]].prefix
        for model, (start, stop), _ in part.sources():
            stack = stacks[numbers[model]]
            tensors, names = {}, {}
            for layer in range(start, stop):
                place = (layer - start) / (part.num_layers - 1) if part.num_layers > 1 else 1.0
                for rest, entry in stack.layers[layer].items():
                    name = f"{prefix}{first + layer - start}{rest}"
                    tensors[name] = entry
                    layers[name] = place
                    if start != first:
                        names[name] = f"{prefix}{layer}{rest}"
            columns.append(Column(numbers[model], tensors, names))
        yield Part(part.config, tuple(columns), layers)
        first += part.num_layers


#: With which stack a tensor is taken, and whether in front of it -> name -> tensor.
Others = Mapping[tuple[str, bool], Mapping[str, TensorEntry]]


def _others(checkpoint: CheckpointIndex, stacks: Mapping[str, Stack]) -> Others:
    """Return the tensors of a checkpoint that are of no layer.

    Raises
    ------
    InputError
        If one of them is made of parts for every layer of a stack.
    """
    shares = shares_embeddings(checkpoint)
    others: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    for name, entry in outside(checkpoint, stacks.values()).items():
        if is_of_all_layers(name):
            raise InputError(
                f"{checkpoint.location}: {name} has a part for each layer, which `slices` cannot "
                "take apart. Merge whole models (`models`)."
            )
        place = place_of(name, stacks, shares_embeddings=shares)
        others.setdefault(place, {})[name] = entry
    return others


def _end(
    part: Slice,
    checkpoints: Sequence[CheckpointIndex],
    numbers: Mapping[str, int],
    others: Mapping[int, Others],
    place: tuple[str, bool],
) -> Part:
    """Return the tensors of no layer that a slice gives to the output."""
    models = {model.model: model for model in reversed(part.config.models)}
    # A model that gives several ranges of layers has one embedding.
    kept = tuple(model for model in part.config.models if models[model.model] is model)
    columns = [
        Column(numbers[model], others[numbers[model]].get(place, {}))
        for model in dict.fromkeys(model for model, _, _ in part.sources())
    ]
    config = replace(part.config, models=kept)
    fractions = layer_fraction(checkpoints[columns[0].checkpoint].tensors)
    return Part(config, tuple(columns), {name: fractions[name] for name in columns[0].tensors})
