"""The model card of the output: recipe, inputs, digest, in the form that model hubs read."""

from __future__ import annotations

from pathlib import PurePosixPath

import yaml

from della_dist.config.methods import Method
from della_dist.locations import hub_repository, is_url, short_names
from della_dist.planning.build import MergePlan
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.version import __version__


def model_card(plan: MergePlan, digest: str, *, num_parameters: int) -> str:
    """Return the ``README.md`` of the output.

    Parameters
    ----------
    plan
        The merge that was run.
    digest
        The model digest.
    num_parameters
        Elements of all tensors of the output.
    """
    config = plan.config
    locations = [c.location for c in plan.inputs]
    named = zip(locations, short_names(locations), strict=True)
    names = [location if is_url(location) else name for location, name in named]
    # Hubs refuse a base_model that is not a repository id, so other folders stay out of it.
    ids = [i for c in plan.inputs if (i := _repository_id(c.location)) is not None]
    front: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["merge", "della-dist", config.merge_method],
    }
    if ids:
        front["base_model"] = ids
    shown = config.shown(dict(zip(locations, names, strict=True)))
    recipe = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        "# Merged model",
        "",
        f"Merged by {_described(config.method)} with della_dist {__version__}.",
        "",
        "| input | role |",
        "|---|---|",
        *(f"| `{name}` | {_role(plan, c)} |" for name, c in zip(names, plan.inputs, strict=True)),
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
        f"The same recipe on the same inputs gives the same bytes. `{MANIFEST_NAME}` lists the "
        "checksum of every file; `della-dist verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def _role(plan: MergePlan, checkpoint: CheckpointIndex) -> str:
    if checkpoint is not plan.base:
        return "expert"
    return "base" if plan.config.has_base else "form and files"


def _repository_id(location: str) -> str | None:
    """Return the repository of the Hub that a location is, or a folder of its cache belongs to."""
    if is_url(location):
        found = hub_repository(location)
        return None if found is None else found[0]
    for part in PurePosixPath(location).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return None


def _described(method: Method) -> str:
    """Return what a method is called, with its papers."""
    links = (f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in method.papers)
    return f"{method.title} ({', '.join(links)})" if method.papers else method.title
