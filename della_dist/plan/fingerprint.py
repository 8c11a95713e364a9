"""What a run is: the identity under which committed work may be continued."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from della_dist.plan.build import MergePlan

#: Raised whenever the same inputs and configuration would give other output bytes than before.
OUTPUT_VERSION = 2


def identity(plan: MergePlan) -> dict[str, Any]:
    """Return everything the output bytes depend on, as a JSON-able mapping."""
    return {
        "output_version": OUTPUT_VERSION,
        "config": plan.config.normalized(),
        "shard_bytes": plan.shard_bytes,
        "stage": plan.stage,  # by the manifests of the inputs, whose headers do not show it
        "tied_left_out": list(plan.matching.tied_left_out),  # by config.json, not by a header
        "companions": dict(plan.companions),
        "inputs": [
            {
                "role": "base" if checkpoint is plan.base else "expert",
                "location": checkpoint.location,
                "shards": [
                    {
                        "name": shard.name,
                        "size_bytes": shard.size_bytes,
                        "version": shard.version,
                        "header_sha256": shard.header_sha256,
                    }
                    for shard in checkpoint.shards
                ],
            }
            for checkpoint in plan.inputs
        ],
    }


def fingerprint(identity: dict[str, Any]) -> str:
    """Return the SHA-256 of an identity, in hexadecimal."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def explain_difference(old: Any, new: Any, where: str = "") -> list[str]:  # noqa: ANN401
    """Return one line for everything in which two identities differ."""
    if type(old) is type(new) and isinstance(old, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            inner = f"{where}.{key}" if where else str(key)
            lines += explain_difference(old.get(key), new.get(key), inner)
        return lines
    if type(old) is type(new) and isinstance(old, list) and len(old) == len(new):
        lines = []
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            lines += explain_difference(a, b, f"{where}[{i}]")
        return lines
    if type(old) is type(new) and old == new:  # 1 is not True, here
        return []
    return [f"{where} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:  # noqa: ANN401
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
