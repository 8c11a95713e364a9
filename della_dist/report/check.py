"""What was found of the models of a merge before it: as objects, and as lines for people."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from della_dist.locations import masked, short_names
from della_dist.report.text import format_bytes, format_seconds, note_lines, printable
from della_dist.wording import few, plural

Verdict: TypeAlias = Literal["same backbone", "far", "copy", "another backbone", "damaged"]


@dataclass(frozen=True, slots=True)
class Oddity:
    """A tensor, or the tensors of a layer or of a kind, that are not as the others."""

    where: str
    """Its name; of several, what is common to their names."""
    files: tuple[str, ...]
    """Of the model, that have them."""
    what: str
    """What is odd, with its numbers."""


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """How alike a model and the one that it is compared with are.

    Figures are of all matrices that are merged, embeddings included, as estimated from the sample;
    but not of damaged ones, nor of embeddings and heads that were begun anew. Scales of norms are
    left out, which are about 1 in every model; and where all experts are adapters, so is what none
    of them changes.
    """

    model: str
    """Its location."""
    reference: str
    """That of the base, or of the first model where the method has none."""
    verdict: Verdict
    relative_delta: float
    """Norm of the delta, in parts of the reference's."""
    cosine: float
    """Of the two as vectors of all those weights."""
    matrix_cosine: float
    """The median over the matrices of layers."""
    untouched: float
    """The share of weights that are equal."""
    num_tensors: int
    """That were looked at."""
    num_nonfinite: int
    """Elements among them that are NaN or infinite."""
    oddities: tuple[Oddity, ...]

    @property
    def is_refused(self) -> bool:
        """Whether a merge refuses it."""
        return self.verdict in ("another backbone", "damaged")


@dataclass(frozen=True, slots=True)
class PairCheck:
    """How alike the deltas of two models are, of all matrices."""

    models: tuple[str, str]
    """Their locations."""
    delta_cosine: float
    sign_agreement: float
    """Of the weights that both change, the share that they change in the same direction."""
    cosine: float
    """Of the models themselves."""


@dataclass(frozen=True, slots=True)
class CheckSummary:
    """What was found of the models of a merge."""

    models: tuple[ModelCheck, ...]
    pairs: tuple[PairCheck, ...]
    """Of every two models that are compared with the same one."""
    output: ModelCheck | None
    """How alike the merge and its base are, where an output was given."""
    output_pairs: tuple[PairCheck, ...]
    """How alike its delta and that of every expert are."""
    num_tensors: int
    """That were looked at, at least in part."""
    num_compared: int
    """That could have been: those that are merged of several models."""
    bytes_read: int
    elapsed_s: float
    notes: tuple[str, ...]
    """What a person should know of it."""
    name: str = ""
    """Of a stage."""
    stages: tuple[CheckSummary, ...] = ()
    """Of what is merged before."""

    @property
    def refused(self) -> tuple[ModelCheck, ...]:
        """The models that a merge refuses, those of stages included."""
        own = tuple(model for model in self.models if model.is_refused)
        return (*(model for stage in self.stages for model in stage.refused), *own)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``della-dist check --json`` prints; of stages only where there are some."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for key in ("models", "pairs", "output_pairs"):
            content[key] = [dataclasses.asdict(one) for one in content[key]]
        content["output"] = None if self.output is None else dataclasses.asdict(self.output)
        content["stages"] = [stage.to_dict() for stage in self.stages]
        unused = [key for key in ("name", "stages") if not content[key]]
        return {key: value for key, value in content.items() if key not in unused}


def recorded(check: CheckSummary) -> dict[str, Any]:
    """Return what is kept of a check beside the output: its figures, as a JSON-able mapping.

    ``models``, an object each; ``pairs``, rows of the indexes of two of them, the cosine of their
    deltas and the share of signs that agree. Locations are without credentials; figures that are
    not finite are null.
    """
    numbers = {model.model: number for number, model in enumerate(check.models)}
    figures = ("relative_delta", "matrix_cosine", "untouched")
    return {
        "models": [
            {
                "model": masked(model.model),
                "reference": masked(model.reference),
                "verdict": model.verdict,
                **{figure: _finite(getattr(model, figure)) for figure in figures},
            }
            for model in check.models
        ],
        "pairs": [
            [*(numbers[one] for one in pair.models), pair.delta_cosine, pair.sign_agreement]
            for pair in check.pairs
        ],
        "num_tensors": check.num_tensors,
        "num_compared": check.num_compared,
        "bytes_read": check.bytes_read,
        "elapsed_s": round(check.elapsed_s, 3),
        "notes": [masked(note) for note in check.notes],
    }


def _finite(figure: float) -> float | None:
    """Return a figure; None in the place of what JSON has no numbers for."""
    return figure if math.isfinite(figure) else None


def check_lines(check: CheckSummary, width: int | None = None) -> list[str]:
    """Return the lines that ``della-dist check`` prints.

    Parameters
    ----------
    width
        See `note_lines`.
    """
    lines = []
    for number, one in enumerate((*check.stages, check), 1):
        if check.stages:
            lines.append(f"stage   {number} of {len(check.stages) + 1}: {one.name or 'the output'}")
        lines += _lines(one, width)
    return lines


def _lines(check: CheckSummary, width: int | None) -> list[str]:
    models = check.models if check.output is None else (*check.models, check.output)
    named = dict.fromkeys(where for model in models for where in (model.reference, model.model))
    names = dict(zip(named, short_names(list(named)), strict=True))
    lines = []
    for reference in dict.fromkeys(model.reference for model in models):
        lines.append(f"against {reference}")
        mine = [model for model in models if model.reference == reference]
        longest = max(len(names[model.model]) for model in mine)
        lines += [f"        {names[model.model]:{longest}}  {_figures(model)}" for model in mine]
    for model in models:
        shown = model.oddities[:_MOST_ODDITIES]
        for odd in shown:
            files = f" ({few(odd.files, 3)})" if odd.files else ""
            lines.append(f"odd     {names[model.model]}: {odd.where}{files}: {odd.what}")
        if len(model.oddities) > len(shown):
            lines.append(f"        and {len(model.oddities) - len(shown)} more like these")
    pairs = (*check.pairs, *check.output_pairs)
    for pair in pairs[:_MOST_PAIRS]:
        one, other = (names[model] for model in pair.models)
        lines.append(
            f"deltas  {one} and {other}: cosine {pair.delta_cosine:.3f}, "
            f"signs agree at {100 * pair.sign_agreement:.0f} %"
        )
    if len(pairs) > _MOST_PAIRS:
        lines.append(f"        and {plural(len(pairs) - _MOST_PAIRS, 'pair')} more (see --json)")
    nothing = "No tensor is merged of several models that are there: there is nothing to compare."
    lines += note_lines(check.notes if models else [nothing], width)
    lines.append(
        f"read    {format_bytes(check.bytes_read)} of {check.num_tensors:,} of "
        f"{plural(check.num_compared, 'tensor')} in {format_seconds(check.elapsed_s)}"
    )
    return [printable(line) for line in lines]


#: What is printed of each; all of it is in the object.
_MOST_ODDITIES = 8
_MOST_PAIRS = 28


def _figures(model: ModelCheck) -> str:
    return (
        f"{model.verdict:16}  delta {format_percent(model.relative_delta)}, cosine "
        f"{model.matrix_cosine:.4f}, untouched {format_percent(model.untouched)}"
    )


def format_percent(share: float) -> str:
    """Return a share as a percentage of two to three digits."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 99.5 else f"{percent:.2g} %"
