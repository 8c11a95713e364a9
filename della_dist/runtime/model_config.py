"""What the merge changes in the model's ``config.json``, so that the output loads as it is."""

from __future__ import annotations

import json
from typing import Any

from della_dist.plan.build import MergePlan

_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def output_config(plan: MergePlan, data: bytes) -> bytes:
    """Return the ``config.json`` of the output, made from that of the reference checkpoint.

    It states the output's dtype where the merge sets one; what needs no change keeps its bytes.
    """
    if plan.config.output_dtype is None:
        return data
    dtype = _TORCH_NAMES[plan.config.output_dtype]
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
