"""Parameters that stay in F32 in an output of 16 bits, because the model needs them so.

Taken from `_keep_in_fp32_modules_strict` (kept whatever the 16-bit dtype) and
`_keep_in_fp32_modules` (kept in F16 only) of the models of transformers 5.24: those names that mean
the same in every architecture. Names such as ``norm``, ``base`` or ``scale``, which one model keeps
and hundreds do not, are not among them.
"""

from __future__ import annotations

import re

_ALWAYS = re.compile(
    r"(^|\.)("
    r"e_score_correction_bias"  # router: DeepSeek V3, GLM 4, Kimi, MiniMax and 25 more
    r"|expert_bias"  # router: AFMoE
    r"|gate\.(weight|bias|e_score_correction_bias|global_scale)"  # router: DeepSeek, GLM, Ernie
    r"|sinks|attn_sink"  # attention sinks: gpt-oss's kin, DeepSeek V4
    r"|A_log|dt_bias"  # decay of linear attention and state spaces: Kimi Linear, Bailing
    r"|hc_\w+(\.\w+)?|(attn|ffn)_hc\.\w+"  # hyper-connections: DeepSeek V4, GLM 5
    r"|latent_(mean|std)"  # normalisation of audio latents
    r"|post_(attention|feedforward)_residual_gate(\.\w+)?"
    r")$"
)
_F16_ONLY = re.compile(
    r"(^|\.)("
    r"DenseReluDense\.wo\.weight"  # overflows in F16: T5 and its kin
    r"|indexer\.weights_proj\.weight"  # sparse attention: DeepSeek V3.2
    r"|query_tokens"  # BLIP-2
    r"|time_(decay|first)"  # RWKV
    r")$"
)


def keeps_fp32(name: str, output_dtype: str) -> bool:
    """Tell whether an F32 tensor of this name stays F32 in an output of `output_dtype`."""
    if output_dtype not in ("F16", "BF16"):
        return False
    if _ALWAYS.search(name):
        return True
    return output_dtype == "F16" and _F16_ONLY.search(name) is not None
