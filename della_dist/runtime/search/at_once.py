"""Where trials are made: here one after another, or several at once on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias

from della_dist.config import MergeConfig
from della_dist.errors import RunError
from della_dist.runtime.engines.ray.answers import Death
from della_dist.runtime.options import RunOptions, refuse_missing_ray
from della_dist.runtime.search.evaluators import Outcome, outcome_of
from della_dist.runtime.search.scoring import Scorer, Scoring, Table

if TYPE_CHECKING:
    from della_dist.runtime.engines.ray.calls import Calls

#: Below the folder of a search: what trials write, each maker with a folder of its own.
TRIALS_NAME = "trials"
#: So many are made at once, where nobody asks for more: they learn nothing of each other.
MOST_AT_ONCE = 8


class Makers(Protocol):
    """What makes trials. A context manager."""

    num_at_once: int
    """How many it makes at once."""

    def outcomes(self, configs: Sequence[MergeConfig]) -> Iterator[tuple[int, Outcome]]:
        """Yield what comes of each, with its index, as they end."""
        ...

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        """Return scores on what no trial saw; see `Scorer`."""
        ...

    def __enter__(self) -> Makers: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def makers(scoring: Scoring, folder: Path, options: RunOptions) -> Makers:
    """Return what makes trials, as `options` say.

    Parameters
    ----------
    scoring
        How merges are scored.
    folder
        Of the search.
    options
        How to merge, and where.

    Raises
    ------
    DellaDistError
        If merges cannot be scored, or there is no cluster.
    """
    if not options.on_ray:
        return _Here(scoring, folder, options)
    refuse_missing_ray(options)
    from della_dist.runtime.engines.ray.calls import Calls

    return _OnRay(Calls(partial(_asked_of, scoring, folder), options), options.workers)


def _folder(folder: Path, index: int) -> Path:
    return folder / TRIALS_NAME / str(index)


class _Here:
    """Makes trials in this process."""

    num_at_once = 1

    def __init__(self, scoring: Scoring, folder: Path, options: RunOptions) -> None:
        self._scorer = scoring.opened(_folder(folder, 0), options)

    def outcomes(self, configs: Sequence[MergeConfig]) -> Iterator[tuple[int, Outcome]]:
        """Yield what comes of each."""
        for i, config in enumerate(configs):
            yield i, outcome_of(self._scorer, config)

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        """Return scores on what no trial saw."""
        return self._scorer.closing(first, best)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Pair:
    """What the closing scores are asked of."""

    first: MergeConfig
    best: MergeConfig


_Asked: TypeAlias = MergeConfig | _Pair
_Answer: TypeAlias = Outcome | Table


def _asked_of(
    scoring: Scoring, folder: Path, index: int, options: RunOptions
) -> Callable[[_Asked], _Answer]:
    """Return what an actor is asked."""
    return partial(_answer, scoring.opened(_folder(folder, index), options))


def _answer(scorer: Scorer, asked: _Asked) -> _Answer:
    if isinstance(asked, _Pair):
        return scorer.closing(asked.first, asked.best)
    return outcome_of(scorer, asked)


class _OnRay:
    """Makes trials on actors."""

    def __init__(self, calls: Calls[_Asked, _Answer], wanted: int | None) -> None:
        self._calls = calls
        self.num_at_once = wanted or min(calls.num_fitting, MOST_AT_ONCE)

    def outcomes(self, configs: Sequence[MergeConfig]) -> Iterator[tuple[int, Outcome]]:
        """Yield what comes of each, as they end."""
        for i, answer in self._calls.map(configs):
            if isinstance(answer, Death):
                reason = f"the worker that made it died, twice: {answer.reason}"
                yield i, Outcome(0.0, reason=reason)
            else:
                assert isinstance(answer, Outcome)
                yield i, answer

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        """Return scores on what no trial saw, by an actor.

        Raises
        ------
        RunError
            If actors died of it.
        """
        ((_, answer),) = self._calls.map([_Pair(first, best)])
        if isinstance(answer, Death):
            raise RunError(
                f"the worker that compared the best with others died, twice: {answer.reason}. All "
                "trials are kept, and the same command goes on."
            )
        assert not isinstance(answer, Outcome)
        return answer

    def __enter__(self) -> _OnRay:
        self._calls.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._calls.__exit__(kind, exc, trace)
