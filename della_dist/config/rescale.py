"""``rescale``, which may stand at the top level, and means what the method makes of it."""

from __future__ import annotations

from della_dist.config.methods import METHODS
from della_dist.config.problem import Problem
from della_dist.config.schema import Block, Document
from della_dist.config.settings import Setting


def written_rescale(document: Document) -> Setting[str] | None:
    """Return what is written for all experts, None where nothing is.

    Raises
    ------
    Problem
        If it is written twice.
    """
    shared = document.parameters.get("rescale")
    if document.rescale is None:
        return shared
    if shared is not None:
        raise Problem("rescale", "is also given as `parameters.rescale`; keep one of them")
    return Setting.constant(document.rescale)


def with_rescale(block: Block, name: str, where: str) -> Block:
    """Return parameters with what ``rescale: true`` and ``false`` mean for a method.

    Raises
    ------
    Problem
        At `where`, if the method `name` has nothing to divide by.
    """
    written = block.get("rescale")
    return block if written is None else {**block, "rescale": resolved(written, name, where)}


def resolved(written: Setting[str], name: str, where: str) -> Setting[str]:
    """Return a setting with what ``true`` and ``false`` mean for the method `name`.

    Raises
    ------
    Problem
        At `where`, if the method has nothing to divide by.
    """
    method = METHODS[name]

    def resolve(value: str) -> str:
        if value == "inverse" and method.rescale_true != "inverse":
            raise Problem(
                where,
                f"is inverse, but {name} has no keep probability to divide by; use "
                + ("l1 or none" if method.drop != "none" else "none"),
            )
        if value == "false":
            return "none"
        return method.rescale_true if value == "true" else value

    return written.map(resolve)
