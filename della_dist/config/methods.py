"""The merge methods: one pipeline, different parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from della_dist.config import scalars
from della_dist.config.parameters import PARAMETERS, Parameter
from della_dist.specs.recipe import AngleRule, BalanceRule, Drop, Rescale


@dataclass(frozen=True, slots=True)
class Method:
    """What a merge method is made of. The defaults are those of mergekit's method of that name."""

    title: str
    """What people call it."""
    papers: tuple[str, ...]
    """On arXiv."""
    drop: Drop = "none"
    elect: bool = False
    rescale: Rescale = "none"
    """Where the configuration does not say otherwise."""
    normalize: bool = False
    """Where the configuration does not say otherwise."""
    has_base: bool = True
    weighted_by: str = "weight"
    """The parameter that multiplies an expert."""
    num_models: int | None = None
    """How many it takes; None: any number."""
    balance: BalanceRule | None = None
    """How matrices are merged as a whole; None: element by element."""
    lambda_: float = 1.0
    """Where the configuration does not say otherwise."""
    least_models: int = 1
    angles: AngleRule | None = None
    """How weights follow from the angles between the models, or their deltas."""
    base_among: Literal["first", "any"] | None = None
    """Where the base is one of the models, as in mergekit: the first of them, which must be named,
    or any, which may be."""
    base_is_optional: bool = False
    """Whether deltas are merged only where a base is given, and the models themselves otherwise."""
    own: frozenset[str] | None = None
    """Names of its parameters; None: those that follow from its parts."""
    meanings: Mapping[str, Parameter] = field(default_factory=dict)
    """Parameters that mean something else than with other methods."""
    is_limited: bool = False
    """Whether elements go a part of the way only, ``t`` at most."""
    by_energy: bool = False
    """Whether weights follow from the squares of what is kept."""
    has_overlap: bool = False
    """Whether each element is the mean of what experts have there."""
    note: str = ""
    """What comes out otherwise than by mergekit, on purpose."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """All parameters by name, as the method has them."""
        return {**PARAMETERS, **self.meanings}

    @property
    def passes_through(self) -> bool:
        """Whether it takes the tensors of one model, and merges nothing."""
        return self.num_models == 1 and not self.has_base

    def given(self, base: object) -> Method:
        """Return the method as it is with this base, or with None."""
        return replace(self, has_base=False) if self.base_is_optional and base is None else self

    def wrong_number(self, count: int) -> str | None:
        """Return how many models it takes, if not `count`."""
        if self.num_models is not None:
            return None if count == self.num_models else str(self.num_models)
        return None if count >= self.least_models else f"at least {self.least_models}"

    @property
    def is_balanced(self) -> bool:
        """Whether matrices are merged as a whole."""
        return self.balance is not None

    @property
    def is_decomposed(self) -> bool:
        """Whether singular values are found: equal on machines of one kind, not on all."""
        return self.balance in ("iso_c", "tsv")

    @property
    def rescale_true(self) -> Rescale:
        """What mergekit's ``rescale: true`` means here."""
        if self.drop == "none":
            return "none"
        return "l1" if self.drop in ("magnitude", "outliers") else "inverse"

    @property
    def defaults(self) -> Mapping[str, str | bool | float]:
        """Values of parameters that the configuration leaves out, where they are the method's."""
        return {"normalize": self.normalize, "rescale": self.rescale, "lambda": self.lambda_}

    @property
    def uses(self) -> frozenset[str]:
        """Names of the parameters that have an effect."""
        if self.own is not None:
            return self.own
        names = {self.weighted_by}
        if self.is_balanced:
            names |= {"lambda", "density", "epsilon", "rescale"}
            return frozenset(names | ({"ridge", "side"} if self.balance == "wudi" else set()))
        if self.num_models != 1:
            names.add("normalize")
        if self.has_base:
            names.add("lambda")
        if self.drop != "none":
            names |= {"density", "rescale"}
        if self.drop == "magprune":
            names |= {"epsilon", "granularity"}
        if self.drop == "outliers":
            names.add("gamma")
        return frozenset(names)


_KARCHER, _MODEL_STOCK, _BREADCRUMBS = "2603.04972", "2403.19522", "2312.06795"
_WUDI, _ISO, _TSV = "2503.08099", "2502.04959", "2412.00081"
_RAM = "2601.13572"
_LEAST = {"epsilon": Parameter(scalars.not_negative, of_experts=False, default=1e-5)}
_DELLA, _DARE, _TIES, _TASK_ARITHMETIC = "2406.11617", "2311.03099", "2306.01708", "2212.04089"

