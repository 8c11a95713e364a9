"""The files beside the weights that are not as the checkpoint has them: made when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from della_dist.errors import InputError
from della_dist.planning.build import MergePlan
from della_dist.runtime.companions.model_config import output_config
from della_dist.runtime.companions.small_files import parse_json, read_json
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.store import Store

#: Where transformers writes it, and looks first.
CHAT_TEMPLATE_NAME = "chat_template.jinja"

#: Where older versions look, and those of models with a processor.
TEMPLATE_DOCUMENTS = ("tokenizer_config.json", "chat_template.json")


def made_files(
    plan: MergePlan, checkpoint: CheckpointIndex, store: Store, names: Iterable[str]
) -> dict[str, Callable[[], bytes]]:
    """Return the files that are not as the checkpoint has them, and what makes each."""
    there, template = set(names), plan.config.chat_template
    made: dict[str, Callable[[], bytes]] = {}
    if "config.json" in there:
        made["config.json"] = lambda: output_config(plan, _object(store, "config.json"))
    if template is not None and checkpoint is plan.tokenizer:
        made[CHAT_TEMPLATE_NAME] = template.encode
        for name in there & set(TEMPLATE_DOCUMENTS):
            made[name] = partial(_with_template, store, name, template)
    return made


def _with_template(store: Store, name: str, template: str) -> bytes:
    return _with_chat_template(_object(store, name), template)


def _object(store: Store, name: str) -> bytes:
    """Return the bytes of a JSON object."""
    data = read_json(store, name)
    if not isinstance(parse_json(data, store.describe(name)), dict):
        raise InputError(
            f"{store.describe(name)} is not a configuration: no JSON object. Download it again."
        )
    return data


def _with_chat_template(data: bytes, template: str) -> bytes:
    """Return a JSON document that states a chat template with `template` in its place.

    Templates of other names (``rag``, ``tool_use``) stay. What states none keeps its bytes.
    """
    document: dict[str, Any] = json.loads(data)
    stated = document.get("chat_template")
    if stated is None:
        return data
    if isinstance(stated, list):
        named = {"name": "default", "template": template}
        others = [e for e in stated if not (isinstance(e, dict) and e.get("name") == "default")]
        document["chat_template"] = [named, *others]
    else:
        document["chat_template"] = template
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
