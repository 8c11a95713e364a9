"""The stacks of layers of a checkpoint: which it has, what is of them, and what stands beside them.

A model has one, or an encoder and a decoder, or one for text with others beside it (images). By its
name in the configuration and by config.json, which counts its layers, a stack is told from others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from della_dist.config.modules import DECODER, ENCODER, TEXT, VISION
from della_dist.errors import InputError
from della_dist.planning.facts import model_facts, nested, num_layers
from della_dist.planning.ties import EMBEDDINGS, HEADS, SHARED, SHARING, ends_in
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry

#: What a stack of layers is called, in the models of transformers and in original code.
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers|h|blocks?|layer)\.(?=[0-9]{1,6}(?:\.|$))")
_VISION = re.compile(r"vision|visual|image")
#: Stacks beside the one of a multimodal model's text.
_OTHER = re.compile(rf"{_VISION.pattern}|audio|speech|video|(^|\.)mtp\.")
_SIDE = re.compile(r"(?:^|.*?\.)(encoder|decoder)\.")
_VISION_HOME = re.compile(rf".*?(?:{_VISION.pattern})[^.]*\.")
_EMBEDDING = re.compile(
    r"embed|(^|\.)wte|(^|\.)wpe|(^|\.)rotary|projector|project_in|connector|aligner|merger"
)
#: What stands before the layers of a stack that is not of text alone.
_BEGINNING = re.compile(r"embed|conv|patch|position|pre_la?y|ln_pre|layernorm_pre|rotary")
#: Called like an embedding, and behind the layers (LFM2).
_FINAL_NORM = re.compile(r"(^|\.)embedding_norm\.")
#: Tensors with a part for each layer (Gemma 3n, weighted sums of layers).
_OF_ALL_LAYERS = re.compile(r"per_layer|(^|\.)layer_weights$")
_PREDICTION = re.compile(r"(^|\.)mtp\.")
#: In layer 0 alone, and read by all layers (T5); where all have one, it is of the layer (umT5).
_IN_THE_FIRST = re.compile(r"relative_attention_bias")


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one checkpoint."""

    prefix: str
    """What stands before the number of a layer."""
    layers: Mapping[int, Mapping[str, TensorEntry]]
    """Number of the layer -> what stands behind it in a name -> tensor."""
    beside: tuple[str, ...]
    """Tensors that are called as if they were of the first layer, and are of all."""
    left_out: tuple[str, ...]
    """Layers that predict several tokens at once, behind those that config.json counts."""


def outside(checkpoint: CheckpointIndex, stacks: Iterable[Stack]) -> dict[str, TensorEntry]:
    """Return the tensors of a checkpoint that are of none of its stacks, nor left out."""
    of_layers: set[str] = set()
    for stack in stacks:
        of_layers.update(stack.left_out)
        for number, tensors in stack.layers.items():
            of_layers.update(f"{stack.prefix}{number}{rest}" for rest in tensors)
    return {name: e for name, e in checkpoint.tensors.items() if name not in of_layers}


def place_of(
    name: str, stacks: Mapping[str, Stack], *, shares_embeddings: bool
) -> tuple[str, bool]:
    """Return with which stack a tensor outside of them is taken, and whether in front of it.

    Parameters
    ----------
    name
        Of the tensor.
    stacks
        Those of its checkpoint that are put together of slices, by what they are called; first the
        one that takes what belongs to none.
    shares_embeddings
        Whether an encoder and a decoder have one embedding.
    """
    main = next(iter(stacks))
    home = _vision_home(stacks[VISION].prefix) if VISION in stacks else None
    if home is not None and name.startswith(home):
        return VISION, _BEGINNING.search(name, len(home)) is not None
    if main == TEXT:
        return TEXT, _is_in_front(name)
    side = _SIDE.match(name)
    is_shared = shares_embeddings and ends_in(name, SHARING)
    if side is None or side[1] not in stacks or is_shared:
        return main, True  # a head too: where it is the embedding, it stays so
    is_beside = name in stacks[side[1]].beside
    return side[1], is_beside or _BEGINNING.search(name, side.end()) is not None


def shares_embeddings(checkpoint: CheckpointIndex) -> bool:
    """Return whether the encoder and the decoder of a checkpoint may have one embedding."""
    config = checkpoint.documents.get("config.json", {})
    own = {e.shape for name, e in checkpoint.tensors.items() if ends_in(name, SHARING)}
    is_stored = any(ends_in(name, SHARED) for name in checkpoint.tensors)
    return is_stored or (
        len(own) == 1 and config.get("share_encoder_decoder_embeddings") is not False
    )


def is_of_all_layers(name: str) -> bool:
    """Return whether a tensor is made of a part for each layer of a stack."""
    return _OF_ALL_LAYERS.search(name) is not None


def _vision_home(prefix: str) -> str:
    found = _VISION_HOME.match(prefix)
    assert found is not None
    return found[0]


def _is_in_front(name: str) -> bool:
    if ends_in(name, HEADS) or _FINAL_NORM.search(name):
        return False
    is_other_stack = any(part.isdigit() for part in name.split(".")) or _OTHER.search(name)
    return bool(is_other_stack or ends_in(name, EMBEDDINGS) or _EMBEDDING.search(name))


