"""Slices: the layers of the output, taken from ranges of layers of the checkpoints, renumbered.

A model may have several stacks of layers (an encoder for images beside the text). Slices are of the
one that config.json counts. What belongs to no layer of it comes from the first slice (embeddings,
other stacks) or from the last (the final norm, the head), and from all of its sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from della_dist.config import MergeConfig, layer_fraction
from della_dist.config.model import Slice
from della_dist.errors import InputError
from della_dist.planning.facts import model_facts, num_layers, text_config
from della_dist.planning.parts import Column, Part
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, HEADS, ends_in
from della_dist.planning.views.slice_config import says_by_layer
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.wording import few

#: What a stack of layers is called, in the models of transformers and in original code.
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers|h|blocks?|layer)\.(?=[0-9]{1,6}(?:\.|$))")
#: Stacks beside the one of a multimodal model's text.
_OTHER = re.compile(r"vision|visual|image|audio|speech|video|(^|\.)mtp\.")
_EMBEDDING = re.compile(
    r"embed|(^|\.)wte|(^|\.)wpe|(^|\.)rotary|projector|project_in|connector|aligner|merger"
)
#: Called like an embedding, and behind the layers (LFM2).
_FINAL_NORM = re.compile(r"(^|\.)embedding_norm\.")
#: Tensors with a part for each layer (Gemma 3n).
_OF_ALL_LAYERS = re.compile(r"per_layer")
_PREDICTION = re.compile(r"(^|\.)mtp\.")


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one checkpoint."""

    prefix: str
    """What stands before the number of a layer."""
    layers: Mapping[int, Mapping[str, TensorEntry]]
    """Number of the layer -> what stands behind it in a name -> tensor."""
    others: Mapping[str, TensorEntry]
    """Tensors of no layer, by name."""
    left_out: tuple[str, ...]
    """Layers that predict several tokens at once, behind those that config.json counts."""


