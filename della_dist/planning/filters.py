"""Filters of a configuration must name something that the model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from della_dist.config import MergeConfig
from della_dist.config.parameters import PARAMETERS
from della_dist.errors import ConfigError
from della_dist.planning.ties import CAUSAL_HEAD, HEADS, ends_in
from della_dist.wording import numbered

#: Parts of names that are compared with a filter that fits none.
_MAX_CANDIDATES = 5000


def check_filters(
    config: MergeConfig,
    names: Collection[str],
    of_experts: Collection[str],
    unstored: Collection[str],
) -> tuple[str, ...]:
    """Check that every filter occurs in the name of some tensor; return what is to be said.

    Parameters
    ----------
    config
        Whose filters.
    names
        Tensors of the output, which filters of shared parameters look at.
    of_experts
        Tensors of the experts, which those of their own parameters look at.
    unstored
        Heads that are stored in some input, and in the output are the embedding.

    Raises
    ------
    ConfigError
        Naming each filter that does not, what it belongs to, and the nearest part of a name.
    """
    notes = []
    problems = []
    has_head = any(ends_in(name, HEADS) for name in names)
    heads = () if has_head else (*unstored, CAUSAL_HEAD)
    for (text, is_own), parameters in _filters(config).items():
        looked_at = of_experts if is_own else names
        if any(text in name for name in looked_at):
            continue
        where = ", ".join(f"`{parameter}`" for parameter in parameters)
        if any(text in head for head in heads):
            # Published configurations say `lm_head` of tied and untied models alike.
            notes.append(
                f"filter {text} of {where}: without effect, the output head is the embedding."
            )
            continue
        problems.append(
            f"the filter {text!r} of {where} occurs in no tensor name, so that it would have no "
            f"effect.{_nearest(text, looked_at)} Correct it, or remove it."
        )
    if problems:
        raise ConfigError(f"{config.source}: {numbered(problems)}")
    return tuple(notes)


def _filters(config: MergeConfig) -> dict[tuple[str, bool], tuple[str, ...]]:
    """Return every filter, whether it is of experts, and the parameters that have it."""
    found: dict[tuple[str, bool], dict[str, None]] = {}
    for name, setting in config.all_settings():
        for branch in setting.branches:
            if branch.filter:
                key = branch.filter, PARAMETERS[name].of_experts
                found.setdefault(key, {})[name] = None
    return {key: tuple(names) for key, names in found.items()}


def _nearest(text: str, names: Collection[str]) -> str:
    """Return the part of a tensor name that is most like `text`, as a sentence."""
    num_parts = text.strip(".").count(".") + 1
    has_number = any(part.isdigit() for part in text.split("."))
    candidates: dict[str, None] = {}
    for name in names:
        # Layers have the same modules: one of each is enough, unless a layer is asked for.
        parts = (name if has_number else re.sub(r"(^|\.)[0-9]+(?=\.|$)", "", name)).split(".")
        for i in range(len(parts) - num_parts + 1):
            candidates[".".join(parts[i : i + num_parts])] = None
        if len(candidates) > _MAX_CANDIDATES:
            break
    close = difflib.get_close_matches(text.strip("."), list(candidates), n=1)
    return f" The nearest is {close[0]!r}." if close else ""
