"""How merges are scored: said once, and opened in every process that scores some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError
from della_dist.locations import short_names
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.search.evaluators import Command, Evaluation
from della_dist.runtime.search.examples import Skill, load_skill

#: Scores by name and skill; None where there is none.
Table: TypeAlias = Mapping[str, Mapping[str, float | None]]


class Scorer(Protocol):
    """Scores merges in one process."""

    def __call__(self, config: MergeConfig) -> Evaluation:
        """Return the evaluation of a merge; raises `Failed` where there is none."""
        ...

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        """Return scores on what no trial saw, of these two and of what they compare with."""
        ...


class Scoring(Protocol):
    """What a scorer is made of; crosses the borders of processes."""

    @property
    def identity(self) -> str:
        """What tells it from others: a search goes on only with the same."""
        ...

    def opened(self, folder: Path, options: RunOptions) -> Scorer:
        """Return a scorer that merges as `options` say, and has `folder` for itself."""
        ...


@dataclass(frozen=True, slots=True)
class ByCommand:
    """A command is run for the folder of every merge."""

    command: Command

    @property
    def identity(self) -> str:
        """The command."""
        return self.command.text

    def opened(self, folder: Path, options: RunOptions) -> Scorer:
        """Return a scorer; see `Scoring`."""
        return InFolder(folder, self.command, options)


@dataclass(frozen=True, slots=True)
class ByExamples:
    """Models are loaded, and predict examples."""

    config: MergeConfig
    """One of those that are scored: its base and experts are the measure."""
    skills: tuple[Skill, ...]

    @property
    def identity(self) -> str:
        """The digests of the examples."""
        return json.dumps({skill.name: skill.digest for skill in self.skills}, sort_keys=True)

    def opened(self, folder: Path, options: RunOptions) -> Scorer:
        """Return a scorer; see `Scoring`.

        Raises
        ------
        ConfigError, InputError
            See `della_dist.runtime.search.responses.Responses`.
        """
        from della_dist.runtime.search.responses import Responses

        return Responses(self.config, self.skills, folder, options)


@dataclass(frozen=True, slots=True)
class InFolder:
    """Merges into a folder, and evaluates that; without anything that no trial saw."""

    folder: Path
    evaluate: Callable[[str], Evaluation]
    options: RunOptions

    def __call__(self, config: MergeConfig) -> Evaluation:
        """Score a merge."""
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            # The models were checked once, for all trials.
            merge(config, str(self.folder), replace(self.options, check=False))
            return self.evaluate(str(self.folder))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        """Return nothing."""
        del first, best
        return {}


def scoring_of(
    config: MergeConfig, command: str | None, data: Sequence[str], timeout_s: float
) -> Scoring:
    """Return how merges are scored.

    Parameters
    ----------
    config
        One of those that are.
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
        return ByCommand(Command(command, timeout_s))
    if config.base_model is None:
        raise ConfigError(
            f"--data measures how much is kept of each expert beyond the base, and "
            f"{config.merge_method} has no base_model. Name one, or evaluate by --evaluate."
        )
    experts = short_names([one.model for one in config.models])
    skills: list[Skill] = []
    for one in data:
        name, equals, file = one.partition("=")
        if not name or not equals or not file:
            raise ConfigError(f"--data {one}: write the name of an expert and a file: math=FILE.")
        if name in {skill.name for skill in skills}:
            raise ConfigError(f"--data {one}: {name} is given twice; put both into one file.")
        if name not in experts:
            raise ConfigError(
                f"--data {one}: no expert is called {name}; there are {', '.join(experts)}."
            )
        skills.append(load_skill(name, Path(file)))
    return ByExamples(config, tuple(skills))
