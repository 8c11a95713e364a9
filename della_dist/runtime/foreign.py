"""Files beside an output that a loader would take for its weights."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from della_dist.storage.store import Store

#: What transformers, vLLM and their like look for in a directory: any of these that is not the
#: output's own is loaded in its place, or on top of it.
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
    "consolidated*.pth",
)


def foreign_weights(store: Store, own: Collection[str]) -> list[str]:
    """Return the names of weight files in an output that are not among its `own`, sorted."""
    return [
        name
        for name in store.top_level()
        if name not in own and any(fnmatchcase(name, pattern) for pattern in PATTERNS)
    ]
