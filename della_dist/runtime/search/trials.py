"""The trials of a search, kept by Optuna in a journal that survives any interruption.

What is tried next follows from the seed, and from the trials before: so many are chosen at once as
are tried at once, by what is known of those before all of them. One that was interrupted is tried
again with the same values, so that a search that goes on tries what it would have tried.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.config.space import Space, Value
from della_dist.errors import OutputError
from della_dist.planning.fingerprint import copied_inputs, differences
from della_dist.runtime.search.evaluators import Outcome
from della_dist.wording import few

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

log = logging.getLogger("della_dist.run")

#: Why a trial that ended has no score; a trial without one and without a score was interrupted.
_REASON = "reason"
_SECONDS = "seconds"
#: Of the study: what tells it from others, what is merged, how many are tried at once.
_IDENTITY, _MERGED, _AT_ONCE = "identity", "merged", "at once"
#: Which trials OUT may be of, and the digest of what was complete there.
_WRITTEN, _DIGEST = "written", "digest"


@dataclass(frozen=True, slots=True)
class Trial:
    """Values that are tried."""

    number: int
    values: dict[str, Value]


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
        If the journal is that of another search, or damaged.
    """

    def __init__(self, path: Path, space: Space, identity: Mapping[str, Any]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._seed = int(identity["seed"])
        self._space, self._folder = space, path.parent
        self._open: dict[int, optuna.trial.Trial] = {}
        _cut_torn_end(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # journals are marked as experimental
            # It has what a lock has.
            backend = JournalFileBackend(str(path), _HeldAlready())  # type: ignore[arg-type]
            try:
                self._study: Study = optuna.create_study(
                    storage=JournalStorage(backend),
                    study_name="search",
                    direction="maximize",
                    load_if_exists=True,
                )
            except (ValueError, KeyError) as error:
                raise OutputError(
                    f"{path} is damaged: {error}. Name another output, or remove {path.parent}."
                ) from error
        searched = {"space": space.document, "starts": space.starts, "tied": space.tied}
        same = json.dumps({**identity, **_plain(searched)}, sort_keys=True)
        before = self._study.user_attrs.get(_IDENTITY)
        if before is not None and before != same:
            raise OutputError(
                f"{path.parent} holds another search: its space, evaluation or seed differ. Name "
                "another output, or remove the folder."
            )
        if before is None:
            self._study.set_user_attr(_IDENTITY, same)

    def of(self, merges: Sequence[Mapping[str, Any]]) -> None:
        """Keep what is merged, or see that it is what the trials before were made of.

        Parameters
        ----------
        merges
            The identities (`della_dist.planning.fingerprint`) of merges with all inputs.

        Raises
        ------
        OutputError
            If inputs, or options that change what is computed, are others.
        """
        if not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr(_MERGED, list(merges))
            return
        before = self._study.user_attrs.get(_MERGED, [{}] * len(merges))
        found, copies = [], []
        for old, new in zip(before, merges, strict=True):
            others = differences(old, new)
            found += others
            copies += [] if others else copied_inputs(old, new)
        if found:
            raise OutputError(
                f"{self._folder} holds trials of other merges: "
                f"{few(found, 4, separator='; ', longest=1000)}. Scores of both cannot be "
                f"compared: name another output, or remove {self._folder}."
            )
        if copies:
            log.warning(
                "%s: written at another time than when the search began. The same size, header and "
                "samples: taken for copies. If weights were changed, name another output.",
                few(copies),
            )

    @property
    def at_once(self) -> int | None:
        """How many are tried at once; None: not said yet."""
        found = self._study.user_attrs.get(_AT_ONCE)
        return None if found is None else int(found)

    @at_once.setter
    def at_once(self, count: int) -> None:
        self._study.set_user_attr(_AT_ONCE, count)

    @property
    def written(self) -> tuple[int, ...]:
        """Numbers of the trials that may be in OUT: the last that was to be merged into it.

        Several, where none of them was told to be complete.
        """
        return tuple(self._study.user_attrs.get(_WRITTEN, ()))

    @property
    def digest(self) -> str | None:
        """Digest of the last merge into OUT that was complete; None: none yet."""
        return self._study.user_attrs.get(_DIGEST)

    def begin_writing(self, number: int) -> None:
        """Keep that a trial is about to be merged into OUT."""
        if number not in self.written:
            self._study.set_user_attr(_WRITTEN, [*self.written, number])

    def end_writing(self, number: int, digest: str) -> None:
        """Keep that a trial is merged into OUT."""
        if self.digest != digest:
            self._study.set_user_attr(_DIGEST, digest)
        if self.written != (number,):
            self._study.set_user_attr(_WRITTEN, [number])

    @property
    def ended(self) -> list[FrozenTrial]:
        """Those that have a score, or a reason why not, in their order."""
        return [one for one in self._study.get_trials(deepcopy=False) if _has_ended(one)]

    @property
    def best(self) -> FrozenTrial | None:
        """The one with the highest score, the first of equal ones; None: there is none."""
        scored = [one for one in self.ended if one.value is not None]
        return max(scored, key=lambda one: one.value or 0.0, default=None)

    def begin(self) -> list[Trial]:
        """Return the trials to be made now: those that were interrupted, or the next.

        First come the first values of the space, then its other starts.
        """
        at_once = self.at_once
        assert at_once is not None
        under_way = self._under_way()
        index = len(self.ended) + len(under_way)
        if not under_way or index % at_once:  # interrupted while they were chosen
            count = at_once - index % at_once
            under_way += [self._ask(index + i) for i in range(count)]
        return under_way

    def end(self, trial: Trial, outcome: Outcome) -> None:
        """Keep what came of a trial."""
        import optuna

        found = self._open.pop(trial.number)
        found.set_user_attr(_SECONDS, outcome.seconds)
        if outcome.evaluation is None:
            found.set_user_attr(_REASON, outcome.reason)
            self._study.tell(found, state=optuna.trial.TrialState.FAIL)
        else:
            found.set_user_attr("facts", dict(outcome.evaluation.facts))
            self._study.tell(found, outcome.evaluation.score)

    def _under_way(self) -> list[Trial]:
        """Return the trials that were chosen, and have not ended."""
        import optuna

        state, names = optuna.trial.TrialState, set(self._space.first)
        self._study.sampler = optuna.samplers.RandomSampler()  # what is chosen stays
        found = []
        for one in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            if set(one.params) == names:
                if one.number not in self._open:
                    self._open[one.number] = optuna.trial.Trial(self._study, one._trial_id)
                found.append(Trial(one.number, dict(one.params)))
            else:  # interrupted while it was chosen: as if it had never been
                self._study.tell(one.number, state=state.FAIL)
        return found

    def _ask(self, index: int) -> Trial:
        """Choose the values of a trial."""
        from optuna.trial import TrialState

        from della_dist.runtime.search.samplers import sampler_of

        seed = (self._seed * 1_000_003 + index) % (1 << 32)
        self._study.sampler = sampler_of(self._space, index, seed)
        if index < len(self._space.starts) and not self._study.get_trials(
            deepcopy=False, states=(TrialState.WAITING,)
        ):
            self._study.enqueue_trial(self._space.starts[index])
        trial = self._study.ask(dict(self._distributions()))
        self._open[trial.number] = trial
        return Trial(trial.number, dict(trial.params))

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


class _HeldAlready:
    """In the place of the journal's own lock, which would outlive a process that is killed.

    Whoever opens the journal holds the lock of its folder.
    """

    def acquire(self) -> bool:
        """Take what is held."""
        return True

    def release(self) -> None:
        """Keep it."""


def reason_of(trial: FrozenTrial) -> str | None:
    """Return why a trial that ended has no score."""
    found = trial.user_attrs.get(_REASON)
    return None if found is None else str(found)


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and (trial.value is not None or _REASON in trial.user_attrs)


def _cut_torn_end(path: Path) -> None:
    """Take off the end of a journal that a machine which lost power, or a full disk, left torn."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _plain(node: Any) -> Any:  # noqa: ANN401
    """Return a document as JSON can say it."""
    return json.loads(json.dumps(node, default=str))
