"""A first configuration for models that were looked at, with the reasons for what is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from della_dist.locations import short_names
from della_dist.report.check import CheckSummary, ModelCheck, PairCheck, format_percent
from della_dist.report.remarks import SAME_DELTA_COSINE

#: Deltas of experts that have the same role are at least so much alike.
ALIKE_COSINE = 0.5
#: Of `wudi`, by the families of the README ("What merges keep"): the best in their worst case, and
#: of experts that are far from their base.
NEAR_LAMBDA, FAR_LAMBDA = 0.8, 0.6


def proposal(base: str, found: CheckSummary) -> str:
    """Return a configuration as YAML, with comments.

    Parameters
    ----------
    base
        The location of the base.
    found
        What a look at base and experts found; none of them is refused.
    """
    used = [one for one in found.models if one.verdict != "copy"] or list(found.models)
    names = dict(
        zip(
            [one.model for one in found.models],
            short_names([one.model for one in found.models]),
            strict=True,
        )
    )
    twins = [pair for pair in found.pairs if pair.delta_cosine > SAME_DELTA_COSINE]
    lines = [
        f"# {found.num_tensors:,} of {found.num_compared:,} tensors were looked at; "
        "`della-dist check` has it all.",
        *_method(used, found.pairs),
        f"base_model: {_quoted(base)}",
        "models:",
    ]
    for one in found.models:
        copy = one.verdict == "copy"
        said = (
            "an untouched copy of the base, left out"
            if copy
            else f"delta {format_percent(one.relative_delta)} of the base's norm"
        )
        same = [_other(pair, one.model, names) for pair in twins if one.model in pair.models]
        if same:
            said += f"; nearly the same fine-tune as {', '.join(same)}, so they share a weight"
        if one.verdict == "damaged":
            said += "; DAMAGED, as `della-dist check` says: replace its files first"
        weight = 1.0 / (1 + len(same))
        lead = "# " if copy and len(used) < len(found.models) else "  "
        lines += [
            f"{lead}- model: {_quoted(one.model)} # {said}",
            f"{lead}  parameters: {{weight: {weight:.3g}}}",
        ]
    dtype = "# dtype: bfloat16 # of the output; where none is given, that of the base"
    return "\n".join([*lines, *_parameters(used, found.pairs), dtype, ""])


def _method(used: Sequence[ModelCheck], pairs: Sequence[PairCheck]) -> list[str]:
    """Return the method, and why it is that one."""
    if len(used) == 1:
        return [
            "# One expert: its delta as it is. A lambda below 1 goes a part of the way.",
            "merge_method: task_arithmetic",
        ]
    if _are_alike(used, pairs):
        return [
            "# The experts' deltas are much alike (cosines of at least "
            f"{ALIKE_COSINE}): of experts of one role an average keeps most.",
            "merge_method: task_arithmetic",
        ]
    return [
        "# The experts' deltas have little in common. Of experts with different roles `wudi` kept",
        "# the most where methods were compared, on small models; it takes more time and memory",
        "# than others (`della-dist plan`). Of published large models only `task_arithmetic`",
        "# gained reliably in one study: try it as well, with a lambda of 1 by the number of",
        "# experts to 0.5; or `della`, with a density of 0.5 to 0.7.",
        "merge_method: wudi",
    ]


def _parameters(used: Sequence[ModelCheck], pairs: Sequence[PairCheck]) -> list[str]:
    """Return the parameters of all, and why they are these."""
    if len(used) == 1:
        return ["parameters: {lambda: 1.0}"]
    if _are_alike(used, pairs):
        return [
            "# An average: the weights are divided by their sum.",
            "parameters: {normalize: true}",
        ]
    far = [one for one in used if one.verdict == "far"]
    value = FAR_LAMBDA if far else NEAR_LAMBDA
    reason = (
        "# Experts this far from their base keep more with a lambda below the usual 0.8."
        if far
        else "# The lambda whose worst case was best; up to 1.0 where experts lie near the base."
    )
    return [reason, f"parameters: {{lambda: {value}}}"]


def _are_alike(used: Sequence[ModelCheck], pairs: Sequence[PairCheck]) -> bool:
    names = {one.model for one in used}
    cosines = [pair.delta_cosine for pair in pairs if names.issuperset(pair.models)]
    return bool(cosines) and min(cosines) >= ALIKE_COSINE


def _other(pair: PairCheck, model: str, names: dict[str, str]) -> str:
    a, b = pair.models
    return names[b if a == model else a]


def _quoted(text: str) -> str:
    """Return text as YAML reads it back, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)
