"""How well a model does what experts have learnt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.quality.data import IGNORED, SKILLS, Part, batches


@dataclass(frozen=True, slots=True)
class Measured:
    """A model on items of a task."""

    loss: float
    """Cross entropy of a token of the answers, in nats."""
    answers: float | None
    """The part of them that greedy decoding gives exactly, where there is one right answer."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of a merge. 0: as the base; 1: as each expert on its own task; the mean over tasks."""

    loss: float
    answers: float
    """Of the tasks that have right answers."""
    tasks: Mapping[str, float]
    """By the loss."""


def measure(model: Any, task: str, part: Part, num_items: int) -> Measured:
    """Measure a model on items that every call with these arguments draws."""
    skill = SKILLS[task]
    batch = next(batches([(skill, 1.0)], part, seed=0, num_items=num_items))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(batch.ids)).logits[:, :-1]
    labels = torch.from_numpy(batch.labels)[:, 1:]
    asked = labels != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[asked], labels[asked])
    # Greedy decoding is right in all places exactly where each is right behind right ones.
    exact = ((logits.argmax(-1) == labels) | ~asked).all(dim=1).double().mean()
    return Measured(float(loss), float(exact) if skill.is_exact else None)


def mean_of(experts: list[Measured]) -> Measured:
    """Return what experts of one role do on the average."""
    answers = [one.answers for one in experts if one.answers is not None]
    return Measured(
        statistics.fmean(one.loss for one in experts),
        statistics.fmean(answers) if answers else None,
    )


def score(
    merged: Mapping[str, Measured],
    base: Mapping[str, Measured],
    experts: Mapping[str, Measured],
) -> Score:
    """Compare a merge with the base and the experts, each on its own task; all by task.

    Raises
    ------
    ValueError
        If experts do a task no better than their base: there is nothing to keep.
    """
    tasks, answers = {}, []
    for task, expert in experts.items():
        least, found = base[task], merged[task]
        if expert.loss >= least.loss:
            raise ValueError(f"experts predict {task} no better than their base")
        tasks[task] = (least.loss - found.loss) / (least.loss - expert.loss)
        if expert.answers is None or least.answers is None or found.answers is None:
            continue
        if expert.answers <= least.answers:
            raise ValueError(f"experts answer {task} no better than their base")
        answers.append((found.answers - least.answers) / (expert.answers - least.answers))
    return Score(statistics.fmean(tasks.values()), statistics.fmean(answers), tasks)
