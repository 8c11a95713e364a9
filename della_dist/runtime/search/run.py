"""Search values of a configuration: the driver of trials."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import yaml

from della_dist.config import MergeConfig
from della_dist.config.space import Space
from della_dist.errors import ConfigError, DellaDistError, OutputError, RunError
from della_dist.locations import is_url, local_path
from della_dist.report.run_events import TrialEnded
from della_dist.report.run_log import tell
from della_dist.report.search import SearchSummary, TrialSummary
from della_dist.runtime.check import check, refuse
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.removal import owner
from della_dist.runtime.run import merge
from della_dist.runtime.search.evaluators import Command, Evaluation, Failed
from della_dist.runtime.search.examples import Skill, load_skill
from della_dist.runtime.search.trials import Trials, reason_of
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store

#: Weights that are looked at before the first trial.
SAMPLE_BYTES = 64 << 20

#: What is kept beside OUT: the journal, the best configuration, and the trial under way.
SUFFIX = ".search"
JOURNAL_NAME = "journal.log"
BEST_NAME = "best.yaml"
TRIAL_NAME = "trial"


#: Scores by name and skill, of a configuration to compare with and the best one.
Closing: TypeAlias = Callable[[MergeConfig, MergeConfig], Mapping[str, Mapping[str, float]]]


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
    evaluate: Callable[[MergeConfig], Evaluation],
    effort: Effort,
    *,
    identity: str,
    closing: Closing | None = None,
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
        Returns the evaluation of a merge; raises `Failed` where there is none.
    effort
        How many trials, and how long.
    identity
        What tells this evaluation from others: a search goes on only with the same.
    closing
        Returns scores to compare with, of the middle of all ranges and the best configuration.
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
    InputError
        If a model has another backbone, as before a merge.
    OutputError
        If ``OUT.search`` is that of another search, or one that runs.
    RunError
        If no trial had a score.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "search needs Optuna, which is not installed: pip install 'della-dist[search]'."
        )
    folder = search_folder(out)
    if effort.trials < 1:
        raise ConfigError(f"--trials is {effort.trials}; it must be at least 1.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error}.") from error
    with open_output_store(str(folder)).lock(owner()):
        trials = Trials(folder / JOURNAL_NAME, space, {"evaluate": identity, "seed": seed})
        if options.check and not trials.ended:
            refuse(check(space.largest(), None, sample_bytes=SAMPLE_BYTES), options)
        _go_on(space, trials, evaluate, effort, say)
        return _finish(space, trials, folder, out, options, closing)


def _go_on(
    space: Space,
    trials: Trials,
    evaluate: Callable[[MergeConfig], Evaluation],
    effort: Effort,
    say: Callable[[str], None],
) -> None:
    started = time.monotonic()
    while len(trials.ended) < effort.trials:
        if effort.timeout_s is not None and time.monotonic() - started > effort.timeout_s:
            break
        trial, values = trials.begin()
        began = time.monotonic()
        count = f"{len(trials.ended) + 1}/{effort.trials}"
        try:
            # Values that do not go together are a trial that fails; so is a merge that they break.
            found = evaluate(space.config(values))
        except (Failed, DellaDistError) as error:
            if isinstance(error, RunError):  # a disk that is full, and the like
                raise
            seconds = time.monotonic() - began
            trials.fail(trial, str(error), seconds)
            number = len(trials.ended)
            tell(TrialEnded(number, effort.trials, values, None, str(error), seconds))
            say(f"trial {count} has no score: {error}")
        else:
            seconds = time.monotonic() - began
            trials.end(trial, found, seconds)
            number = len(trials.ended)
            tell(TrialEnded(number, effort.trials, values, found.score, None, seconds))
            best = trials.best
            assert best is not None
            say(f"trial {count}: {found.score:.6g}, best {best.value:.6g}")


def _finish(
    space: Space,
    trials: Trials,
    folder: Path,
    out: str,
    options: RunOptions,
    closing: Closing | None,
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
    found = space.config(best.params)
    merged = merge(found, out, replace(options, check=False))
    verify(out)
    held_out = {} if closing is None else closing(space.config(space.middle), found)
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
        held_out=held_out,
    )


def evaluation_of(
    space: Space,
    out: str,
    command: str | None,
    data: Sequence[str],
    timeout_s: float,
    options: RunOptions,
) -> tuple[Callable[[MergeConfig], Evaluation], str, Closing | None]:
    """Return what evaluates merges, what tells it from others, and what is compared at the end.

    Parameters
    ----------
    space, out, options
        Of the search.
    command
        See `Command`; None: by examples.
    data
        ``EXPERT=FILE`` of examples, where there is no command.
    timeout_s
        Of the command.

    Raises
    ------
    ConfigError
        If neither is given, or both are, or something in them is wrong.
    """
    if (command is None) == (not data):
        raise ConfigError("a search needs either --evaluate 'CMD {model}' or --data EXPERT=FILE.")
    if command is not None:
        return in_folder(out, Command(command, timeout_s), options), command, None
    from della_dist.runtime.search.responses import Responses

    skills: list[Skill] = []
    for one in data:
        name, equals, file = one.partition("=")
        if not name or not equals or not file:
            raise ConfigError(f"--data {one}: write the name of an expert and a file: math=FILE.")
        if name in {skill.name for skill in skills}:
            raise ConfigError(f"--data {one}: {name} is given twice; put both into one file.")
        skills.append(load_skill(name, Path(file)))
    folder = search_folder(out) / TRIAL_NAME
    responses = Responses(space.config(space.middle), skills, folder, options)
    return responses, json.dumps(responses.identity, sort_keys=True), responses.closing


def in_folder(
    out: str, evaluate: Callable[[str], Evaluation], options: RunOptions = RunOptions()
) -> Callable[[MergeConfig], Evaluation]:
    """Return what merges into a folder beside `out`, and evaluates that."""
    folder = search_folder(out) / TRIAL_NAME

    def evaluated(config: MergeConfig) -> Evaluation:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            # The models were checked once, for all trials.
            merge(config, str(folder), replace(options, check=False))
            return evaluate(str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return evaluated


def search_folder(out: str) -> Path:
    """Return where the trials of a search are kept.

    Raises
    ------
    ConfigError
        If `out` is remote.
    """
    if is_url(out):
        raise ConfigError(f"{out} is remote; a search writes to a local directory.")
    place = local_path(out)
    return place.with_name(f"{place.name}{SUFFIX}")