def sliced_parts(
    config: MergeConfig, checkpoints: Sequence[CheckpointIndex]
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Return the parts of an output of slices, and what a person should know.

    Parameters
    ----------
    config
        With slices.
    checkpoints
        The inputs, in the order of the plan.

    Raises
    ------
    InputError
        If a checkpoint's layers are not to be told apart, or it has too few of them.
    """
    numbers = {c.location: i for i, c in enumerate(checkpoints)}
    used = {numbers[model] for part in config.slices for model, _, _ in part.sources()}
    stacks = {i: find_stack(checkpoints[i]) for i in sorted(used)}
    _refuse_others(checkpoints, stacks, strict=config.extra_tensors == "error")
    parts, first = [], 0
    for part in config.slices:
        parts.append(_layers(part, numbers, stacks, checkpoints, first))
        first += part.num_layers
    parts.append(_others(config.slices[0], numbers, stacks, in_front=True))
    parts.append(_others(config.slices[-1], numbers, stacks, in_front=False))
    _refuse_rows(parts[-2].reference, parts[-1].reference, checkpoints)
    notes = [
        f"{checkpoints[i].location}: the layers that predict further tokens are left out "
        f"({stack.left_out[0]} and others)."
        for i, stack in stacks.items()
        if stack.left_out
    ]
    notes += _odd_layer(checkpoints[0], stacks, parts[:-2])
    return tuple(part for part in parts if part.reference.tensors), tuple(notes)


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
    donor: CheckpointIndex, stacks: Mapping[int, Stack], parts: Sequence[Part]
) -> list[str]:
    """Return what to say of the first layer of another kind than where its number was."""
    stack = stacks.get(0)
    text = text_config(donor.documents.get("config.json", {}))
    if stack is None or says_by_layer(text):
        return []
    there: dict[int, set[str]] = {}
    for part in parts:
        for name in part.reference.tensors:
            number, rest = _split(stack.prefix, name)
            there.setdefault(number, set()).add(rest)
    for number, tensors in sorted(there.items()):
        if number in stack.layers and tensors != set(stack.layers[number]):
            return [
                f"layer {number} has other tensors than that of {donor.location}: if its code "
                "tells layers by their number, it will take it for another. Take slices that keep "
                "the pattern."
            ]
    return []


def _split(prefix: str, name: str) -> tuple[int, str]:
    number = re.match(r"[0-9]+", name[len(prefix) :])
    assert number is not None
    return int(number[0]), name[len(prefix) + number.end() :]


def has_two_ends(config: MergeConfig) -> bool:
    """Return whether the output's head is made of other checkpoints than its embedding."""
    if not config.slices:
        return False
    first, last = config.slices[0], config.slices[-1]
    return [s[0] for s in first.sources()] != [s[0] for s in last.sources()] or (
        first.config.settings_for(CAUSAL_HEAD, 0.0) != last.config.settings_for(CAUSAL_HEAD, 0.0)
    )


def _layers(
    part: Slice,
    numbers: Mapping[str, int],
    stacks: Mapping[int, Stack],
    checkpoints: Sequence[CheckpointIndex],
    first: int,
) -> Part:
    """Return the layers of a slice, which begin at number `first` of the output."""
    columns, layers = [], {}
    prefix = stacks[numbers[part.sources()[0][0]]].prefix
    for model, (start, stop), _ in part.sources():
        stack = stacks[numbers[model]]
        if stop > len(stack.layers):
            raise InputError(
                f"{checkpoints[numbers[model]].location} has {len(stack.layers)} layers, and "
                f"`layer_range: [{start}, {stop}]` asks for more."
            )
        tensors = {}
        for layer in range(start, stop):
            place = (layer - start) / (part.num_layers - 1) if part.num_layers > 1 else 1.0
            for rest, entry in stack.layers[layer].items():
                name = f"{prefix}{first + layer - start}{rest}"
                tensors[name] = entry
                layers[name] = place
        columns.append(Column(numbers[model], tensors))
    return Part(part.config, tuple(columns), layers)


def _others(
    part: Slice, numbers: Mapping[str, int], stacks: Mapping[int, Stack], *, in_front: bool
) -> Part:
    """Return the tensors of no layer that a slice gives to the output."""
    models = {model.model: model for model in reversed(part.config.models)}
    # A model that gives several ranges of layers has one embedding.
    kept = tuple(model for model in part.config.models if models[model.model] is model)
    columns = []
    for model in dict.fromkeys(model for model, _, _ in part.sources()):
        others = stacks[numbers[model]].others
        tensors = {n: e for n, e in others.items() if _is_in_front(n) == in_front}
        columns.append(Column(numbers[model], tensors))
    config = replace(part.config, models=kept)
    return Part(config, tuple(columns), layer_fraction(columns[0].tensors))


def _is_in_front(name: str) -> bool:
    if ends_in(name, HEADS) or _FINAL_NORM.search(name):
        return False
    is_other_stack = any(part.isdigit() for part in name.split(".")) or _OTHER.search(name)
    return bool(is_other_stack or ends_in(name, EMBEDDINGS) or _EMBEDDING.search(name))


def find_stack(checkpoint: CheckpointIndex) -> Stack:
    """Return the stack of layers that slices are of.

    Raises
    ------
    InputError
        If there is none, or there are several that it could be.
    """
    if model_facts(checkpoint).is_encoder_decoder:
        raise InputError(
            f"{checkpoint.location} is an encoder and a decoder, and `slices` does not say of "
            "which it takes layers. Merge whole models (`models`)."
        )
    found: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    for name, entry in checkpoint.tensors.items():
        match = _LAYER.match(name)
        if match is not None and not _OTHER.search(name):
            number, rest = _split(match[0], name)
            found.setdefault(match[0], {}).setdefault(number, {})[rest] = entry
    prefix, count = _chosen(checkpoint, {p: set(layers) for p, layers in found.items()})
    layers = {i: tensors for i, tensors in found[prefix].items() if i < count}
    ours = re.compile(re.escape(prefix) + "[0-9]")
    outside = {n: e for n, e in checkpoint.tensors.items() if not ours.match(n)}
    left_out = [n for n in outside if _PREDICTION.search(n)]
    left_out += [f"{prefix}{i}{r}" for i, rest in found[prefix].items() if i >= count for r in rest]
    others = {n: e for n, e in outside.items() if not _PREDICTION.search(n)}
    if of_all := next((name for name in others if _OF_ALL_LAYERS.search(name)), None):
        raise InputError(
            f"{checkpoint.location}: {of_all} has a part for each layer, which `slices` cannot "
            "take apart. Merge whole models (`models`)."
        )
    return Stack(prefix, layers, others, tuple(left_out))


def _chosen(checkpoint: CheckpointIndex, found: Mapping[str, set[int]]) -> tuple[str, int]:
    """Return the prefix of the stack that is meant, and how many layers it has."""
    stated = num_layers(checkpoint)

    def fits(numbers: set[int]) -> bool:
        count = len(numbers) if stated is None else stated
        return set(range(count)) <= numbers

    fitting = [prefix for prefix, numbers in found.items() if fits(numbers)]
    if len(fitting) == 1:
        return fitting[0], len(found[fitting[0]]) if stated is None else stated
    if not fitting:
        has = ", ".join(_counted(found)) or "none"
        said = "" if stated is None else f", and its config.json says {stated}"
        raise InputError(
            f"{checkpoint.location}: its layers are not to be found, of which `slices` takes "
            f"some: it has {has}{said}. Merge whole models (`models`), or correct the checkpoint."
        )
    raise InputError(
        f"{checkpoint.location} has several stacks of layers ({', '.join(_counted(found))}), and "
        "`slices` does not say which is meant. Merge whole models (`models`)."
    )


def _counted(found: Mapping[str, set[int]]) -> Iterator[str]:
    for prefix, numbers in found.items():
        yield f"{len(numbers)} of {prefix}*"
