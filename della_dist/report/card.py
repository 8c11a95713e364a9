"""The model card of the output: recipe, inputs, digest, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import yaml

from della_dist.config import config_from_mapping
from della_dist.config.methods import Method
from della_dist.locations import (
    absolute,
    hub_repository,
    is_url,
    model_and_adapters,
    of_parts,
    short_names,
)
from della_dist.planning.build import MergePlan
from della_dist.report.adapter_card import adapter_lines
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.manifest import MANIFEST_NAME, TensorRecord
from della_dist.version import __version__


def model_card(
    plan: MergePlan, digest: str, tensors: Iterable[TensorRecord] = (), *, num_parameters: int
) -> str:
    """Return the ``README.md`` of the output.

    Parameters
    ----------
    plan
        The merge that was run.
    digest
        The model digest.
    tensors
        Records of the tensors, which an adapter's card speaks of.
    num_parameters
        Elements of all tensors of the output.
    """
    config = plan.config
    inputs = _inputs(plan)
    named = dict(zip(inputs, short_names(inputs), strict=True))
    named = {location: location if is_url(location) else name for location, name in named.items()}
    named |= {
        location: of_parts(location, lambda part: named.get(part, part))
        for location in inputs
        if len(model_and_adapters(location)) > 1
    }
    # Hubs refuse a base_model that is not a repository id, so other folders stay out of it.
    ids = [found[0] for location in inputs if (found := repository(location)) is not None]
    named |= {stage["location"]: stage["name"] for stage in plan.stages}
    names = {c.location: named[absolute(c.location)] for c in plan.inputs}
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["merge", "della-dist", config.merge_method],
    }
    adapter = plan.adapter
    if adapter is not None:
        front |= {"library_name": "peft", "tags": ["lora", *front["tags"]]}
        base_id = repository(absolute(plan.reference.location))
        ids = [] if base_id is None else [base_id[0]]
    if ids:
        front["base_model"] = ids if adapter is None else ids[0]
    documents = [
        {"name": stage["name"], **config_from_mapping(stage["config"]).shown(named)}
        for stage in plan.stages
    ]
    recipe = "---\n".join(
        yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        for document in (*documents, config.shown(names))
    ).rstrip()
    base = names[plan.reference.location]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        "# Merged model" if adapter is None else "# Merged adapter",
        "",
        f"Merged by {_described(config.method)} with della_dist {__version__}.",
        "",
        *([] if adapter is None else [*adapter_lines(adapter, tensors, base), ""]),
        "| input | role |",
        "|---|---|",
        *(f"| `{names[c.location]}` | {_role(plan, c)} |" for c in plan.merged),
        "",
        f"{num_parameters:,} parameters in {plan.num_tensors:,} tensors, seed {config.seed}.",
        "",
        f"Model digest (SHA-256, independent of sharding): `{digest}`",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe,
        "```",
        "",
        f"The same recipe on the same inputs gives the same bytes{_where(plan)}. "
        f"`{MANIFEST_NAME}` lists the checksum of every file; `della-dist verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def _where(plan: MergePlan) -> str:
    is_svd = plan.adapter is not None and any(
        piece.side and not piece.is_sum for piece in plan.adapter.pieces.values()
    )
    is_svd = is_svd or any(one.get("arithmetic") for one in plan.stages) or bool(plan.arithmetic)
    return " on machines of one kind" if is_svd else ""


def _inputs(plan: MergePlan) -> list[str]:
    """Return where the inputs are, then those of its stages, which are none themselves."""
    inputs = [absolute(c.location) for c in plan.inputs if not c.is_stage]
    behind = (one["location"] for stage in plan.stages for one in stage["inputs"])
    others = {*inputs, *(stage["location"] for stage in plan.stages)}
    return [*inputs, *(location for location in dict.fromkeys(behind) if location not in others)]


def _role(plan: MergePlan, checkpoint: CheckpointIndex) -> str:
    stage = ", a stage of the recipe" if checkpoint.is_stage else ""
    if checkpoint is not plan.base:
        return f"expert{stage}"
    return f"base{stage}" if plan.config.has_base else f"form and files{stage}"


def repository(location: str) -> tuple[str, str | None] | None:
    """Return the repository of the Hub that a location is, or a folder of its cache belongs to.

    With its revision; None where the location is neither.
    """
    if is_url(location):
        return hub_repository(location)
    parts = PurePosixPath(location).parts
    for i, part in enumerate(parts):
        if part.startswith("models--"):
            is_snapshot = parts[i + 1 : i + 2] == ("snapshots",)
            revision = parts[i + 2] if is_snapshot and len(parts) > i + 2 else None
            return part.removeprefix("models--").replace("--", "/"), revision
    return None


def _described(method: Method) -> str:
    """Return what a method is called, with its papers."""
    links = (f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in method.papers)
    return f"{method.title} ({', '.join(links)})" if method.papers else method.title
