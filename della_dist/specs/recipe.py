"""How one tensor is merged: everything about it but its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

Drop = Literal[
    "none", "magprune", "random", "magnitude", "outliers", "importance", "variance", "threshold"
]
Granularity = Literal["row", "tensor"]
Rescale = Literal["inverse", "l1", "none"]
OnNonfinite = Literal["error", "zero"]
Side = Literal["auto", "in", "out"]
BalanceRule = Literal["wudi", "iso_c", "tsv"]
AngleRule = Literal["slerp", "nuslerp", "multislerp", "karcher", "model_stock"]

#: Weights sum to zero, where results are divided by their sum, up to this fraction of the sum of
#: their magnitudes.
GUARD = 2.0**-20

#: The least that deltas may be limited to: smaller numbers are zero in float32.
MIN_LIMIT = 2.0**-149

#: Numbers of a merge are rounded to float32, unless an input is F64.
MAX_FLOAT32 = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Balance:
    """How matrices are merged as a whole (`della_dist.ops.whole`)."""

    rule: BalanceRule
    ridge: float = 0.05
    """Of ``wudi``: above 0."""
    side: Side = "auto"
    """Of ``wudi``: which axis the inputs of the layer are: ``in`` the columns, ``out`` the rows;
    ``auto`` by the type of the model."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(BalanceRule):
            words = " or ".join(get_args(BalanceRule))
            raise ValueError(f"rule is {self.rule!r}; it must be {words}")
        if not 0 < self.ridge <= MAX_FLOAT32:
            raise ValueError(f"ridge is {self.ridge!r}; it must be above 0, and finite")
        if self.side not in get_args(Side):
            raise ValueError(f"side is {self.side!r}; it must be auto, in or out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Angles:
    """How the experts' weights follow from the angles between their deltas.

    See `della_dist.ops.angles`, which has the rules.

    Raises
    ------
    ValueError
        If a number is out of bounds, or the rule is none of those that there are.
    """

    rule: AngleRule
    by_row: bool = False
    """Whether every row, the last axis, has angles and weights of its own; else the tensor has."""
    eps: float = 1e-8
    """Of ``multislerp``: what is added to norms, and the least norm of a mean."""
    max_iter: int = 10
    """Of ``karcher``: steps at most."""
    tol: float = 1e-5
    """Of ``karcher``: norms and angles that count as zero."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(AngleRule):
            raise ValueError(
                f"rule is {self.rule!r}; it must be {' or '.join(get_args(AngleRule))}"
            )
        for name in ("eps", "tol"):
            if not 0 < getattr(self, name) <= 1:  # NaN neither
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be in (0, 1]")
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.max_iter < 1 or self.max_iter != int(self.max_iter):
            raise ValueError(f"max_iter is {self.max_iter!r}; it must be a whole number from 1 on")
        object.__setattr__(self, "max_iter", int(self.max_iter))
        if self.by_row and self.rule not in ("nuslerp", "model_stock"):
            raise ValueError(f"{self.rule} has no weights for single rows")


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much more an expert's deltas count where no other has one (RAM+, arXiv 2601.13572).

    They are multiplied by ``1 + r * min(alpha, shared / unique)``: of how many elements others have
    a delta as well, to how many none has.
    """

    r: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if not 0 <= getattr(self, name) <= MAX_FLOAT32:  # NaN neither
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """How every element of one tensor is merged (DELLA paper, section 3).

    ``weights``, ``densities`` and ``epsilons`` have one entry an expert, in the order of the
    configuration, which is also the order of every sum over experts. The other defaults are
    DELLA's, but for a window of no width (``epsilons``): it has to fit the densities.

    Numbers become Python's own, whatever they were given as: what is computed from them must not
    depend on the type.

    Raises
    ------
    ValueError
        If they are no sequences of as many numbers as there are experts, a number is not finite,
        or a word is none of those that there are.
    """

    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    """The part of the deltas that is kept, in (0, 1]; empty: 1 for every expert."""
    epsilons: tuple[float, ...] = ()
    """Half widths of the keep-probability window; empty: 0. Without effect unless ``drop`` is
    ``magprune``."""
    gammas: tuple[float, ...] = ()
    """The part of the deltas, the largest ones, that ``outliers`` drops, in [0, 1); empty: 0. None
    where the density is 1."""
    drop: Drop = "magprune"
    """``magprune`` by magnitude rank (`della*`), ``random`` (`dare_*`), ``magnitude``, the smallest
    of the tensor (`ties`), ``outliers``, the smallest and the largest (`breadcrumbs*`),
    ``importance``, what moves least where rows differ least (`arcee_fusion`), ``variance``, where
    experts differ least (`sce`), ``threshold``, what exceeds no bound (`ram*`), or ``none``."""
    elect: bool = True
    rescale: Rescale = "inverse"
    normalize: bool = True
    lambda_: float = 1.0
    granularity: Granularity = "row"
    on_nonfinite: OnNonfinite = "error"
    seed: int = 0
    limit: float | None = None
    """The largest magnitude of a delta: larger ones are cut to it (`nearswap`)."""
    least: float = 0.0
    """Of ``threshold``: the magnitude that what is kept exceeds."""
    by_energy: bool = False
    """Whether the weights of contributions are, once signs are elected, the sum of squares of what
    is kept of each expert, divided by all (`sce`)."""
    overlap: Overlap | None = None
    """Of a method that takes the mean of what experts have at each element (`ram*`)."""
    balance: Balance | None = None
    """Of a method that merges matrices as a whole; vectors are merged element by element."""
    angles: Angles | None = None
    """None: ``weights`` are what experts are multiplied by. Else these follow from angles, and
    ``weights`` are what the rule starts with; nothing is dropped, elected or divided then."""

    def __post_init__(self) -> None:
        for name in ("weights", "densities", "epsilons", "gammas"):
            given = getattr(self, name)
            if isinstance(given, str) or not hasattr(given, "__len__"):
                raise ValueError(f"{name} is {given!r}; it must be a tuple of numbers")
        count = len(self.weights)
        defaults = {"weights": 1.0, "densities": 1.0, "epsilons": 0.0, "gammas": 0.0}
        for name, default in defaults.items():
            given = getattr(self, name)
            values = tuple(map(float, given)) if len(given) else (default,) * count
            if len(values) != count:
                raise ValueError(f"{len(values)} {name} were given for {count} experts")
            object.__setattr__(self, name, values)
        object.__setattr__(self, "lambda_", float(self.lambda_))
        numbers = (*self.weights, *self.densities, *self.epsilons, *self.gammas, self.lambda_)
        if not all(abs(number) <= MAX_FLOAT32 for number in numbers):  # NaN neither
            raise ValueError(
                "weights, densities, epsilons, gammas and lambda_ must be finite in float32"
            )
        if not all(0 <= gamma < 1 for gamma in self.gammas):
            raise ValueError(f"gammas is {self.gammas!r}; each must be at least 0 and below 1")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be {' or '.join(words)}"
                )
        for name in ("elect", "normalize"):
            if getattr(self, name) not in (False, True):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.seed != int(self.seed) or not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number below 2**64")
        object.__setattr__(self, "seed", int(self.seed))
        self._check_parts(count)

    @property
    def planned_densities(self) -> tuple[float | None, ...]:
        """The part of each expert's deltas that is kept; None where only the deltas tell."""
        if self.drop in ("importance", "threshold"):
            return (None,) * len(self.weights)
        return (1.0,) * len(self.weights) if self.drop == "none" else self.densities

    def _check_parts(self, count: int) -> None:
        """Refuse what does not go together."""
        if self.angles is not None:
            self._check_angles(self.angles)
        if self.drop == "importance" and (count != 1 or self.rescale != "none"):
            raise ValueError("importance tells what is kept of one expert, which is not rescaled")
        if self.limit is not None:
            self._check_limit(self.limit)
        if not 0 <= self.least <= MAX_FLOAT32:  # NaN neither
            raise ValueError(f"least is {self.least!r}; it must be at least 0, and finite")
        if self.drop == "variance" and (len(set(self.densities)) > 1 or self.rescale != "none"):
            raise ValueError("variance tells one density for all experts, which are not rescaled")
        if self.by_energy and not (
            self.elect and self.normalize and self.drop in ("variance", "none")
        ):
            raise ValueError("by_energy is the weight of what is elected, and normalized")
        if self.overlap is not None and (
            self.elect or self.normalize or self.drop not in ("threshold", "none")
        ):
            raise ValueError("with overlap, nothing is elected, normalized or dropped by rank")
        if (self.by_energy or self.overlap is not None) and self.rescale != "none":
            raise ValueError("by_energy and with overlap, nothing is rescaled")

    def _check_limit(self, limit: float) -> None:
        if not MIN_LIMIT <= limit <= MAX_FLOAT32:  # NaN neither
            raise ValueError(f"limit is {limit!r}; it must be above 0, and finite, in float32")
        if self.drop != "none" or self.rescale != "none":
            raise ValueError("with a limit, nothing is dropped or rescaled")
        object.__setattr__(self, "limit", float(limit))

    def _check_angles(self, angles: object) -> None:
        if not isinstance(angles, Angles):
            raise ValueError(f"angles is {angles!r}; it must be Angles, or None")  # noqa: TRY004
        if self.drop != "none" or self.elect or self.normalize or self.rescale != "none":
            raise ValueError("with angles, nothing is dropped, elected, normalized or rescaled")
        count = len(self.weights)
        if (angles.rule in ("slerp", "nuslerp") and count != 2) or (
            angles.rule == "model_stock" and count < 2
        ):
            raise ValueError(f"{angles.rule} cannot merge {count} experts")


