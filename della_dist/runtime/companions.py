"""The files beside the weights: configuration, tokenizer, chat template, carried over."""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.errors import InputError
from della_dist.plan.build import MergePlan
from della_dist.runtime.model_config import output_config
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
        if name == "config.json":
            data = output_config(plan, data)
        files.append(CompanionFile(name, data))
    return files
