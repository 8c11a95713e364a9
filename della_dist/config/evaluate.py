"""What the parameters of a configuration say of one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from della_dist.config.parameters import (
    check_sum,
    default_epsilon,
    divided_by,
    fitting_epsilon,
    fitting_gamma,
    without_dropped,
)
from della_dist.config.problem import Problem, gathering
from della_dist.config.scalars import MAX_WAY
from della_dist.config.settings import Setting
from della_dist.specs.recipe import (
    AngleRule,
    Angles,
    Balance,
    BalanceRule,
    MergeSettings,
    Overlap,
)

if TYPE_CHECKING:
    from della_dist.config.methods import Method
    from della_dist.config.model import MergeConfig


def evaluate(
    config: MergeConfig, tensor_name: str, t: float, of_experts: Sequence[str] | None = None
) -> MergeSettings:
    """Return how one tensor is merged; see `MergeConfig.settings_for`, which caches it.

    Raises
    ------
    Problem
        If density and epsilon of any expert do not fit together at this tensor, or the weights of
        an average sum to zero.
    """
    method = config.method

    def value(
        settings: Mapping[str, Setting[Any]],
        name: str,
        default: Any,  # noqa: ANN401
        tensor: str = tensor_name,
    ) -> Any:  # noqa: ANN401
        found = settings[name].at(tensor, t) if name in settings else None
        return default if found is None else found

    own = of_experts or (tensor_name,) * len(config.models)
    written = [
        value(expert.settings, method.weighted_by, 1.0, tensor)
        for expert, tensor in zip(config.models, own, strict=True)
    ]
    if method.angles is not None:
        shared = {name: value(config.settings, name, None) for name in config.settings}
        return _with_angles(config, method.angles, written, shared)
    kept, epsilons, gammas = [], [], []
    normalize = value(config.settings, "normalize", method.normalize)
    topk = value(config.settings, "select_topk", 1.0)
    with gathering() as problems:
        for expert, tensor in zip(config.models, own, strict=True):
            density = value(expert.settings, "density", None, tensor)
            epsilon = value(expert.settings, "epsilon", None, tensor)
            if method.by_energy:
                density, epsilon = topk, 0.0
            elif method.drop == "none" or density is None:
                density, epsilon = 1.0, 0.0
            elif method.drop != "magprune":
                epsilon = 0.0
            elif epsilon is None:
                epsilon = default_epsilon(density)
            else:
                with problems.at():
                    epsilon = fitting_epsilon(density, epsilon, expert.model)
            gamma = 0.0
            if method.drop == "outliers":
                with problems.at():
                    written_gamma = value(expert.settings, "gamma", None, tensor)
                    gamma = fitting_gamma(density, written_gamma, expert.model)
            kept.append(density)
            gammas.append(gamma)
            epsilons.append(epsilon)
        if normalize and not method.elect:
            with problems.at():
                check_sum(written, *_divided(method))
    weights, densities, normalize = without_dropped(
        written, kept, normalize=normalize, elect=method.elect
    )
    limit = _limit(value(config.settings, "t", None)) if method.is_limited else None
    if limit == 0:
        limit, weights = None, (0.0,) * len(weights)
    balance = None
    if method.balance is not None:
        _check_balanced(method.balance, weights, kept)
        shared = {name: value(config.settings, name, None) for name in ("ridge", "side")}
        given = {name: one for name, one in shared.items() if one is not None}
        balance = Balance(method.balance, **given)
    overlap = Overlap(*(value(config.settings, name, 0.0) for name in ("r", "alpha")))
    return MergeSettings(
        balance=balance,
        limit=limit,
        by_energy=method.by_energy and topk != 0,
        overlap=overlap if method.has_overlap else None,
        least=value(config.settings, "epsilon", 0.0),
        drop=method.drop,
        elect=method.elect,
        rescale=value(config.settings, "rescale", "none"),
        normalize=normalize,
        lambda_=value(config.settings, "lambda", 1.0),
        granularity=config.granularity,
        on_nonfinite=config.on_nonfinite,
        seed=config.seed,
        weights=weights,
        densities=densities,
        epsilons=tuple(epsilons),
        gammas=tuple(gammas),
    )


def _check_balanced(rule: BalanceRule, weights: Sequence[float], kept: Sequence[float]) -> None:
    """Refuse what has no meaning where matrices are merged as a whole."""
    if rule == "wudi" and any(weight < 0 for weight in weights):
        listed = ", ".join(f"{w:g}" for w in weights)
        raise Problem("", f"the weights ({listed}) must be at least 0 with this method")
    if 0 in kept:
        raise Problem("", "a density of 0 drops an expert altogether: leave it out instead")


def _divided(method: Method) -> tuple[str, str]:
    """Return what `check_sum` says of a method."""
    if method.is_balanced:  # whatever `normalize` is
        return "vectors, which are merged by their weighted mean, are divided", ""
    return divided_by("normalize")


def _with_angles(
    config: MergeConfig, rule: AngleRule, weights: list[float], shared: Mapping[str, Any]
) -> MergeSettings:
    """Return how one tensor is merged by weights that follow from angles.

    Parameters
    ----------
    weights
        Of the experts, as they are written down, 1 where none are.
    shared
        What the other parameters are for this tensor, by name; None where no filter matches.
    """
    angles = Angles(rule=rule)
    match rule:
        case "slerp":
            weights = _on_the_way(shared.get("t"))
        case "nuslerp":
            check_sum(weights, "the way from one model to the other is divided")
            weights = _on_the_way(weights[1] / math.fsum(weights))
            angles = replace(angles, by_row=not shared["nuslerp_flatten"])
            if angles.by_row and shared["nuslerp_row_wise"]:
                raise Problem(
                    "parameters.nuslerp_row_wise",
                    "gives every column an angle of its own, and a column lies in all blocks of a "
                    "tensor. Leave it out: every row has an angle of its own then, or with "
                    "`nuslerp_flatten: true` the tensor has one",
                )
        case "model_stock":
            angles = replace(angles, by_row=shared["filter_wise"])
        case "multislerp":
            angles = replace(angles, eps=shared["eps"])
            if len(weights) == 1:
                weights = [1.0]
            elif shared["normalize_weights"]:
                check_sum(weights, *divided_by("normalize_weights"))
                total = math.fsum(weights)
                weights = [weight / total for weight in weights]
        case "karcher":
            angles = replace(angles, max_iter=shared["max_iter"], tol=shared["tol"])
    return MergeSettings(
        weights=tuple(weights),
        drop="none",
        elect=False,
        rescale="none",
        normalize=False,
        granularity="row",
        on_nonfinite=config.on_nonfinite,
        seed=config.seed,
        angles=angles,
    )


def _limit(t: float | None) -> float:
    """Return how far elements go at most."""
    if t is None:
        raise Problem(
            "parameters.t",
            "has no value here: it says how far an element goes from the base at most. Write "
            "`t: 0.0001`, or end its list of conditions with `- value: 0.0001`",
        )
    return t


def _on_the_way(t: float | None) -> list[float]:
    """Return the weights of two models at a part of the way between them."""
    if t is None:
        raise Problem(
            "parameters.t",
            "has no value here: it says where the output lies, 0 the base, 1 the other model. "
            "Write `t: 0.5`, or end its list of conditions with `- value: 0.5`",
        )
    if abs(t) > MAX_WAY:
        raise Problem(
            "",
            f"the weights lead {t:.6g} times as far as the second model: their sum is next to "
            f"nothing, and at most {MAX_WAY} times is allowed. Change a weight",
        )
    return [1 - t, t]


def check_everywhere(config: MergeConfig) -> None:
    """Check what tensors that no filter matches will get, at every point of every gradient.

    Between two points everything is linear, so that density and epsilon fit there as well,
    unless a density is 0 or 1 at one of them: what lies between, planning meets.

    Raises
    ------
    Problem
        For the first point of every slice where something does not fit.
    """
    points = {0.0, 1.0}
    for _, setting in config.all_settings():
        last = setting.branches[-1]
        if not last.filter and len(last.points) > 1:
            points.update(i / (len(last.points) - 1) for i in range(len(last.points)))
    with gathering() as problems:
        for part in [part.config for part in config.slices] or [config]:
            with problems.at():
                for t in sorted(points):
                    evaluate(part, "", t)
