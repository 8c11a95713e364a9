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

from della_dist.errors import InputError
from della_dist.specs import COPY_DTYPES, FLOAT_DTYPES, CheckpointIndex, TensorEntry

Action = Literal["merge", "copy", "buffer"]

#: Errors name at most this many tensors; the rest is counted.
MAX_NAMED = 5

# Buffers that code computes and some versions of it also store: rotary frequencies, position
# numbers, causal masks. They are no parameters, so they neither have to match nor are merged.
_BUFFER = re.compile(r"(^|\.)(inv_freq|original_inv_freq|position_ids|masked_bias)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


@dataclass(frozen=True, slots=True)
class Matching:
    """What becomes of every tensor of the reference checkpoint, and what is left out."""

    actions: dict[str, Action]
    """``merge``: by the method; ``copy``: from the base, all checkpoints must hold the same bytes;
    ``buffer``: from the base, whatever the others hold."""
    tied_left_out: tuple[str, ...]
    """Stored in the reference although its config ties them: they stay tied, and unstored."""
    extra_left_out: tuple[tuple[str, int], ...]
    """(location, number of tensors) that only an expert has."""


def is_buffer(entry: TensorEntry) -> bool:
    """Tell whether a tensor is a stored buffer rather than a parameter."""
    if _BUFFER.search(entry.name):
        return True
    is_square_mask = len(entry.shape) == 4 and entry.shape[:2] == (1, 1)
    return is_square_mask and _MASK.search(entry.name) is not None


def match_tensors(
    reference: CheckpointIndex, others: Sequence[CheckpointIndex], *, ignore_extra: bool
) -> Matching:
    """Match every checkpoint of `others` to `reference` (the base, or the first expert).

    Raises
    ------
    InputError
        Naming tensors, checkpoints and numbers, if a tensor is missing, has another shape, has a
        dtype that cannot be merged, or exists only in an expert (unless `ignore_extra`).
    """
    tied = reference.tied & reference.tensors.keys()
    actions: dict[str, Action] = {}
    for name, entry in reference.tensors.items():
        if name not in tied:
            actions[name] = _action(reference, entry)
    if not actions:
        raise InputError(f"{reference.location} holds no tensors: there is nothing to merge.")
    extra_left_out = []
    for other in others:
        _refuse_untied(reference, other)
        _refuse_missing(reference, other, actions)
        _refuse_mismatched(reference, other, actions)
        extra = [
            name
            for name, entry in other.tensors.items()
            if name not in actions and name not in reference.tied and not is_buffer(entry)
        ]
        if extra and not ignore_extra:
            raise InputError(
                f"{other.location} has {_names(extra)} that {reference.location} does not have. "
                "If these are not part of the model to merge, set `extra_tensors: ignore` in the "
                f"configuration to leave them out.{_suggest(extra[0], reference)}"
            )
        if extra:
            extra_left_out.append((other.location, len(extra)))
    return Matching(actions, tuple(sorted(tied)), tuple(extra_left_out))


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


def _refuse_untied(reference: CheckpointIndex, other: CheckpointIndex) -> None:
    loose = sorted((reference.tied - other.tied) & other.tensors.keys())
    if loose:
        raise InputError(
            f"{other.location} stores {_names(loose)} as its own weights, but the config.json of "
            f"{reference.location} ties them to the embedding (tie_word_embeddings). Merging them "
            "would lose the expert's output head: untie the base, or tie the expert."
        )


def _refuse_missing(
    reference: CheckpointIndex, other: CheckpointIndex, actions: dict[str, Action]
) -> None:
    missing = [n for n, a in actions.items() if a != "buffer" and n not in other.tensors]
    if missing:
        hint = _suggest(missing[0], other)
        if set(missing) <= other.tied:
            hint = " Its config.json ties them to the embedding; the base does not."
        raise InputError(
            f"{other.location} lacks {_names(missing)} that {reference.location} has. Every "
            f"expert must be fine-tuned from the same base.{hint}"
        )


def _refuse_mismatched(
    reference: CheckpointIndex, other: CheckpointIndex, actions: dict[str, Action]
) -> None:
    wrong = []
    for name, action in actions.items():
        if action == "buffer":
            continue
        ours, theirs = reference.tensors[name], other.tensors[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} is {list(theirs.shape)}, not {list(ours.shape)}")
        elif action == "merge" and theirs.dtype not in FLOAT_DTYPES:
            raise InputError(_unmergeable(other, theirs))
        elif action == "copy" and ours.dtype != theirs.dtype:
            wrong.append(f"{name} is {theirs.dtype}, not {ours.dtype}")
    if wrong:
        raise InputError(
            f"{other.location} does not fit {reference.location}: {_listed(wrong)}. If the "
            "vocabularies differ, resize the embeddings of the expert to the base's first."
        )


def _names(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s'[: len(names) != 1]} ({_listed(sorted(names))})"


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:MAX_NAMED])
    more = len(items) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _suggest(name: str, checkpoint: CheckpointIndex) -> str:
    # difflib is quadratic: look only at names with the same last part.
    tail = name.rsplit(".", 2)[-2:]
    candidates: Iterable[str] = (n for n in checkpoint.tensors if n.rsplit(".", 2)[-2:] == tail)
    close = difflib.get_close_matches(name, list(itertools.islice(candidates, 500)), n=1)
    return f" The nearest name there is {close[0]}." if close else ""
