"""The parameters: what a configuration may say of how tensors are merged, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from della_dist.config import scalars
from della_dist.config.problem import Problem
from della_dist.specs.recipe import GUARD

#: The epsilon that is chosen where none is given and density allows it.
DEFAULT_EPSILON = 0.15
#: The gamma that is.
DEFAULT_GAMMA = 0.01


@dataclass(frozen=True, slots=True)
class Spelling:
    """Another key that says the same."""

    key: str
    parse: Callable[[object], Any]
    """Returns the value of the parameter, not of the key."""
    meaning: str
    """As a formula."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key of ``parameters``."""

    parse: Callable[[object], Any]
    """Converts and checks one value (`della_dist.config.scalars`)."""
    of_experts: bool
    """Whether each expert may have its own; otherwise it holds for all alike."""
    default: float | bool | str | None = None
    """None: the method's, or one that depends on other parameters, or nothing is done."""
    other: Spelling | None = None


#: The parameters by name, in the order in which configurations are shown.
PARAMETERS: Mapping[str, Parameter] = {
    "weight": Parameter(scalars.number, of_experts=True, default=1.0),
    "scale": Parameter(scalars.number, of_experts=True, default=1.0),
    "density": Parameter(
        scalars.density,
        of_experts=True,
        other=Spelling("drop_rate", scalars.drop_rate, "1 - density"),
    ),
    "epsilon": Parameter(
        scalars.epsilon,
        of_experts=True,
        other=Spelling("window_size", scalars.window_size, "2 epsilon"),
    ),
    "gamma": Parameter(scalars.gamma, of_experts=True),
    "int8_mask": Parameter(scalars.switch, of_experts=True),
    "normalize": Parameter(scalars.switch, of_experts=False),
    "rescale": Parameter(scalars.rescale, of_experts=False),
    "lambda": Parameter(scalars.number, of_experts=False, default=1.0),
    "ridge": Parameter(scalars.ridge, of_experts=False, default=0.05),
    "side": Parameter(scalars.one_of("auto", "in", "out"), of_experts=False, default="auto"),
    "t": Parameter(scalars.part_of_the_way, of_experts=False),
    "select_topk": Parameter(scalars.selected, of_experts=False, default=1.0),
    "r": Parameter(scalars.not_negative, of_experts=False, default=0.1),
    "alpha": Parameter(scalars.not_negative, of_experts=False, default=0.2),
    "nuslerp_flatten": Parameter(scalars.switch, of_experts=False, default=True),
    "nuslerp_row_wise": Parameter(scalars.switch, of_experts=False, default=False),
    "filter_wise": Parameter(scalars.switch, of_experts=False, default=False),
    "normalize_weights": Parameter(scalars.switch, of_experts=False, default=True),
    "eps": Parameter(scalars.small, of_experts=False, default=1e-8),
    "max_iter": Parameter(scalars.steps, of_experts=False, default=10),
    "tol": Parameter(scalars.small, of_experts=False, default=1e-5),
}


def parameter_keys(
    *, of_expert: bool, meanings: Mapping[str, Parameter] = PARAMETERS
) -> dict[str, tuple[str, Callable[[object], Any]]]:
    """Return every key of a block of parameters: its parameter's name, and how it is parsed.

    Parameters
    ----------
    of_expert
        Whether only those that an expert may have its own of.
    meanings
        The parameters as the method has them.
    """
    keys: dict[str, tuple[str, Callable[[object], Any]]] = {}
    for name, parameter in meanings.items():
        if parameter.of_experts or not of_expert:
            keys[name] = (name, parameter.parse)
            if parameter.other is not None:
                keys[parameter.other.key] = (name, parameter.other.parse)
    return keys


def default_epsilon(density: float) -> float:
    """Return the half width of the window where the configuration gives none."""
    return max(0.0, min(DEFAULT_EPSILON, 1 - density, density / 2))


def fitting_epsilon(density: float, epsilon: float, model: str) -> float:
    """Return epsilon, with rounding errors of its upper bound taken off; 0 at densities 0 and 1.

    There it has no effect, as in mergekit: everything is dropped, or kept.

    Raises
    ------
    Problem
        If keep probabilities of `model` would leave (0, 1].
    """
    if density in (0, 1):
        return 0.0
    low, high = density - epsilon, density + epsilon
    if low < scalars.MIN_KEEP or high > 1 + scalars.TOLERANCE:
        bound = min(density, 1 - density)
        relation = "at most" if 1 - density < density else "below"
        raise Problem(
            "",
            f"density {density:.6g} with epsilon {epsilon:.6g} (window_size {2 * epsilon:.6g}) for "
            f"{model} gives keep probabilities from {low:.6g} to {high:.6g}; they must be above 0 "
            f"and at most 1, so epsilon must be {relation} {bound:.6g} at this density",
        )
    return min(epsilon, 1 - density)


def fitting_gamma(density: float, gamma: float | None, model: str) -> float:
    """Return the part that is dropped as outliers; 0 at densities 0 and 1, where it has no effect.

    Where none is given it is what leaves the density as it is, and `DEFAULT_GAMMA` at most.

    Raises
    ------
    Problem
        If more than all deltas of `model` would be kept and dropped.
    """
    if density in (0, 1):
        return 0.0
    if gamma is None:
        return min(DEFAULT_GAMMA, 1 - density)
    if density + gamma > 1 + scalars.TOLERANCE:
        raise Problem(
            "",
            f"density {density:.6g} with gamma {gamma:.6g} for {model} is more than all of a "
            f"delta: gamma must be at most {1 - density:.6g} at this density",
        )
    return gamma


def check_sum(weights: Sequence[float], divided: str, instead: str = "") -> None:
    """Refuse weights of an average that sum to zero.

    Parameters
    ----------
    weights
        Of all experts.
    divided
        What is divided by their sum, for the message.
    instead
        What else is possible.

    Raises
    ------
    Problem
        If they do, or nearly so.
    """
    if abs(sum(weights)) <= GUARD * sum(map(abs, weights)):
        listed = ", ".join(f"{w:g}" for w in weights)
        raise Problem(
            "",
            f"the weights ({listed}) sum to zero, and {divided} by their sum. "
            f"Change a weight{instead}",
        )


def divided_by(switch: str) -> tuple[str, str]:
    """Return what `check_sum` says where a switch decides whether weights are divided."""
    return f"`{switch}: true` divides", f", or set `{switch}: false`"


def without_dropped(
    weights: Sequence[float], densities: Sequence[float], *, normalize: bool, elect: bool
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Return weights, densities and ``normalize`` that mean the same without a density of 0.

    What is dropped altogether has weight 0 then. An average is divided by its weight all the same,
    so that the others' weights are divided here, and nothing is by the kernels.
    """
    if 0 not in densities:
        return tuple(weights), tuple(densities), normalize
    total = sum(weights) if normalize and not elect else 1.0
    kept = tuple(w / total if d else 0.0 for w, d in zip(weights, densities, strict=True))
    return kept, tuple(d or 1.0 for d in densities), normalize and elect
