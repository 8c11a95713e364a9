"""Match the tensors of every checkpoint by name, and say everything that does not fit.

No model definitions: what a tensor is follows from its name, dtype and shape in the headers.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from della_dist.errors import InputError, each
from della_dist.planning.facts import model_facts
from della_dist.planning.ties import EMBEDDINGS, HEADS, ends_in
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import COPY_DTYPES, FLOAT_DTYPES
from della_dist.wording import few, listed_tensors

Action = Literal["merge", "copy", "buffer", "base"]

# Buffers that code computes and some versions of it also store: rotary frequencies, position
# numbers, causal masks. They are no parameters, so they neither have to match nor are merged.
_BUFFER = re.compile(r"(^|\.)(inv_freq|original_inv_freq|position_ids|masked_bias)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


@dataclass(frozen=True, slots=True)
class Matching:
    """What becomes of every tensor of the reference checkpoint, and what is left out."""

    actions: dict[str, Action]
    """``merge``: by the method; ``copy``: from the base, all checkpoints must hold the same bytes;
    ``buffer``: from the base, whatever the others hold; ``base``: from the base, because some
    expert has no such tensor."""
    extra_left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(location, tensors) that only an expert has."""
    missing: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(location, tensors) that an expert lacks, and the base has."""

    def notes(self, reference: str) -> tuple[str, ...]:
        """Return what a person should know of it, a line each; `reference` is a location."""
        left_out = (
            f"{location}: {listed_tensors(names)} that only it has, left out."
            for location, names in self.extra_left_out
        )
        missing = (
            f"{location}: lacks {listed_tensors(names)}, taken as they are from {reference}."
            for location, names in self.missing
        )
        return (*left_out, *missing)


def joined(matchings: Sequence[Matching]) -> Matching:
    """Return what several matchings of different tensors say together."""
    if len(matchings) == 1:
        return matchings[0]
    actions: dict[str, Action] = {}
    extra: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for matching in matchings:
        actions.update(matching.actions)
        for all_names, of_one in ((extra, matching.extra_left_out), (missing, matching.missing)):
            for location, names in of_one:
                all_names.setdefault(location, []).extend(names)
    return Matching(
        actions,
        tuple((location, tuple(names)) for location, names in extra.items()),
        tuple((location, tuple(names)) for location, names in missing.items()),
    )


def is_buffer(entry: TensorEntry) -> bool:
    """Tell whether a tensor is a stored buffer rather than a parameter."""
    if _BUFFER.search(entry.name):
        return True
    is_square_mask = len(entry.shape) == 4 and entry.shape[:2] == (1, 1)
    return is_square_mask and _MASK.search(entry.name) is not None


def match_tensors(
    reference: CheckpointIndex,
    others: Sequence[CheckpointIndex],
    *,
    ignore_extra: bool,
    base_for_missing: bool = False,
) -> Matching:
    """Match every checkpoint of `others` to `reference` (the base, or the first expert).

    Parameters
    ----------
    reference, others
        Heads are as `della_dist.planning.ties.resolve_ties` has made them.
    ignore_extra
        Whether tensors that only an expert has are left out.
    base_for_missing
        Whether tensors that an expert lacks are taken from the reference.

    Raises
    ------
    InputError
        Naming tensors, checkpoints and numbers, if a tensor is missing (unless
        `base_for_missing`), has another shape, has a dtype that cannot be merged, or exists only
        in an expert (unless `ignore_extra`).
    """
    actions = {name: _action(reference, entry) for name, entry in reference.tensors.items()}
    if not actions:
        raise InputError(f"{reference.location} holds no tensors: there is nothing to merge.")

    def differences(other: CheckpointIndex) -> tuple[tuple[str, ...], tuple[str, ...]]:
        _refuse_mismatched(reference, other, actions)
        lacks = _missing(reference, other, actions, allowed=base_for_missing)
        extra = tuple(
            name
            for name, entry in other.tensors.items()
            if name not in actions and not is_buffer(entry)
        )
        if extra and not ignore_extra:
            raise InputError(
                f"{other.location} has {listed_tensors(extra)} that {reference.location} does not "
                "have. If these are not part of the model to merge, set `extra_tensors: ignore` in "
                f"the configuration to leave them out.{_suggest(extra[0], reference)}"
            )
        return lacks, extra

    found = each(differences, others)
    for lacks, _ in found:
        actions.update(dict.fromkeys(lacks, "base"))
    return Matching(
        actions,
        tuple((o.location, extra) for o, (_, extra) in zip(others, found, strict=True) if extra),
        tuple((o.location, lacks) for o, (lacks, _) in zip(others, found, strict=True) if lacks),
    )


def _action(reference: CheckpointIndex, entry: TensorEntry) -> Action:
    if is_buffer(entry):
        return "buffer"
    if entry.dtype in FLOAT_DTYPES:
        return "merge"
    if entry.dtype in COPY_DTYPES:
        return "copy"
    raise InputError(_unmergeable(reference, entry))


def _unmergeable(checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
    return (
        f"tensor {entry.name} of {checkpoint.location} has dtype {entry.dtype}, which cannot be "
        "merged: a quantised weight means nothing without its scale. Convert the checkpoint to "
        "BF16, F16 or F32 first."
    )


def _missing(
    reference: CheckpointIndex,
    other: CheckpointIndex,
    actions: dict[str, Action],
    *,
    allowed: bool,
) -> tuple[str, ...]:
    """Return the tensors that an expert lacks; refuse them unless they are allowed."""
    needed = [name for name, action in actions.items() if action != "buffer"]
    missing = tuple(name for name in needed if name not in other.tensors)
    if not missing or (allowed and len(missing) < len(needed)):
        return missing
    hint = _suggest(missing[0], other)
    if any(ends_in(name, HEADS) for name in missing) and model_facts(other).ties_head is False:
        hint = " It has no output head, and its config.json says that it is not the embedding."
    advice = f"All must be fine-tuned from the same base.{hint}"
    if not allowed:
        advice += f" To take what it lacks from {reference.location}, set `missing_tensors: base`."
    raise InputError(
        f"{other.location} lacks {listed_tensors(missing)} that {reference.location} has"
        f"{', all of its tensors' if len(missing) == len(needed) > 1 else ''}. {advice}"
    )


def _refuse_mismatched(
    reference: CheckpointIndex, other: CheckpointIndex, actions: dict[str, Action]
) -> None:
    wrong = []
    is_of_tokens = True
    for name, action in actions.items():
        if action == "buffer" or name not in other.tensors:
            continue
        ours, theirs = reference.tensors[name], other.tensors[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} is {list(theirs.shape)}, not {list(ours.shape)}")
            is_of_tokens &= (
                ends_in(name, (*EMBEDDINGS, *HEADS)) and ours.shape[1:] == theirs.shape[1:]
            )
        elif action == "merge" and theirs.dtype not in FLOAT_DTYPES:
            raise InputError(_unmergeable(other, theirs))
        elif action == "copy" and ours.dtype != theirs.dtype:
            wrong.append(f"{name} is {theirs.dtype}, not {ours.dtype}")
            is_of_tokens = False
    if wrong:
        advice = (
            "Their vocabularies differ: `tokenizer_source: union` (or base, or one of the models) "
            "moves every row to its token."
            if is_of_tokens
            else "Every expert must be fine-tuned from the same base, of the same size."
        )
        raise InputError(
            f"{other.location} does not fit {reference.location}: "
            f"{few(wrong, longest=1000)}. {advice}"
        )


def _suggest(name: str, checkpoint: CheckpointIndex) -> str:
    # difflib is quadratic: look only at names with the same last part.
    tail = name.rsplit(".", 2)[-2:]
    candidates: Iterable[str] = (n for n in checkpoint.tensors if n.rsplit(".", 2)[-2:] == tail)
    close = difflib.get_close_matches(name, list(itertools.islice(candidates, 500)), n=1)
    return f" The nearest name there is {close[0]}." if close else ""
