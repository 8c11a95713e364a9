"""An output loads as the function that its inputs are: tied heads, heads of their own, no head.

The oracle is transformers: task arithmetic with one expert of weight 1 must give the expert's own
logits, whatever config.json says of its head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.checkpoints import (
    Tensor,
    load_tensors,
    make_experts,
    save_checkpoint,
    tensor,
    values_of,
)
from tests.merging import config_for, run

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

VOCAB, HIDDEN = 24, 16
HEAD = "lm_head.weight"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN2_VL: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "text_config": {
        **{k: v for k, v in LLAMA.items() if k != "architectures"},
        "model_type": "qwen2_vl_text",
        "rope_parameters": {
            "rope_type": "default",
            "type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    },
    "vision_config": {
        "depth": 1,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 4,
    },
}
T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": HIDDEN,
    "n_layer": 1,
    "n_head": 2,
}


def tied(config: Mapping[str, Any], outer: bool | None, text: bool | None = None) -> dict[str, Any]:
    """Return `config` with these values of `tie_word_embeddings`; None: not given."""
    made = dict(config)
    if outer is not None:
        made["tie_word_embeddings"] = outer
    if text is not None:
        made["text_config"] = {**config["text_config"], "tie_word_embeddings": text}
    return made


def parameters(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a made-up model, its head left out."""
    made = transformers.AutoConfig.for_model(**config)
    model = getattr(transformers, config["architectures"][0])(made)
    rng = np.random.default_rng(3)
    named = dict(model.named_parameters())
    return {
        n: tensor(rng.normal(0, 0.3, tuple(p.shape)), "F32") for n, p in named.items() if n != HEAD
    }


def logits(path: Path, config: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Return what transformers computes with a checkpoint."""
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(path, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"], info
    ids = torch.tensor([[1, 5, 9, 20, 3]])
    more = {"decoder_input_ids": ids} if config.get("is_encoder_decoder") else {}
    with torch.no_grad():
        out: npt.NDArray[np.float32] = model(input_ids=ids, **more).logits.numpy()
    return out


def embedding(tensors: Mapping[str, Tensor]) -> Tensor:
    ends = ("embed_tokens.weight", "wte.weight", "shared.weight")
    return next(t for name, t in tensors.items() if name.endswith(ends))


def other_head(seed: int) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(0, 0.3, (VOCAB, HIDDEN)), "F32")


#: How a checkpoint has its head: not stored, stored and equal to the embedding, or another one.
HOW = ("none", "equal", "own")

TIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (tied(LLAMA, outer=True), tied(LLAMA, outer=True)),
    "llama, base untied": (tied(LLAMA, outer=False), tied(LLAMA, outer=True)),
    "llama, expert untied": (tied(LLAMA, outer=True), tied(LLAMA, outer=False)),
    "llama, both untied": (tied(LLAMA, outer=False), tied(LLAMA, outer=False)),
    "qwen2-vl outer": (tied(QWEN2_VL, True, False), tied(QWEN2_VL, True, False)),
    "qwen2-vl text": (tied(QWEN2_VL, False, True), tied(QWEN2_VL, False, True)),
    "qwen2-vl text only": (tied(QWEN2_VL, None, True), tied(QWEN2_VL, None, True)),
    "qwen2-vl both": (tied(QWEN2_VL, True, True), tied(QWEN2_VL, True, True)),
    "qwen2-vl disagree": (tied(QWEN2_VL, False, True), tied(QWEN2_VL, True, False)),
    "gpt2 by default": (GPT2, GPT2),
    "t5 by default": (T5, T5),
    "t5": (tied(T5, outer=True), tied(T5, outer=True)),
}

# What tells the architectures apart; the others are tried with Llama.
TELLING = {("own", "own"), ("none", "own"), ("own", "none"), ("equal", "own"), ("none", "equal")}


def is_model(config: Mapping[str, Any], how: str) -> bool:
    """Tell whether it has a head: Llama has none if nothing is stored and nothing is tied."""
    return how != "none" or config["model_type"] != "llama" or config["tie_word_embeddings"]


CASES = [
    (name, base, expert)
    for name, configs in TIES.items()
    for base in HOW
    for expert in HOW
    if (name.startswith("llama") or (base, expert) in TELLING)
    and all(map(is_model, configs, (base, expert)))
]


@pytest.mark.parametrize(("name", "base_head", "expert_head"), CASES)
def test_the_output_is_the_expert(
    tmp_path: Path, name: str, base_head: str, expert_head: str
) -> None:
    base_config, expert_config = TIES[name]
    base = parameters(base_config)
    (expert,) = make_experts(base, 1)
    for tensors, how, seed in ((base, base_head, 5), (expert, expert_head, 6)):
        if how == "equal":
            tensors[HEAD] = embedding(tensors)
        elif how == "own":
            tensors[HEAD] = other_head(seed)
    paths = [
        save_checkpoint(tmp_path / "base", base, config=base_config),
        save_checkpoint(tmp_path / "expert", expert, config=expert_config),
    ]
    config = config_for(paths[0], paths[1:], "task_arithmetic")
    out = tmp_path / "out"
    run(config, out)
    made = logits(out, base_config)
    np.testing.assert_allclose(made, logits(paths[1], expert_config), rtol=2e-4, atol=2e-5)
    stored = load_tensors(out)
    has_own = "own" in (base_head, expert_head)
    if has_own:
        assert HEAD in stored
    if has_own and not base_config.get("is_encoder_decoder") and base_config is not GPT2:
        said = json.loads((out / "config.json").read_text())
        assert said["tie_word_embeddings"] is False
        assert not said.get("text_config", {}).get("tie_word_embeddings")
    if HEAD in stored and not has_own:  # said twice, so the same twice
        assert stored[HEAD] == embedding(stored)
    if HEAD in stored and (base_head, expert_head) == ("own", "none"):
        np.testing.assert_allclose(values_of(stored[HEAD]), values_of(embedding(expert)), atol=1e-6)
