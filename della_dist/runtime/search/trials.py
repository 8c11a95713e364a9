"""The trials of a search, kept by Optuna in a journal that survives any interruption.

What is tried next follows from the seed, and from the trials that ended: one that was interrupted
is as if it had never been, so that a search that goes on tries what it would have tried.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.config.space import Space, Value
from della_dist.errors import OutputError
from della_dist.runtime.search.evaluators import Evaluation

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

#: Why a trial that ended has no score; a trial without one and without a score was interrupted.
_REASON = "reason"
_SECONDS = "seconds"


class Trials:
    """All trials of one search.

    Parameters
    ----------
    path
        Of the journal; continued if it is there.
    space
        What is searched.
    identity
        What else must be equal in a search that is continued, and can be written as JSON: among
        it ``seed``.

    Raises
    ------
    OutputError
        If the journal is that of another search.
    """

    def __init__(self, path: Path, space: Space, identity: Mapping[str, Any]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._seed = int(identity["seed"])
        self._space = space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # journals are marked as experimental
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study: Study = optuna.create_study(
                storage=storage, study_name="search", direction="maximize", load_if_exists=True
            )
        same = json.dumps({**identity, "space": _plain(space.document)}, sort_keys=True)
        before = self._study.user_attrs.get("identity")
        if before is not None and before != same:
            raise OutputError(
                f"{path.parent} holds another search: its space, evaluation or seed differ. Name "
                "another output, or remove the folder."
            )
        self._study.set_user_attr("identity", same)
        state = optuna.trial.TrialState
        for one in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(one.number, state=state.FAIL)

    @property
    def ended(self) -> list[FrozenTrial]:
        """Those that have a score, or a reason why not, in their order."""
        return [one for one in self._study.get_trials(deepcopy=False) if _has_ended(one)]

    @property
    def best(self) -> FrozenTrial | None:
        """The one with the highest score, the first of equal ones; None: there is none."""
        scored = [one for one in self.ended if one.value is not None]
        return max(scored, key=lambda one: one.value or 0.0, default=None)

    def begin(self) -> tuple[Trial, dict[str, Value]]:
        """Return the next trial and the values to try: first the middle of all ranges."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        index = len(self.ended)
        self._study.sampler = TPESampler(seed=(self._seed * 1_000_003 + index) % (1 << 32))
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if index == 0 and not waiting:
            self._study.enqueue_trial(self._space.middle)
        distributions = dict(self._distributions())
        trial = self._study.ask(distributions)
        return trial, {name: trial.params[name] for name in distributions}

    def end(self, trial: Trial, evaluation: Evaluation, seconds: float) -> None:
        """Keep the score of a trial."""
        trial.set_user_attr("facts", dict(evaluation.facts))
        trial.set_user_attr(_SECONDS, seconds)
        self._study.tell(trial, evaluation.score)

    def fail(self, trial: Trial, reason: str, seconds: float) -> None:
        """Keep why a trial has no score."""
        import optuna

        trial.set_user_attr(_REASON, reason)
        trial.set_user_attr(_SECONDS, seconds)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _distributions(self) -> Iterator[tuple[str, BaseDistribution]]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        for one in self._space.dimensions:
            yield (
                one.name,
                (
                    CategoricalDistribution(one.choices)
                    if one.choices
                    else FloatDistribution(one.low, one.high, log=one.is_log, step=one.step)
                ),
            )


def reason_of(trial: FrozenTrial) -> str | None:
    """Return why a trial that ended has no score."""
    found = trial.user_attrs.get(_REASON)
    return None if found is None else str(found)


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.value is not None or _REASON in trial.user_attrs


def _plain(node: Any) -> Any:  # noqa: ANN401
    """Return a document as JSON can say it."""
    return json.loads(json.dumps(node, default=str))
