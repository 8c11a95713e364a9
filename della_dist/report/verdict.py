"""What the figures of a sample say of a model, and the thresholds.

The README has the cases that the thresholds were chosen by ("Checking the models"); the study is
`tests.quality`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from della_dist.ops.similarity import F64Array, Sums
from della_dist.planning.sampling import Sample
from della_dist.report.check import ModelCheck, Oddity, PairCheck, Verdict, format_percent

#: Cosine of matrices with those of the reference, below which they have nothing in common. Those of
#: unrelated models are at 0.00, give or take 0.04 of a sample; all that was trained from one model
#: is above 0.9, and even an initialisation and what was trained from it are at 0.95.
LEAST_COSINE = 0.5

#: Relative norm of a delta, above which it is much more than a fine-tune. The hardest experts of
#: the README's study that merge well are at 0.117, the next ones, of which merges lose half, are at
#: 0.165 and more; this is their geometric mean.
FAR = 0.14

#: By what factor the norm of a matrix, in parts of the reference's, may differ from those of other
#: matrices. In the study it is from 0.99 to 1.13 in all that was trained from the reference.
NORM_FACTOR = 2.0

#: The same without regard to others: no training does that, but bytes that are not weights do.
EXTREME_NORM_FACTOR = 16.0

#: A tensor's relative delta is an outlier beyond so many times the median of its kind. In the study
#: the largest of a kind is at most 1.3 times its median; among layers as deep as those of large
#: models there is more room.
OUTLIER_FACTOR = 5.0


@dataclass(frozen=True, slots=True)
class _Row:
    """One tensor of one model."""

    sample: Sample
    files: tuple[str, ...]
    """The one that it is in; none where the model has adapters."""
    is_delta: bool
    """Whether the model is the reference with adapters, whose backbone it has in any case."""
    nonfinite: int
    """Where the reference is finite everywhere."""
    reference_nonfinite: int
    reference_square: float
    square: float
    dot: float
    delta_square: float
    untouched: int
    count: int

    @property
    def is_bounded(self) -> bool:
        """Whether no sum was too large for float64."""
        return math.isfinite(self.reference_square + self.square + self.delta_square)

    @property
    def cosine(self) -> float | None:
        if not self.is_bounded or not self.reference_square or not self.square:
            return None
        return self.dot / (math.sqrt(self.reference_square) * math.sqrt(self.square))

    @property
    def relative_delta(self) -> float:
        if not self.reference_square:
            return 0.0 if not self.delta_square else math.inf
        return math.sqrt(self.delta_square / self.reference_square)

    @property
    def norm_ratio(self) -> float | None:
        if not self.is_bounded or not self.reference_square or not self.square:
            return None
        return math.sqrt(self.square) / math.sqrt(self.reference_square)


def judge(
    found: Sequence[tuple[Sample, Sums]],
    location: Callable[[int], str],
    file_name: Callable[[int, int], str],
) -> tuple[dict[int, ModelCheck], list[tuple[int, int, PairCheck]]]:
    """Return what is to be said of each model, and of the deltas of every two.

    Parameters
    ----------
    found
        The samples, and what was added up of them.
    location
        Of a checkpoint by its number.
    file_name
        Of a shard by the numbers of its checkpoint and of itself.

    Returns
    -------
    tuple
        By number, and in order of the numbers. A model that is compared with several others, as in
        slices, is judged by all of that together.
    """
    rows: dict[int, list[_Row]] = {}
    references: dict[int, int] = {}
    for sample, sums in found:
        for m, (number, shard) in enumerate(sample.files[1:]):
            references.setdefault(number, sample.files[0][0])
            rows.setdefault(number, []).append(
                _Row(
                    sample,
                    tuple(filter(None, [file_name(number, shard)])),
                    sample.is_delta[m],
                    0 if sums.reference_nonfinite else int(sums.nonfinite[m]),
                    sums.reference_nonfinite,
                    float(sums.reference_squares[m]),
                    float(sums.squares[m]),
                    float(sums.dots[m]),
                    float(sums.delta_dots[m, m]),
                    int(sums.untouched[m]),
                    sums.num_elements,
                )
            )
    checks: dict[int, ModelCheck] = {}
    left_out: set[tuple[int, str]] = set()
    with_matrices = {n for n, own in rows.items() if any(row.sample.is_matrix for row in own)}
    for number in sorted(with_matrices or rows):  # a model below an adapter that changes them all
        checks[number], names = _judged(
            location(number), location(references[number]), rows[number]
        )
        left_out |= {(number, name) for name in names}
    return checks, list(_pairs(found, left_out, location))


def _judged(model: str, reference: str, rows: list[_Row]) -> tuple[ModelCheck, set[str]]:
    """Return what is to be said of a model, and which tensors its figures are not of."""
    body = [row for row in rows if row.sample.layer] or rows
    body = [row for row in body if row.sample.is_matrix] or body
    in_body = {row.sample.name for row in body}
    others = [row for row in rows if row.sample.name not in in_body]
    broken = {row.sample.name: what for row in body if (what := _broken(row))}
    broken |= {row.sample.name: what for row in others if (what := _unreadable(row))}
    whole = [row for row in body if row.sample.name not in broken]
    cosines = [cosine for row in whole if (cosine := row.cosine) is not None]
    middle = median(cosines) if cosines else 0.0
    groups: list[Oddity] = []
    verdict: Verdict
    models = [row for row in whole if not row.is_delta]
    if models and cosines and middle < LEAST_COSINE:
        verdict = "another backbone"
    else:
        strange = dict(_strange(models))
        groups = list(_groups(models))
        grouped = {name for odd in groups for name in _members(odd.where, models)}
        broken |= {name: what for name, what in strange.items() if name not in grouped}
        verdict = "damaged" if broken else "another backbone" if groups else "same backbone"
    new = list(_new(others))
    left_out = {*broken, *(odd.where for odd in new)}
    healthy = [row for row in rows if row.sample.name not in left_out and row.is_bounded]
    healthy = [row for row in healthy if row.sample.is_matrix] or healthy
    healthy = [row for row in healthy if row.reference_square] or healthy
    relative = _estimate(healthy, lambda row: row.delta_square, lambda row: row.reference_square)
    lengths = _estimate(healthy, lambda row: row.square, lambda row: row.reference_square)
    products = _ratio(healthy, lambda row: row.dot, lambda row: row.reference_square)
    untouched = _ratio(healthy, lambda row: row.untouched, lambda row: row.count)
    if verdict == "same backbone":
        if all(row.untouched == row.count for row in rows):
            verdict = "copy"
        elif relative > FAR:
            verdict = "far"
    odd = [Oddity(name, _files(rows, [name]), what) for name, what in broken.items()]
    odd += groups
    if verdict in ("same backbone", "far"):
        odd += _outliers(whole, relative)
        odd += new
    odd += _of_reference(rows)
    return ModelCheck(
        model=model,
        reference=reference,
        verdict=verdict,
        relative_delta=_rounded(relative),
        cosine=_rounded(products / lengths if lengths else 0.0),
        matrix_cosine=_rounded(middle),
        untouched=_rounded(untouched),
        num_tensors=len(rows),
        num_nonfinite=sum(row.nonfinite for row in rows),
        oddities=tuple(odd),
    ), left_out


def _unreadable(row: _Row) -> str | None:
    """Return that there are values that are no numbers, if so; unused rows may be any others."""
    if row.nonfinite:
        return f"{row.nonfinite:,} of {row.count:,} values are NaN or infinite"
    return None


def _broken(row: _Row) -> str | None:
    """Return what no training leaves behind, if there is something."""
    if row.nonfinite or row.is_delta or not row.reference_square:
        return _unreadable(row)
    if not row.square:
        return "all zeros, where the other model has none" if row.count > 1 else None
    ratio = row.norm_ratio
    if ratio is not None and not 1 / EXTREME_NORM_FACTOR < ratio < EXTREME_NORM_FACTOR:
        return f"its norm is {ratio:.3g} times that of the other model"
    return None


def _strange(rows: list[_Row]) -> Iterator[tuple[str, str]]:
    """Yield tensors that are out of line among the others, and how."""
    ratios = [math.log(ratio) for row in rows if (ratio := row.norm_ratio)]
    usual = median(ratios) if ratios else 0.0
    deltas = median([row.relative_delta for row in rows]) if rows else 0.0
    for row in rows:
        ratio, cosine = row.norm_ratio, row.cosine
        if ratio is None or cosine is None or not row.sample.is_matrix:
            continue
        if abs(math.log(ratio) - usual) > math.log(NORM_FACTOR):
            yield (
                row.sample.name,
                (
                    f"its norm is {ratio:.3g} times that of the other model, that of others "
                    f"{math.exp(usual):.3g} times"
                ),
            )
        elif cosine < LEAST_COSINE and row.relative_delta > OUTLIER_FACTOR * deltas:
            yield row.sample.name, _unlike(cosine, row.relative_delta)


def _unlike(cosine: float, relative_delta: float) -> str:
    return f"cosine {cosine:.3f}, delta {format_percent(relative_delta)}"


def _groups(rows: list[_Row]) -> Iterator[Oddity]:
    """Yield the layers, and the kinds of tensors, that have nothing in common with the reference.

    Those of layers in another order, and of heads or neurons.
    """
    members: dict[str, list[_Row]] = {}
    for row in rows:
        if row.cosine is not None and row.sample.is_matrix:
            for where in filter(None, (row.sample.layer, row.sample.kind)):
                members.setdefault(where, []).append(row)
    for where, mine in members.items():
        cosines = [row.cosine for row in mine if row.cosine is not None]
        if len(mine) > 1 and median(cosines) < LEAST_COSINE:
            middle = median(row.relative_delta for row in mine)
            names = [row.sample.name for row in mine]
            yield Oddity(where, _files(rows, names), _unlike(median(cosines), middle))


def _members(where: str, rows: list[_Row]) -> Iterator[str]:
    return (row.sample.name for row in rows if where in (row.sample.layer, row.sample.kind))


def _outliers(rows: list[_Row], relative: float) -> Iterator[Oddity]:
    """Yield tensors that moved much further than others of their kind."""
    kinds: dict[str, list[_Row]] = {}
    for row in rows:
        kinds.setdefault(row.sample.kind, []).append(row)
    for mine in kinds.values():
        usual = max(median(row.relative_delta for row in mine), relative)
        for row in mine:
            if FAR < row.relative_delta < math.inf and row.relative_delta > OUTLIER_FACTOR * usual:
                yield Oddity(
                    row.sample.name,
                    row.files,
                    f"delta {format_percent(row.relative_delta)}, that of its kind "
                    f"{format_percent(usual)}",
                )


def _of_reference(rows: list[_Row]) -> Iterator[Oddity]:
    """Yield tensors of which it is the reference that is odd."""
    for row in rows:
        if row.reference_nonfinite:
            count = f"{row.reference_nonfinite:,} of {row.count:,}"
            yield Oddity(row.sample.name, (), f"{count} values of the other are NaN or infinite")
        elif row.sample.is_matrix and row.square and not row.reference_square:
            yield Oddity(row.sample.name, (), "all zeros in the other, and not here")


def _new(rows: list[_Row]) -> Iterator[Oddity]:
    """Yield embeddings and heads that are others, as of fine-tunes that begin with new ones."""
    for row in rows:
        cosine = row.cosine
        if row.sample.is_matrix and cosine is not None and cosine < LEAST_COSINE:
            yield Oddity(row.sample.name, row.files, f"new, {_unlike(cosine, row.relative_delta)}")


def _files(rows: Iterable[_Row], names: Iterable[str]) -> tuple[str, ...]:
    wanted = set(names)
    return tuple(dict.fromkeys(f for row in rows if row.sample.name in wanted for f in row.files))


def _ratio(
    rows: list[_Row], above: Callable[[_Row], float], below: Callable[[_Row], float]
) -> float:
    """Return the ratio of two sums over the model, of which each tensor stands for its kind."""
    divisor = math.fsum(row.sample.weight * below(row) for row in rows)
    if not divisor:
        return 0.0
    return math.fsum(row.sample.weight * above(row) for row in rows) / divisor


def _estimate(
    rows: list[_Row], above: Callable[[_Row], float], below: Callable[[_Row], float]
) -> float:
    return math.sqrt(_ratio(rows, above, below))


def _rounded(number: float) -> float:
    """Return a figure without the digits that the order of a sum may show in."""
    return float(f"{number:.6g}")


def _pairs(
    found: Sequence[tuple[Sample, Sums]],
    left_out: set[tuple[int, str]],
    location: Callable[[int], str],
) -> Iterator[tuple[int, int, PairCheck]]:
    """Yield what is to be said of every two models that are compared with the same one."""
    added: dict[tuple[int, int], F64Array] = {}
    for sample, sums in [one for one in found if one[0].is_matrix] or found:
        numbers = [number for number, _ in sample.files[1:]]
        squares, inner = sums.delta_dots.diagonal(), sums.reference_squares
        for i, a in enumerate(numbers):
            for j, b in enumerate(numbers[i + 1 :], i + 1):
                if {(a, sample.name), (b, sample.name)} & left_out:
                    continue
                # Of the models: (r + d) (r + e) = r r + r d + r e + d e, with r d = m r - r r.
                dot = sums.delta_dots[i, j] + sums.dots[i] + sums.dots[j] - inner[i]
                one = [sums.delta_dots[i, j], squares[i], squares[j], dot]
                one += [sums.squares[i], sums.squares[j], sums.agreed[i, j], sums.changed[i, j]]
                if all(map(math.isfinite, one)):
                    weighted = sample.weight * np.array(one, np.float64)
                    added[a, b] = added[a, b] + weighted if (a, b) in added else weighted
    for (a, b), (delta, d, e, dot, p, q, agreed, changed) in added.items():
        yield (
            a,
            b,
            PairCheck(
                (location(a), location(b)),
                _rounded(_cosine(delta, d, e)),
                _rounded(agreed / changed if changed else 0.0),
                _rounded(_cosine(dot, p, q)),
            ),
        )


def _cosine(dot: float, square: float, other: float) -> float:
    product = math.sqrt(square) * math.sqrt(other)
    return float(dot / product) if product else 0.0
