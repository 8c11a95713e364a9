"""A chat template that the configuration gives, in every place where a loader looks for one."""

from __future__ import annotations

import json
from typing import Any

#: Where transformers writes it, and looks first.
CHAT_TEMPLATE_NAME = "chat_template.jinja"

#: Where older versions look, and those of models with a processor.
TEMPLATE_DOCUMENTS = ("tokenizer_config.json", "chat_template.json")


def with_chat_template(data: bytes, template: str) -> bytes:
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
