"""Search values of a configuration: the driver of trials."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from della_dist.config.space import Space
from della_dist.errors import ConfigError, DellaDistError, OutputError, RunError
from della_dist.locations import is_url, local_path
from della_dist.report.search import SearchSummary, TrialSummary
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.removal import owner
from della_dist.runtime.run import merge
from della_dist.runtime.search.evaluators import Evaluation, Failed
from della_dist.runtime.search.trials import Trials, reason_of
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store

#: What is kept beside OUT: the journal, the best configuration, and the trial under way.
SUFFIX = ".search"
JOURNAL_NAME = "journal.log"
BEST_NAME = "best.yaml"
TRIAL_NAME = "trial"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a search goes on."""

    trials: int
    """All together, those of earlier runs among them."""
    timeout_s: float | None = None
    """Of this run: no trial begins after it. None: no such limit."""


def search(
    space: Space,
    out: str,
    evaluate: Callable[[str], Evaluation],
    effort: Effort,
    *,
    identity: str,
    seed: int = 0,
    options: RunOptions = RunOptions(),
    say: Callable[[str], None] = lambda line: None,
) -> SearchSummary:
    """Try values, and merge the best into `out`.

    A search that was interrupted goes on, and ends as it would have ended.

    Parameters
    ----------
    space
        What is searched.
    out
        The output, a local directory; ``OUT.search`` beside it keeps the trials.
    evaluate
        Returns the evaluation of the model in a folder; raises `Failed` where there is none.
    effort
        How many trials, and how long.
    identity
        What tells this evaluation from others: a search goes on only with the same.
    seed
        Of the choice of what is tried; the same gives the same trials.
    options
        How to merge.
    say
        Called with a line a trial.

    Raises
    ------
    ConfigError
        If Optuna is not installed, `out` is remote, or the merge would be refused.
    OutputError
        If ``OUT.search`` is that of another search, or one that runs.
    RunError
        If no trial had a score.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "search needs Optuna, which is not installed: pip install 'della-dist[search]'."
        )
    if is_url(out):
        raise ConfigError(f"{out} is remote; a search writes to a local directory.")
    if effort.trials < 1:
        raise ConfigError(f"--trials is {effort.trials}; it must be at least 1.")
    place = local_path(out)
    folder = place.with_name(f"{place.name}{SUFFIX}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error}.") from error
    with open_output_store(str(folder)).lock(owner()):
        trials = Trials(folder / JOURNAL_NAME, space, {"evaluate": identity, "seed": seed})
        _go_on(space, trials, folder / TRIAL_NAME, evaluate, effort, options, say)
        return _finish(space, trials, folder, out, options)


def _go_on(
    space: Space,
    trials: Trials,
    model: Path,
    evaluate: Callable[[str], Evaluation],
    effort: Effort,
    options: RunOptions,
    say: Callable[[str], None],
) -> None:
    started = time.monotonic()
    while len(trials.ended) < effort.trials:
        if effort.timeout_s is not None and time.monotonic() - started > effort.timeout_s:
            break
        trial, values = trials.begin()
        began = time.monotonic()
        _remove(model)
        count = f"{len(trials.ended) + 1}/{effort.trials}"
        try:
            # Values that do not go together are a trial that fails; so is a merge that they break.
            config = space.config(values)
            merge(config, str(model), options)
            found = evaluate(str(model))
        except (Failed, DellaDistError) as error:
            if isinstance(error, RunError):  # a disk that is full, and the like
                raise
            trials.fail(trial, str(error), time.monotonic() - began)
            say(f"trial {count} has no score: {error}")
        else:
            trials.end(trial, found, time.monotonic() - began)
            best = trials.best
            assert best is not None
            say(f"trial {count}: {found.score:.6g}, best {best.value:.6g}")
        finally:
            _remove(model)


def _finish(
    space: Space, trials: Trials, folder: Path, out: str, options: RunOptions
) -> SearchSummary:
    best = trials.best
    ended = trials.ended
    reasons = [reason for one in ended if (reason := reason_of(one)) is not None]
    if best is None:
        raise RunError(
            f"none of {len(ended)} trials has a score; the last one: {reasons[-1]}."
            if reasons
            else "no trial ended in time. Give more --timeout, and run the search again."
        )
    assert best.value is not None
    path = folder / BEST_NAME
    path.write_text(yaml.safe_dump(space.mapping(best.params), sort_keys=False, allow_unicode=True))
    merged = merge(space.config(best.params), out, options)
    verify(out)
    first = ended[0]
    return SearchSummary(
        output=out,
        config=str(path),
        score=best.value,
        values=dict(best.params),
        first=first.value,
        trials=tuple(
            TrialSummary(dict(one.params), one.value, reason_of(one), one.user_attrs["seconds"])
            for one in ended
        ),
        model_digest=merged.model_digest,
    )


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
