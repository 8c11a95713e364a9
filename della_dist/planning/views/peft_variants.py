"""Variants of LoRA whose tensors look like any others, refused by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from della_dist.errors import InputError

#: Set where the low rank is not all there is to it: the variant's name.
VARIANTS = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_bias": "a bias of its own",
}
#: Beginnings that take something off the base, which is then another one.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_variants(location: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not known here, by its configuration.

    Raises
    ------
    InputError
        Naming what it is.
    """
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise InputError(
            f"adapter {location} is {kind}, not LoRA, the one kind that is known here. Merge it "
            "into its model first (peft's merge_and_unload), if it can be."
        )
    for key, name in VARIANTS.items():
        if config.get(key):
            raise InputError(
                f"adapter {location} is LoRA with {name}, which is not known here. Merge it into "
                "its model first (peft's merge_and_unload), if it can be."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {location} began as {start}, which takes a part of the base away: it is no "
            "adapter of the base itself. Save it with peft's "
            "`path_initial_model_for_weight_conversion`, which makes it one."
        )
