"""A family of models, and what merges of them keep."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from della_dist.report.check import Verdict
from tests.quality import data, merges, model
from tests.quality.data import MIXTURE, SKILLS, Part
from tests.quality.merges import Grid, Settings
from tests.quality.model import Size, Training
from tests.quality.scores import Measured, Score, mean_of, measure, score


@dataclass(frozen=True, slots=True)
class Expert:
    """Whom to train."""

    task: str
    learns_from: Part


EXPERTS: Mapping[str, Expert] = {
    "doubles": Expert("doubles", "first half"),
    "sorting": Expert("sorting", "first half"),
    "text": Expert("text", "first half"),
    "doubles again": Expert("doubles", "second half"),
}

#: Which experts are merged.
CASES: Mapping[str, Sequence[str]] = {
    "three skills": ("doubles", "sorting", "text"),
    "overlapping roles": ("doubles", "doubles again", "sorting"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A family, and what is tried with it."""

    name: str
    size: Size
    base: Training
    experts: Training
    cases: Sequence[str]
    grids: Sequence[Grid]
    num_validation: int
    """Items of each task that settings are chosen by."""
    num_test: int


@dataclass(frozen=True, slots=True)
class Trained:
    """An expert beside its base, on the test items of its task."""

    relative_delta: float
    base: Measured
    expert: Measured
    verdict: Verdict
    """Of ``della-dist check``."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge with one of the settings that were tried."""

    settings: Settings
    validation: Score
    test: Score
    digest: str


@dataclass(frozen=True, slots=True)
class Family:
    """What was found."""

    name: str
    num_parameters: int
    experts: Mapping[str, Trained]
    cases: Mapping[str, Sequence[Merged]]
    cpu_s: float
    stranger: Verdict
    """What ``della-dist check`` says of a model that was drawn for itself."""

    def best(self, case: str, method: str) -> Merged:
        """Return the merge by a method that is best on validation items."""
        found = [one for one in self.cases[case] if one.settings.method == method]
        return max(found, key=lambda one: one.validation.loss)


ByPart: TypeAlias = Mapping[Part, Mapping[str, Measured]]
"""What a model does with the items of each part, by task."""


def study(plan: Plan, seed: int, folder: Path, say: Callable[[str], None]) -> Family:
    """Train a family in `folder`, merge it, and measure everything."""
    started = time.process_time()
    say("the base is trained")
    base = model.new_model(plan.size, seed)
    model.train(base, data.batches(MIXTURE, "first half", seed, plan.base.batch_items), plan.base)
    model.save(base, folder / "base")
    base = model.load(folder / "base")
    base_does = _measured(base, plan, list(SKILLS))
    deltas: dict[str, float] = {}
    experts_do: dict[str, ByPart] = {}
    for number, name in enumerate(dict.fromkeys(n for case in plan.cases for n in CASES[case])):
        say(f"{name}: trained")
        task, part = EXPERTS[name].task, EXPERTS[name].learns_from
        expert = model.load(folder / "base").train()
        items = data.batches(
            [(SKILLS[task], 1.0)], part, seed + 100 + number, plan.experts.batch_items
        )
        model.train(expert, items, plan.experts)
        model.save(expert, folder / name)
        expert = model.load(folder / name)
        experts_do[name] = _measured(expert, plan, [task])
        deltas[name] = model.relative_delta(expert, base)
    model.save(model.new_model(plan.size, seed + 1), folder / "stranger")
    verdicts = merges.check(folder / "base", [folder / name for name in (*deltas, "stranger")])
    trained = {
        name: Trained(
            delta,
            base_does["test"][EXPERTS[name].task],
            experts_do[name]["test"][EXPERTS[name].task],
            verdicts[name],
        )
        for name, delta in deltas.items()
    }
    cases = {case: _tried(plan, case, folder, base_does, experts_do, say) for case in plan.cases}
    num_parameters = sum(p.numel() for p in base.parameters())
    cpu_s = time.process_time() - started
    return Family(plan.name, num_parameters, trained, cases, cpu_s, verdicts["stranger"])


def _tried(
    plan: Plan,
    case: str,
    folder: Path,
    base_does: ByPart,
    experts_do: Mapping[str, ByPart],
    say: Callable[[str], None],
) -> list[Merged]:
    """Merge by every setting, and compare each merge with the base and the experts."""
    roles: dict[str, list[str]] = {}
    for name in CASES[case]:
        roles.setdefault(EXPERTS[name].task, []).append(name)
    own: ByPart = {
        part: {task: mean_of([experts_do[n][part][task] for n in roles[task]]) for task in roles}
        for part in base_does
    }
    tried = []
    for settings in merges.settings_of(plan.grids):
        say(f"{case}: {settings.method}, {settings}")
        out = folder / "merged"
        digest = merges.merge(folder / "base", [folder / n for n in CASES[case]], settings, out)
        does = _measured(model.load(out), plan, list(roles))
        shutil.rmtree(out)
        scores = {part: score(does[part], base_does[part], own[part]) for part in does}
        tried.append(Merged(settings, scores["validation"], scores["test"], digest))
    return tried


def _measured(some: Any, plan: Plan, tasks: Sequence[str]) -> ByPart:
    counts: dict[Part, int] = {"validation": plan.num_validation, "test": plan.num_test}
    return {
        part: {task: measure(some, task, part, count) for task in tasks}
        for part, count in counts.items()
    }