_WORDS = {
    "drop": get_args(Drop),
    "rescale": get_args(Rescale),
    "granularity": get_args(Granularity),
    "on_nonfinite": get_args(OnNonfinite),
}


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """Everything about one tensor but its data: enough to merge any block of it anywhere."""

    name: str
    shape: tuple[int, ...]
    base_dtype: str | None
    """None where the method has no base (``linear``): the base then counts as zero."""
    expert_dtypes: tuple[str, ...]
    out_dtype: str
    settings: MergeSettings
    stage: int = 0
    """Merges that lie one after another behind the inputs: part of the key of the random words."""
    is_delta: tuple[bool, ...] = ()
    """Which experts are deltas themselves, from which no base is to be subtracted: rounded to
    weights, deltas much smaller than their weights would be lost. Empty: none is."""

    def __post_init__(self) -> None:
        count = len(self.expert_dtypes)
        if not isinstance(self.name, str):
            raise ValueError(f"the tensor is called {self.name!r}; its name must be text")  # noqa: TRY004
        if not isinstance(self.settings, MergeSettings):
            raise ValueError(f"settings is {self.settings!r}; it must be MergeSettings")  # noqa: TRY004
        if len(self.settings.weights) != count:
            raise ValueError(f"{len(self.settings.weights)} weights were given for {count} experts")
        if not isinstance(self.is_delta, tuple) or len(self.is_delta) not in (0, count):
            raise ValueError(
                f"is_delta is {self.is_delta!r}; it must have {count} entries, or none"
            )
        object.__setattr__(self, "is_delta", self.is_delta or (False,) * count)


