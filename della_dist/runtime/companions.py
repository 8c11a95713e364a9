"""The files beside the weights: configuration, tokenizer, chat template, carried over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from della_dist.errors import InputError
from della_dist.plan.build import MergePlan
from della_dist.storage.opening import open_store

#: What is carried over: these names, and every file with one of these endings.
_NAMES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_ENDINGS = (".py", ".tiktoken", ".spm")

#: Larger companion files are surely something else.
MAX_BYTES = 256 << 20

_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class CompanionFile:
    """A small file of the output."""

    name: str
    data: bytes


def is_companion(name: str) -> bool:
    """Tell whether a file of this name is carried over."""
    return "/" not in name and (name in _NAMES or name.endswith(_ENDINGS))


def companion_files(plan: MergePlan) -> list[CompanionFile]:
    """Return the base's configuration, tokenizer and model code, ready to be written.

    ``config.json`` states the output's dtype where the merge sets one.
    """
    reference = plan.reference
    store = open_store(reference.location)
    files = []
    for name in reference.files:
        if not is_companion(name):
            continue
        size = store.stat(name).size_bytes
        if size > MAX_BYTES:
            raise InputError(
                f"{reference.location}/{name} has {size} bytes, more than a configuration or "
                f"tokenizer file can have ({MAX_BYTES}). Remove it from the checkpoint."
            )
        data = store.read(name)
        if name == "config.json" and plan.config.output_dtype is not None:
            data = _with_dtype(data, _TORCH_NAMES[plan.config.output_dtype])
        files.append(CompanionFile(name, data))
    return files


def _with_dtype(data: bytes, dtype: str) -> bytes:
    config = json.loads(data)
    _set_dtype(config, dtype)
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = dtype
    return (json.dumps(config, indent=2) + "\n").encode()


def _set_dtype(node: dict[str, Any], dtype: str) -> None:
    """Set the dtype wherever the configuration, or one nested in it, states one."""
    for key, value in node.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            node[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, dtype)
