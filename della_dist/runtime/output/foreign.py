"""Files beside an output that a loader would take for its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    # They say that the weights are quantised, and how.
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
)
#: Loaded with the weights, where the base has none of that name.
_BESIDE = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.tiktoken", "*.spm", "spiece.model"),
    *("sentencepiece*.model", "added_tokens.json", "special_tokens_map.json", "chat_template*"),
    *("generation_config.json", "*processor_config.json", "modules.json"),
)


def foreign_weights(store: Store, own: Collection[str]) -> list[str]:
    """Return the names of weight files in an output that are not among its `own`, sorted."""
    return _matching(store, own, PATTERNS)


def foreign_companions(store: Store, own: Collection[str]) -> list[str]:
    """Return the names of other files that would be loaded with an output, sorted."""
    return _matching(store, own, _BESIDE)


def _matching(store: Store, own: Collection[str], patterns: Sequence[str]) -> list[str]:
    return [
        name
        for name in store.children("")[0]
        if name not in own and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
