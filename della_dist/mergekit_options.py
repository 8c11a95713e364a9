"""What people write to mergekit's command line, and what it is here."""

from __future__ import annotations

from collections.abc import Mapping

_NOTHING = "nothing need be written"
_OUT_OF_CORE = f"{_NOTHING}: every run is out of core, within --memory"
_CARRIED = f"{_NOTHING}: the files beside the weights are carried, the tokenizer among them"
_MATCHED = f"{_NOTHING}: tensors are matched by name, and what does not fit is refused"
_EXECUTED = f"{_NOTHING}: no code of a model is executed"
_ALWAYS = f"{_NOTHING}: so it is always"
_CACHE = "set HF_HUB_CACHE to the folder"

#: Its options, and what to write instead: the end of a sentence.
MERGEKIT_OPTIONS: Mapping[str, str] = {
    "--cuda": "write --device cuda",
    "--gpu-rich": "write --device cuda",
    "--multi-gpu": "write --engine ray, with an actor for each GPU",
    "--read-to-gpu": _OUT_OF_CORE,
    "--low-cpu-memory": _OUT_OF_CORE,
    "--lazy-unpickle": _OUT_OF_CORE,
    "--lazy-loader": _OUT_OF_CORE,
    "--out-shard-size": "write --shard-size",
    "--num-threads": "write --threads",
    "--write-threads": "write --workers",
    "--async-write": _ALWAYS,
    "--random-seed": "write --seed",
    "--copy-tokenizer": _CARRIED,
    "--no-copy-tokenizer": "remove the files from OUT afterwards",
    "--allow-crimes": _MATCHED,
    "--trust-remote-code": _EXECUTED,
    "--safe-serialization": _ALWAYS,
    "--write-model-card": _ALWAYS,
    "--clone-tensors": _ALWAYS,
    "--transformers-cache": _CACHE,
    "--lora-merge-cache": "leave it out: adapters are merged as they are, without a copy",
    "--lora-merge-dtype": "leave it out: adapters are merged as they are, without a copy",
    "--intermediate-dir": "stages lie in OUT.stages, and stay there with --keep-stages",
}
