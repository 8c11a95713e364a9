"""Layers that PEFT, or the model, does not treat like others of their kind: facts, as data.

Of PEFT 0.21, which takes layers of some names for parts of experts wherever they stand, and refuses
others; and of transformers 5.24, where a model multiplies by a weight without asking its layer.
"""

from __future__ import annotations

#: Types of which PEFT takes every layer with one of the names for experts: dense and shared ones
#: would get no adapter.
EXPERT_TYPES = frozenset(
    {
        *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
        *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
        *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "minimax", "minimax_m2"),
        *("mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
        *("qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
    }
)
EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

#: Types of which PEFT refuses to adapt layers with one of the names.
STATE_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
STATE_NAMES = frozenset({"conv1d", "out_proj"})

#: Layers whose weight is multiplied without them (Mamba, Jamba), so that nothing is added.
BYPASSED_NAMES = frozenset({"dt_proj"})


def why_not_adapted(model_type: str, layer: str) -> str | None:
    """Return why a linear layer can have no adapter, by its name; None if nothing is known.

    Parameters
    ----------
    model_type
        In config.json.
    layer
        The last part of its name.
    """
    if model_type in EXPERT_TYPES and layer in EXPERT_NAMES:
        return f"PEFT takes every {layer} of a {model_type} for one of its experts"
    if model_type in STATE_TYPES and layer in STATE_NAMES:
        return f"PEFT refuses every {layer} of a {model_type}"
    if layer in BYPASSED_NAMES:
        return f"the model multiplies by the weight of {layer} without asking the layer"
    return None