#: The methods by name.
METHODS: Mapping[str, Method] = {
    "della": Method("DELLA", (_DELLA,), "magprune", elect=True, rescale="inverse", normalize=True),
    "della_linear": Method(
        "DELLA without sign election",
        (_DELLA,),
        "magprune",
        rescale="inverse",
    ),
    "dare_ties": Method(
        "DARE with TIES sign election",
        (_DARE, _TIES),
        "random",
        elect=True,
        rescale="inverse",
    ),
    "dare_linear": Method("DARE", (_DARE,), "random", rescale="inverse"),
    "ties": Method("TIES", (_TIES,), "magnitude", elect=True, normalize=True),
    "breadcrumbs": Method(
        "Model Breadcrumbs",
        (_BREADCRUMBS,),
        "outliers",
    ),
    "breadcrumbs_ties": Method(
        "Model Breadcrumbs with TIES sign election",
        (_BREADCRUMBS, _TIES),
        "outliers",
        elect=True,
    ),
    "task_arithmetic": Method(
        "task arithmetic",
        (_TASK_ARITHMETIC,),
    ),
    "wudi": Method(
        "WUDI-Merging",
        (_WUDI,),
        "magprune",
        rescale="inverse",
        normalize=True,
        balance="wudi",
        lambda_=0.8,
    ),
    "iso_c": Method(
        "Iso-C",
        (_ISO,),
        "magprune",
        rescale="inverse",
        normalize=True,
        balance="iso_c",
    ),
    "tsv": Method(
        "TSV-Merge",
        (_TSV,),
        "magprune",
        rescale="inverse",
        normalize=True,
        balance="tsv",
    ),
    "linear": Method(
        "a weighted average",
        (),
        normalize=True,
        has_base=False,
    ),
    "slerp": Method(
        "spherical interpolation",
        (),
        has_base=False,
        num_models=2,
        angles="slerp",
        base_among="first",
        own=frozenset({"t"}),
    ),
    "nuslerp": Method(
        "spherical interpolation (NuSLERP)",
        (),
        num_models=2,
        angles="nuslerp",
        base_is_optional=True,
        own=frozenset({"weight", "nuslerp_flatten", "nuslerp_row_wise"}),
    ),
    "multislerp": Method(
        "multi-SLERP",
        (),
        angles="multislerp",
        base_is_optional=True,
        own=frozenset({"weight", "normalize_weights", "eps"}),
    ),
    "karcher": Method(
        "the Karcher mean",
        (_KARCHER,),
        has_base=False,
        angles="karcher",
        base_among="any",
        own=frozenset({"max_iter", "tol"}),
    ),
    "model_stock": Method(
        "Model Stock",
        (_MODEL_STOCK,),
        least_models=2,
        angles="model_stock",
        own=frozenset({"filter_wise"}),
    ),
    "nearswap": Method(
        "NearSwap",
        (),
        num_models=1,
        is_limited=True,
        own=frozenset({"t"}),
        meanings={"t": Parameter(scalars.farthest, of_experts=False)},
    ),
    "arcee_fusion": Method(
        "Arcee Fusion",
        (),
        "importance",
        num_models=1,
        own=frozenset(),
        note="quartiles are those of all elements, and divergences are computed in float64; "
        "mergekit draws a million elements of larger tensors at random, and computes in the dtype.",
    ),
    "sce": Method(
        "SCE",
        ("2408.07990",),
        "variance",
        elect=True,
        normalize=True,
        by_energy=True,
        own=frozenset({"select_topk"}),
        note="weights are those of the squares however small these are, as published; mergekit "
        "takes equal ones where their means add up to less than 1e-6.",
    ),
    "ram": Method(
        "Reinforced Agent Merging",
        (_RAM,),
        "threshold",
        has_overlap=True,
        own=frozenset({"epsilon"}),
        meanings=_LEAST,
    ),
    "ramplus_tl": Method(
        "Reinforced Agent Merging Plus, tensor by tensor",
        (_RAM,),
        "threshold",
        has_overlap=True,
        own=frozenset({"epsilon", "r", "alpha"}),
        meanings=_LEAST,
    ),
    "passthrough": Method(
        "passing tensors through",
        (),
        has_base=False,
        weighted_by="scale",
        num_models=1,
    ),
}
