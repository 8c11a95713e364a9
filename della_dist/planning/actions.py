"""What becomes of each tensor of a part: merged, copied, taken from the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from della_dist.errors import InputError
from della_dist.planning.layout import OutputTensor
from della_dist.planning.matching import Action, Matching, match_tensors
from della_dist.planning.parts import Part
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.sources import Adapted, Stored


def match_part(part: Part, checkpoints: Sequence[CheckpointIndex]) -> Matching:
    """Match the tensors of a part by name; see `della_dist.planning.matching.match_tensors`."""
    reference, *others = (column.of(checkpoints) for column in part.columns)
    return match_tensors(
        reference,
        others,
        ignore_extra=part.config.extra_tensors == "ignore",
        base_for_missing=part.config.missing_tensors == "base",
    )


def take_over(
    parts: Sequence[Part], tensors: Iterable[OutputTensor], actions: dict[str, Action]
) -> None:
    """Copy the tensors that come out as they are: to the bit.

    Those of a checkpoint that is passed through, and those of the base that no adapter changes.
    """
    of = {name: part for part in parts for name in part.reference.tensors}
    for tensor in tensors:
        name, part = tensor.name, of[tensor.name]
        if not part.adapted and not part.config.method.passes_through:
            continue
        if actions[name] == "base" and isinstance(part.source(part.reference, name), Adapted):
            raise InputError(
                f"an expert lacks {name}, and the base's is changed by an adapter: it cannot be "
                "taken as it is. Leave `missing_tensors: base` out, or merge the adapter into the "
                "base first."
            )
        if actions[name] != "merge":
            continue
        column = part.source(part.reference, name)
        if column.dtype != tensor.dtype:
            continue
        if part.config.method.passes_through:
            scale = part.settings(name).weights
            if scale == (1.0,) and isinstance(column, Stored):
                actions[name] = "copy"
        elif part.config.has_base:
            base, *experts = part.sources(name)
            unchanged = [isinstance(e, Adapted) and not (e.of or e.terms) for e in experts]
            if all(unchanged) and not isinstance(base, Adapted):
                actions[name] = "copy"
