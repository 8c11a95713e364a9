"""Names of stages that may mean something else, names that nothing has, stages made for nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from della_dist.config import MergeConfig
from della_dist.config.problem import closest, shown
from della_dist.config.stages import needed
from della_dist.errors import ConfigError
from della_dist.locations import is_url, local_path, model_and_adapters
from della_dist.wording import numbered


def refuse_doubtful(config: MergeConfig, *, keep_stages: bool) -> None:
    """Refuse a configuration of several documents that does not say clearly what to do.

    Raises
    ------
    ConfigError
        Naming all that is doubtful.
    """
    merges = (*config.stages, config)
    names = [str(stage.name) for stage in config.stages]
    problems = [problem for merge in merges for problem in _doubtful(merge, names)]
    used = {name for merge in merges for name in needed(merge, names)}
    problems += [
        f"{stage.source}: no document names it, so that it would be made and removed again. Leave "
        "it out, or keep it with --keep-stages"
        for stage in config.stages
        if stage.name not in used and not keep_stages
    ]
    if not problems:
        return
    raise ConfigError(numbered([f"{problem}." for problem in problems]))


def _doubtful(merge: MergeConfig, names: Sequence[str]) -> Iterator[str]:
    for location in dict.fromkeys(p for one in merge.locations() for p in model_and_adapters(one)):
        exists = not is_url(location) and os.path.lexists(local_path(location))
        if location in names:
            if exists:
                yield (
                    f"{merge.source}: the model {shown(location)} is the name of a document, and "
                    "there is a path of that name. Rename the document, or write "
                    f"./{location} if the path is meant"
                )
        elif not exists and not is_url(location) and "/" not in location:
            near = closest(location, names)
            hint = f"did you mean {near}" if near else f"documents are called {', '.join(names)}"
            yield (
                f"{merge.source}: the model {shown(location)} is neither the name of a document "
                f"nor a path that exists ({hint})"
            )
