"""``output``: in which form the merge is written, where that is no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from della_dist.config.problem import Problem, check_keys, gathering, shown

if TYPE_CHECKING:
    from della_dist.config.model import MergeConfig

#: More than any matrix of a model has rows or columns.
MAX_RANK = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class OutputForm:
    """The merged delta as an adapter of the base (``output: {adapter: RANK}``)."""

    adapter: int
    """Rank that the adapter has at most in each of its modules."""

    def normalized(self) -> dict[str, Any]:
        """Return the block as it would be written in YAML."""
        return {"adapter": self.adapter}


def parse_output(raw: object) -> OutputForm | None:
    """Return the form that an ``output`` block means; None where it says nothing.

    Raises
    ------
    Problem
        At the place inside the block.
    ValueError
        If it is no block.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(  # noqa: TRY004
            f"must be a mapping (adapter: RANK), not {shown(raw)}; where the output lies is said "
            "on the command line"
        )
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("adapter",))
        with problems.at(".adapter"):
            return OutputForm(_rank(raw))
    raise AssertionError


def _rank(raw: Mapping[str, object]) -> int:
    if "adapter" not in raw:
        raise ValueError("is missing: the rank of the adapter")
    rank = raw["adapter"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"is {shown(rank)}; it must be a whole number, the rank of the adapter: from 1 to "
            f"{MAX_RANK}, and no matrix gets more than it has"
        )
    return rank


def check_output(config: MergeConfig) -> None:
    """Refuse an adapter that the merge cannot be written as.

    Raises
    ------
    Problem
        If there are no deltas to a base, whose tensors, layers and rows the output has.
    """
    if config.output is None:
        return
    if not config.has_base:
        raise Problem(
            "output.adapter",
            f"needs deltas to a base, which {config.merge_method} has not. An average of models "
            "is `merge_method: task_arithmetic` with `base_model` and `normalize: true`",
        )
    if config.method.is_balanced:
        raise Problem(
            "output.adapter",
            f"does not go with {config.merge_method} yet, which merges matrices as a whole. Leave "
            "`output` out, or take a method that merges element by element",
        )
    if config.method.drop == "importance":
        raise Problem(
            "output.adapter",
            f"does not go with {config.merge_method}, which compares the rows of whole models. "
            "Leave `output` out, or take a method that merges deltas",
        )
    for key, given in (
        ("modules" if config.modules and config.modules[0].name else "slices", config.modules),
        ("tokenizer", config.tokenizer),
        ("chat_template", config.chat_template),
    ):
        if given:
            raise Problem(
                "output.adapter",
                f"does not go with `{key}`: an adapter leaves the layers, the tokens and the files "
                "of the base as they are. Leave one of them out",
            )
    if config.base_model in config.renames:
        raise Problem(
            "output.adapter",
            "does not go with `rename` of the base: loaders look for the names in its files. Leave "
            "one of them out",
        )