def keeps_all(settings: MergeSettings) -> bool:
    """Return whether nothing of any delta is dropped, so that none is rescaled."""
    by_density = settings.drop not in ("importance", "threshold")
    is_dense = by_density and all(density == 1 for density in settings.densities)
    return settings.drop == "none" or is_dense


def is_wide(recipe: TensorRecipe) -> bool:
    """Return whether a tensor is merged in float64: if any input is F64; else in float32."""
    return "F64" in (recipe.base_dtype, *recipe.expert_dtypes)


def of_one(recipe: TensorRecipe, m: int) -> TensorRecipe:
    """Return the recipe of what is left of the delta of one expert after the drop."""
    settings = recipe.settings
    return replace(
        of_deltas(recipe),
        expert_dtypes=("F64" if is_wide(recipe) else "F32",),
        is_delta=(),
        settings=replace(
            settings,
            weights=(1.0,),
            densities=settings.densities[m : m + 1],
            epsilons=settings.epsilons[m : m + 1],
            gammas=settings.gammas[m : m + 1],
            elect=False,
            normalize=False,
            lambda_=1.0,
        ),
    )


def joining(recipe: TensorRecipe) -> TensorRecipe:
    """Return the recipe of adding a merged delta, times lambda, to the base.

    It counts as the first of the experts. After it come their own deltas, which add nothing: they
    are there to be compared with what is written.
    """
    count = len(recipe.expert_dtypes)
    settings = MergeSettings(
        weights=(1.0,) + (0.0,) * count,
        drop="none",
        elect=False,
        rescale="none",
        normalize=False,
        lambda_=recipe.settings.lambda_,
        on_nonfinite=recipe.settings.on_nonfinite,
        balance=recipe.settings.balance,
    )
    expert = "F64" if is_wide(recipe) else "F32"
    return replace(
        recipe,
        expert_dtypes=(expert,) * (1 + count),
        settings=settings,
        is_delta=(True,) * (1 + count),
    )


def of_deltas(recipe: TensorRecipe) -> TensorRecipe:
    """Return the recipe of the delta alone: of experts that are deltas, before it joins the base.

    Every decision and every sum are those of `recipe`; the result is rounded no further.
    """
    dtype = "F64" if is_wide(recipe) else "F32"
    return replace(
        recipe,
        base_dtype=None,
        expert_dtypes=(dtype,) * len(recipe.expert_dtypes),
        out_dtype=dtype,
        is_delta=(),
    )