def stacks_of(checkpoint: CheckpointIndex) -> tuple[str, ...]:
    """Return the stacks of a checkpoint that slices may be of."""
    if model_facts(checkpoint).is_encoder_decoder:
        return (ENCODER, DECODER)
    config = checkpoint.documents.get("config.json", {})
    has_images = nested(config, "vision_config") or any(
        _VISION.search(prefix) for prefix in _prefixes(checkpoint)
    )
    return (TEXT, VISION) if has_images else (TEXT,)


def has_one_stack(checkpoint: CheckpointIndex) -> bool:
    """Return whether there is no doubt of which layers slices are."""
    beside = (_OTHER.search(p) and not _PREDICTION.search(p) for p in _prefixes(checkpoint))
    return stacks_of(checkpoint) == (TEXT,) and not any(beside)


def find_stack(checkpoint: CheckpointIndex, stack: str) -> Stack:
    """Return a stack of layers that slices are of.

    Raises
    ------
    InputError
        If there is none, or there are several that it could be.
    """
    if (stack in (ENCODER, DECODER)) != model_facts(checkpoint).is_encoder_decoder:
        raise InputError(
            f"{checkpoint.location} has no {stack} by its config.json, which other models of these "
            "slices have. Take layers of models of one kind."
        )
    found: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    for name, entry in checkpoint.tensors.items():
        match = _LAYER.match(name)
        if match is not None:
            number, rest = split(match[0], name)
            found.setdefault(match[0], {}).setdefault(number, {})[rest] = entry
    prefix, count = _chosen(checkpoint, {p: set(layers) for p, layers in found.items()}, stack)
    layers = {i: tensors for i, tensors in found[prefix].items() if i < count}
    left_out = []
    if stack == TEXT:
        left_out = [n for n in checkpoint.tensors if _PREDICTION.search(n)]
        behind = {i: tensors for i, tensors in found[prefix].items() if i >= count}
        left_out += [f"{prefix}{i}{rest}" for i, tensors in behind.items() for rest in tensors]
    later = {rest for i, rests in layers.items() if i > 0 for rest in rests}
    beside = [r for r in layers[0] if count > 1 and r not in later and _IN_THE_FIRST.search(r)]
    layers[0] = {rest: entry for rest, entry in layers[0].items() if rest not in beside}
    return Stack(prefix, layers, tuple(f"{prefix}0{rest}" for rest in beside), tuple(left_out))


def _prefixes(checkpoint: CheckpointIndex) -> set[str]:
    """Return what stands before the numbers of layers, of whatever stack."""
    return {match[0] for name in checkpoint.tensors if (match := _LAYER.match(name)) is not None}


def _is_of(prefix: str, stack: str) -> bool:
    if stack == TEXT:
        return not _OTHER.search(prefix)
    if stack == VISION:
        return _VISION.search(prefix) is not None
    # One that is of neither side makes it doubtful which the other ones are of.
    side = _SIDE.match(prefix)
    return not _VISION.search(prefix) and (side is None or side[1] == stack)


def _chosen(
    checkpoint: CheckpointIndex, found: Mapping[str, set[int]], stack: str
) -> tuple[str, int]:
    """Return the prefix of the stack that is meant, and how many layers it has."""
    stated = num_layers(checkpoint, stack)
    of_it = {prefix: numbers for prefix, numbers in found.items() if _is_of(prefix, stack)}
    if stack != TEXT and stated is None:
        raise InputError(
            f"{checkpoint.location}: its config.json does not say how many layers its {stack} has, "
            "so that it is not certain which are meant. Merge whole models (`models`)."
        )

    def fits(numbers: set[int]) -> bool:
        if stack != TEXT:  # nothing is left out of it
            return stated is not None and set(range(stated)) == numbers
        return set(range(len(numbers) if stated is None else stated)) <= numbers

    fitting = [prefix for prefix, numbers in of_it.items() if fits(numbers)]
    has_doubtful = stack in (ENCODER, DECODER) and not all(map(_SIDE.match, of_it))
    if len(fitting) == 1 and not has_doubtful:
        return fitting[0], len(of_it[fitting[0]]) if stated is None else stated
    its = "its layers" if stack == TEXT else f"the layers of its {stack}"
    if not fitting:
        has = ", ".join(_counted(of_it)) or "none"
        said = "" if stated is None else f", and its config.json says {stated}"
        raise InputError(
            f"{checkpoint.location}: {its} are not to be found, of which `slices` takes "
            f"some: it has {has}{said}. Merge whole models (`models`), or correct the checkpoint."
        )
    raise InputError(
        f"{checkpoint.location} has several stacks of layers ({', '.join(_counted(of_it))}), and "
        "`slices` does not say which is meant. Merge whole models (`models`)."
    )


def _counted(found: Mapping[str, set[int]]) -> Iterator[str]:
    for prefix, numbers in found.items():
        yield f"{len(numbers)} of {prefix}*"


def split(prefix: str, name: str) -> tuple[int, str]:
    """Return the number of the layer that stands in a name behind `prefix`, and what follows."""
    number = re.match(r"[0-9]+", name[len(prefix) :])
    assert number is not None
    return int(number[0]), name[len(prefix) + number.end() :]
