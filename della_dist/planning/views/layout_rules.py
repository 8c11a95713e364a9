"""How the same model is named and laid out in files of different programs: facts, as data.

Prefixes and layouts are those of the classes of transformers 4 and 5, and of its
`conversion_mapping`. Layouts are given only where rows stay whole: whoever needs transposed or
interleaved matrices is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: What names may begin with that mean the same; one line for every part of a model.
PREFIXES: tuple[tuple[str, ...], ...] = (
    # The model that has the embedding and the layers, within what is around it.
    (
        *("", "model.", "language_model.", "language_model.model.", "model.language_model."),
        *("model.language_model.model.", "language_model.model.model."),
        *("transformer.", "backbone.", "text_model.", "model.text_model.", "llm.", "model.llm."),
        *("module.", "_orig_mod.", "base_model.", "base_model.model."),
    ),
    # The same where it is called by its kind: one kind is not another.
    *(
        ("", "model.", f"{kind}.")
        for kind in (
            *("bert", "roberta", "xlm_roberta", "distilbert", "electra", "deberta", "albert"),
            *("camembert", "mpnet", "esm", "gpt_neox", "biogpt", "rwkv", "xglm"),
        )
    ),
    (
        *("visual.", "model.visual.", "vision_tower.", "model.vision_tower."),
        *("vision_model.", "model.vision_model.", "vit.", "model.vit."),
        *("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("audio_tower.", "model.audio_tower."),
    ("lm_head.", "language_model.lm_head.", "model.lm_head.", "embed_out."),
)

#: Parts of names that mean the same: as one may be called, and as it is called here. In order.
ALIASES: tuple[tuple[str, str], ...] = (
    # GraniteMoE
    (".block_sparse_moe.input_linear.weight", ".mlp.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".mlp.experts.down_proj"),
    (".block_sparse_moe.router.layer.weight", ".mlp.gate.weight"),
    # Mixtral, MiniMax, Phi-MoE
    (".block_sparse_moe.", ".mlp."),
    (".mlp.router.weight", ".mlp.gate.weight"),
    (".mlp.router.gate.weight", ".mlp.gate.weight"),
    # MiniMax M2, EXAONE, Ernie 4.5, HunYuan 3, Laguna: the bias that balances experts
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.expert_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    (".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.shared_mlp.", ".mlp.shared_experts."),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
    (".mlp.post_mlp_layernorm.", ".post_mlp_layernorm."),
    # Bailing, Sarvam, Kimi Linear, MiMo: attention
    (".word_embeddings.", ".embed_tokens."),
    (".attention.", ".self_attn."),
    (".self_attn.dense.", ".self_attn.o_proj."),
    (".self_attn.query_layernorm.", ".self_attn.q_norm."),
    (".self_attn.key_layernorm.", ".self_attn.k_norm."),
    (".self_attn.forget_gate.", ".self_attn."),
    (".self_attn.attention_sink_bias", ".self_attn.sinks"),
    (".self_attn.softmax_offset", ".self_attn.sinks"),
    # BERT, as TensorFlow called it
    (".LayerNorm.gamma", ".LayerNorm.weight"),
    (".LayerNorm.beta", ".LayerNorm.bias"),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices of equal columns, stored one by one or as the rows of fewer."""

    name: str
    names: Mapping[str, int | None]
    """What tensors of it are called, ``*`` being the number of an expert: which part it is of those
    that follow one another, None: all of them."""
    num_parts: int
    is_equal: bool
    """Whether all parts have as many rows."""

    @property
    def has_experts(self) -> bool:
        """Whether the parts of one expert follow those of another; a whole is 3-D."""
        return self.name.startswith("experts.")


def _joined(whole: str, parts: tuple[str, ...], others: tuple[str, ...], ending: str) -> Group:
    names: dict[str, int | None] = {f"{name}.{ending}": None for name in (whole, *others)}
    names |= {f"{part}.{ending}": i for i, part in enumerate(parts)}
    return Group(f"{whole}.{ending}", MappingProxyType(names), len(parts), is_equal=len(parts) == 2)


#: Experts as transformers 5 has them in memory (E, rows, columns), and as the Hub's files have
#: them; the parts of attention and of a gated layer, in one matrix or each in its own.
GROUPS: tuple[Group, ...] = (
    Group(
        "experts.gate_up_proj",
        {
            "experts.gate_up_proj": None,
            "experts.gate_proj": 0,
            "experts.up_proj": 1,  # NemotronH has no gate
            "experts.*.gate_proj.weight": 0,
            "experts.*.up_proj.weight": 1,
            "experts.*.w1.weight": 0,
            "experts.*.w3.weight": 1,
        },
        num_parts=2,
        is_equal=True,
    ),
    Group(
        "experts.down_proj",
        {
            "experts.down_proj": None,
            "experts.*.down_proj.weight": None,
            "experts.*.w2.weight": None,
        },
        num_parts=1,
        is_equal=True,
    ),
    *(
        group
        for ending in ("weight", "bias")
        for group in (
            _joined(
                "qkv_proj",
                ("q_proj", "k_proj", "v_proj"),
                ("Wqkv", "qkv", "wqkv", "query_key_value"),
                ending,
            ),
            _joined("gate_up_proj", ("gate_proj", "up_proj"), (), ending),
            _joined("conv1d", ("q_conv1d", "k_conv1d", "v_conv1d"), (), ending),
        )
    ),
)

#: What a tensor of a group may be called -> the group, and which part it is.
BY_NAME: Mapping[str, tuple[Group, int | None]] = {
    name: (group, part) for group in GROUPS for name, part in group.names.items()
}

#: Most parts of a name in `BY_NAME`.
MAX_PARTS = 4

#: Models (`model_type`) whose experts have input before output, and gate and up perhaps in turns.
TRANSPOSED_EXPERTS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
#: And those where PEFT takes no notice of it.
OTHER_EXPERTS = (
    *TRANSPOSED_EXPERTS,
    "llama4",
    "llama4_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)

#: Models in whose `qkv_proj` queries, keys and values do not follow one another.
OTHER_QKV = ("codegen", "minimax")

#: Names that mean other rows in other models.
AMBIGUOUS_QKV = ("query_key_value", "wqkv")

#: Of these, the models in which rows are those of one head after another: a query, a key and a
#: value of each (of Falcon also of one group after another, or in order, by its config.json).
QKV_BY_HEAD = ("gpt_neox", "bloom", "persimmon", "falcon")
#: And those in which queries, keys and values follow one another.
QKV_IN_ORDER = ("sarvam_moe",)
