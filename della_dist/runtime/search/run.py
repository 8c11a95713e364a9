"""Search values of a configuration: the driver of trials."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from della_dist.config import MergeConfig
from della_dist.config.space import Space
from della_dist.errors import ConfigError, OutputError, RunError
from della_dist.locations import is_url, local_path
from della_dist.report.run_events import TrialEnded
from della_dist.report.run_log import tell
from della_dist.report.search import SEARCH_NAME, SearchSummary, TrialSummary
from della_dist.runtime.check import check, refuse
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.removal import owner
from della_dist.runtime.run import merge
from della_dist.runtime.search.at_once import TRIALS_NAME, Makers, makers
from della_dist.runtime.search.evaluators import Outcome
from della_dist.runtime.search.output import merge_identity, to_discard
from della_dist.runtime.search.scoring import Scoring, Table
from della_dist.runtime.search.trials import Trial, Trials, reason_of
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store

#: Weights that are looked at before the first trial.
SAMPLE_BYTES = 64 << 20

#: What is kept beside OUT: the journal, the space, the best configuration.
SUFFIX = ".search"
JOURNAL_NAME = "journal.log"
SPACE_NAME = "space.yaml"
BEST_NAME = "best.yaml"


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
    scoring: Scoring,
    effort: Effort,
    *,
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
    scoring
        How merges are scored.
    effort
        How many trials, and how long.
    seed
        Of the choice of what is tried; the same gives the same trials, where as many are made at
        once.
    options
        How to merge. On a Ray cluster as many trials are made at once as there are workers, or as
        were when the search began.
    say
        Called with a line a trial.

    Raises
    ------
    ConfigError
        If Optuna is not installed, `out` is remote, or the merge would be refused.
    InputError
        If a model has another backbone, as before a merge.
    OutputError
        If ``OUT.search`` is that of another search, of other inputs, or one that runs; if something
        else is in `out`.
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
        trials = Trials(folder / JOURNAL_NAME, space, {"evaluate": scoring.identity, "seed": seed})
        trials.of(_merged(space, options))
        to_discard(out, trials, _config_of(space, trials), options)  # refuses what is another's
        if options.check and not trials.ended:
            refuse(check(space.largest(), None, sample_bytes=SAMPLE_BYTES), options)
        _write(folder / SPACE_NAME, _yaml(space.document))
        shutil.rmtree(folder / TRIALS_NAME, ignore_errors=True)  # of a run that was killed
        try:
            with makers(scoring, folder, options) as made_by:
                _settle(trials, made_by, options)
                for dimension in space.dimensions:
                    say(f"searching {dimension}")
                _go_on(space, trials, made_by, effort, say)
                held_out = _closing(space, trials, made_by)
        finally:
            shutil.rmtree(folder / TRIALS_NAME, ignore_errors=True)
        return _finish(space, trials, folder, out, options, held_out)


def _merged(space: Space, options: RunOptions) -> list[Mapping[str, Any]]:
    """Return the identities of merges of the space that have all its inputs.

    Raises
    ------
    ConfigError
        If an option takes the place of what is searched.
    """
    if options.seed is not None and any(one.name == "seed" for one in space.dimensions):
        raise ConfigError("the space leaves its seed open, and --seed says it. Leave one of them.")
    found: list[Mapping[str, Any]] = []
    opened: set[str] = set()
    chosen = [{**space.first, one.name: c} for one in space.dimensions for c in one.choices]
    for config in (space.largest(), *map(space.config, chosen)):
        if set(config.locations()) <= opened:
            continue
        opened.update(config.locations())
        # The size of shards changes in which files the bytes lie, and none of them.
        one = {**merge_identity(config, options), "shard_bytes": None}
        found.append(json.loads(json.dumps(one)))
    return found


def _config_of(space: Space, trials: Trials) -> Callable[[int], MergeConfig]:
    """Return what tells what a trial merges, by its number."""
    values = {one.number: one.params for one in trials.ended}
    return lambda number: space.config(values[number])


def _settle(trials: Trials, made_by: Makers, options: RunOptions) -> None:
    """Settle how many trials are chosen at once: by this run, or by that which began the search.

    Raises
    ------
    OutputError
        If the user wants another number than the search began with.
    """
    asked = options.workers if options.on_ray else None
    before = trials.at_once
    if before is None:
        trials.at_once = made_by.num_at_once
    elif asked not in (None, before):
        raise OutputError(
            f"this search began with {before} trials at once, and what is tried follows from that. "
            f"Go on with --workers {before}, or name another output."
        )


def _go_on(
    space: Space,
    trials: Trials,
    made_by: Makers,
    effort: Effort,
    say: Callable[[str], None],
) -> None:
    started = time.monotonic()
    while (num_left := effort.trials - len(trials.ended)) > 0:
        if effort.timeout_s is not None and time.monotonic() - started > effort.timeout_s:
            break
        # Those that are left over of what was chosen at once are made when the search goes on.
        batch = trials.begin()[:num_left]
        found = [(trial, _config(space, trial)) for trial in batch]
        for trial, one in found:
            if isinstance(one, Outcome):
                _end(trials, trial, one, effort, say)
        configs = [(trial, one) for trial, one in found if not isinstance(one, Outcome)]
        for i, outcome in made_by.outcomes([config for _, config in configs]):
            _end(trials, configs[i][0], outcome, effort, say)


def _config(space: Space, trial: Trial) -> MergeConfig | Outcome:
    """Return what a trial merges, or what came of values that do not go together."""
    try:
        return space.config(trial.values)
    except ConfigError as error:
        return Outcome(0.0, reason=str(error))


def _end(
    trials: Trials,
    trial: Trial,
    outcome: Outcome,
    effort: Effort,
    say: Callable[[str], None],
) -> None:
    """Keep what came of a trial, and say it."""
    trials.end(trial, outcome)
    number = len(trials.ended)
    score = None if outcome.evaluation is None else outcome.evaluation.score
    reason = outcome.reason if outcome.evaluation is None else None
    tell(TrialEnded(number, effort.trials, trial.values, score, reason, outcome.seconds))
    count = f"{number}/{effort.trials}"
    if outcome.evaluation is None:
        say(f"trial {count} has no score: {outcome.reason}")
        return
    best = trials.best
    assert best is not None
    say(f"trial {count}: {outcome.evaluation.score:.6g}, best {best.value:.6g}")


def _closing(space: Space, trials: Trials, made_by: Makers) -> Table:
    """Return scores on what no trial saw.

    Raises
    ------
    RunError
        If no trial had a score.
    """
    best, ended = trials.best, trials.ended
    if best is not None:
        return made_by.closing(space.config(space.first), space.config(best.params))
    reasons = [reason for one in ended if (reason := reason_of(one)) is not None]
    raise RunError(
        f"none of {len(ended)} trials has a score; the last one: {reasons[-1]}."
        if reasons
        else "no trial ended in time. Give more --timeout, and run the search again."
    )


def _finish(
    space: Space,
    trials: Trials,
    folder: Path,
    out: str,
    options: RunOptions,
    held_out: Table,
) -> SearchSummary:
    best = trials.best
    ended = trials.ended
    assert best is not None
    assert best.value is not None
    path = folder / BEST_NAME
    _write(path, _yaml(space.mapping(best.params)))
    # What an earlier run of this search has written gives way to what is better; what a user has
    # written there since the search began does not.
    restart = to_discard(out, trials, _config_of(space, trials), options, best.number)
    trials.begin_writing(best.number)
    merged = merge(space.config(best.params), out, replace(options, restart=restart))
    trials.end_writing(best.number, merged.model_digest)
    verify(out)
    labels = {one.name: one.label for one in space.dimensions}
    summary = SearchSummary(
        output=out,
        config=str(path),
        score=best.value,
        values=dict(best.params),
        first=ended[0].value,
        trials=tuple(
            TrialSummary(
                {name: one.params[name] for name in labels},
                one.value,
                reason_of(one),
                one.user_attrs["seconds"],
            )
            for one in ended
        ),
        model_digest=merged.model_digest,
        labels=labels,
        held_out=held_out,
    )
    _write(local_path(out) / SEARCH_NAME, json.dumps(summary.kept(), indent=1) + "\n")
    return summary


def _yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    """Write a file at once."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}.") from error


def search_folder(out: str) -> Path:
    """Return where the trials of a search are kept.

    Raises
    ------
    ConfigError
        If `out` is remote, or nothing can lie beside it.
    """
    if is_url(out):
        raise ConfigError(f"{out} is remote; a search writes to a local directory.")
    place = local_path(out)
    if place.name in ("", ".."):  # of `.` and the like
        place = place.resolve()
    if not place.name:
        raise ConfigError(f"{out} cannot be an output: a search keeps its trials beside it.")
    return place.with_name(f"{place.name}{SUFFIX}")
