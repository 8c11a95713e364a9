"""Several documents: stages, of which some are merged of what others put out.

A document is called by its `name`, which stands for its output wherever a model may stand. Their
order is that of what they need, not of the file. The output of the run is that of the document
without a name or, where all have one, of the only one that no other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from della_dist.config.model import MergeConfig
from della_dist.config.problem import Problem, shown, together
from della_dist.locations import model_and_adapters

#: What can be a folder anywhere, and is neither a path, nor on the Hub, nor has an adapter.
_NAME = re.compile(r"\w(?:[\w .()-]{0,98}[\w)-])?")

#: From what a document says, and what messages call it, to what it means; raises `Problem`.
Build = Callable[[Mapping[str, Any], str], MergeConfig]


def with_stages(
    documents: Sequence[object], labels: Sequence[str], source: str, build: Build
) -> MergeConfig:
    """Return the configuration of the output, with what is merged before it as its stages.

    Parameters
    ----------
    documents
        What each says.
    labels
        What messages call each; empty for one that is known to be the output.
    source
        What messages call them together.
    build
        Makes a configuration of what one says but for its name.

    Raises
    ------
    Problem
        All that is wrong in any of them, or with how they need each other.
    """
    problems: list[Problem] = []
    names: list[str | None] = []
    configs: list[MergeConfig] = []
    for document, label in zip(documents, labels, strict=True):
        where = label
        try:
            content = _content(document)
            written = content.pop("name", None)
            try:
                names.append(_name(written) if label else None)
                where = f"{label} ({names[-1]})" if names[-1] else label
            except Problem as problem:
                problems += problem.of(label)
            _refuse_stages(content)
            config = build(content, ": ".join(filter(None, (source, where))))
            configs.append(config)
        except Problem as problem:
            problems += problem.of(where)
    if len(names) == len(labels):
        problems = _repeated(names, labels) + problems
    if problems:
        raise together(problems)
    named = zip(configs, names, strict=True)
    ordered = _in_order([replace(config, name=name) for config, name in named])
    output = _output(ordered)
    for config in ordered:
        _check_form(config, output, names)
    stages = tuple(config for config in ordered if config is not output)
    return replace(output, name=None, stages=stages)


def _check_form(config: MergeConfig, output: MergeConfig, names: Sequence[str | None]) -> None:
    """Refuse adapters that others would be merged of, or whose base is gone when all is done."""
    if config.output is None:
        return
    if config is not output:
        raise Problem(
            "output.adapter",
            f"stands in {shown(config.name)}, which others are merged of: only the last output can "
            "be an adapter",
        )
    if config.base_model is not None and model_and_adapters(config.base_model)[0] in names:
        raise Problem(
            "output.adapter",
            f"would be an adapter of {shown(config.base_model)}, which is removed when all is "
            "done. Merge that in a run of its own",
        )


def needed(config: MergeConfig, names: Collection[str | None]) -> list[str]:
    """Return the stages, of those with these names, that a configuration reads."""
    models = (model_and_adapters(location)[0] for location in config.locations())
    return [name for name in dict.fromkeys(models) if name in names]


def equal_words(merges: Sequence[MergeConfig]) -> list[str]:
    """Return a note where merges of one run, none of which needs the other, drop alike.

    Random words are of the seed, the expert's place and how many merges lie behind the inputs.
    """
    behind: dict[str | None, set[str]] = {}
    for merge in merges:
        direct = set(needed(merge, behind))
        behind[merge.name] = direct.union(*(behind[name] for name in direct))
    random = [m for m in merges if m.method.drop in ("magprune", "random")]
    alike = [
        (a.name, b.name)
        for i, a in enumerate(random)
        for b in random[i + 1 :]
        if a.seed == b.seed and a.name not in behind[b.name] and b.name not in behind[a.name]
    ]
    if not alike:
        return []
    first, second = alike[0]
    more = f", and {len(alike) - 1} more pairs" if len(alike) > 1 else ""
    return [
        f"{first} and {second}{more}: neither needs the other, and they have one seed, so that "
        "their first experts drop the same elements, and so on. Give them different ones (`seed`)."
    ]


def _content(document: object) -> dict[str, Any]:
    if not isinstance(document, Mapping):
        raise Problem("", f"must be a mapping of keys to values, not {shown(document)}")
    return dict(document)


def _refuse_stages(content: Mapping[str, Any]) -> None:
    if content.get("stages"):
        raise Problem("stages", "stands in one of several documents; write them as others")


def _name(written: object) -> str | None:
    if written is None:
        return None
    if not isinstance(written, str):
        raise Problem("name", f"must be a word, not {shown(written)}; write it in quotes")
    if not _NAME.fullmatch(written) or len(written.encode()) > 100:
        raise Problem(
            "name",
            f"is {shown(written)}, which is no good name of a folder: letters, digits, spaces and "
            "_.-() are, up to 100, with a letter or digit at the beginning",
        )
    return written


def _repeated(names: Sequence[str | None], labels: Sequence[str]) -> list[Problem]:
    """Return what is wrong with names that are not different, or not there."""
    problems = []
    seen: dict[str | None, str] = {}
    # What is known to be the output needs no name, wherever it stands.
    for name, label in sorted(zip(names, labels, strict=True), key=lambda one: one[1] != ""):
        key = None if name is None else name.casefold()  # some file systems take no other notice
        first = seen.setdefault(key, label)
        if first == label:
            continue
        if name is None:
            what = f"is missing, and {first or 'the output'} has none either: all but one need it"
        else:
            what = f"is {shown(name)}, and that of {first} is the same, or differs in case alone"
        problems.append(Problem("name", what, label))
    return problems


def _in_order(configs: Sequence[MergeConfig]) -> list[MergeConfig]:
    """Return the configurations, each behind those that it needs, otherwise as they stand.

    Raises
    ------
    Problem
        If some need each other.
    """
    names = [config.name for config in configs]
    ordered: list[MergeConfig] = []
    left = list(configs)
    while left:
        done = {config.name for config in ordered}
        ready = next((c for c in left if done.issuperset(needed(c, names))), None)
        if ready is None:
            raise Problem("", _circle(left))
        ordered.append(ready)
        left.remove(ready)
    return ordered


def _circle(configs: Sequence[MergeConfig]) -> str:
    """Return how configurations need each other, none of which can be merged first."""
    by_name = {config.name: config for config in configs}
    way: list[str | None] = []
    name = configs[0].name
    while name not in way:
        way.append(name)
        name = needed(by_name[name], list(by_name))[0]
    circle = [*way[way.index(name) :], name]
    steps = ", which names ".join(shown(one) for one in circle)
    return f"no document can be merged first: {steps}. Let one of them name a checkpoint instead"


def _output(ordered: Sequence[MergeConfig]) -> MergeConfig:
    """Return the configuration of the output."""
    names = [config.name for config in ordered]
    used = {name for config in ordered for name in needed(config, names)}
    unnamed = [config for config in ordered if config.name is None]
    last = unnamed or [config for config in ordered if config.name not in used]
    if len(last) > 1:
        listed = ", ".join(shown(config.name) for config in last)
        raise Problem(
            "",
            f"no document names {listed}, and which of them is the output is not said: leave out "
            "the name of that one",
        )
    return last[0]
