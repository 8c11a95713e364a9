"""How the values of a trial are chosen: by Optuna's tree-structured Parzen estimators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from della_dist.config.space import Space


def sampler_of(space: Space, index: int, seed: int) -> BaseSampler:
    """Return what chooses the values of one trial.

    Parameters
    ----------
    space
        What is searched.
    index
        Of the trial.
    seed
        Of the trial.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at values together is marked as experimental
        if index < space.num_tied:
            return _Tied(space.tied, space.first, seed)
        return TPESampler(seed=seed, multivariate=True)


class _Tied(TPESampler):
    """Chooses one value of each group, as `TPESampler` does; the others are as many times theirs.

    Parameters
    ----------
    groups
        Names of values.
    first
        The values of which others are multiples.
    seed
        Of what is random.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], first: Mapping[str, Any], seed: int
    ) -> None:
        super().__init__(seed=seed, multivariate=True)
        self._groups, self._first = groups, first
        self._random = RandomSampler(seed)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return values for all names of `search_space`; see Optuna."""
        found = super().sample_relative(study, trial, search_space) or {
            # There are too few trials to learn from.
            name: self._random.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }
        for leader, *others in self._groups:
            if leader in found:
                times = found[leader] / self._first[leader]
                found |= {
                    name: _within(search_space[name], times * self._first[name]) for name in others
                }
        return found


def _within(distribution: BaseDistribution, value: float) -> float:
    """Return a value that rounding has not taken out of its range."""
    assert isinstance(distribution, FloatDistribution)
    return min(max(value, distribution.low), distribution.high)
