"""Alignment in other architectures of transformers: heads with biases, shared embeddings, nests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import config_from_mapping
from tests.merging import run

VOCAB = 120
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL))


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**SMALL))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    config = T5Config(**sizes, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=False)
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    config = BartConfig(vocab_size=VOCAB, d_model=16, max_position_embeddings=64, **sides)
    return BartForConditionalGeneration(config)


def llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(**SMALL, num_key_value_heads=1)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=7)
    )


MODELS = (llama, bert, roberta, gpt2, gpt_neox, t5, bart, llava)


def save(path: Path, model: Any, added: list[str]) -> Path:
    """Write a model, and a tokenizer for it with tokens behind its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.add_tokens(added, special_tokens=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def numbered(model: Any, step: float) -> None:
    """Give every parameter values of its own, whatever a new model begins with."""
    import torch

    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.copy_(torch.sin(numbers * step + i) * 0.1)
        for name, buffer in model.named_buffers():
            if "final_logits_bias" in name:
                buffer.copy_(torch.sin(torch.arange(buffer.numel()) * step).reshape(buffer.shape))


@pytest.mark.parametrize("build", MODELS)
def test_union(tmp_path: Path, build: Callable[[], Any]) -> None:
    """With weight 1, what comes out is the expert: rows of its tokens, and their logits."""
    import torch
    from transformers import AutoTokenizer

    base, expert = build(), build()
    expert.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    numbered(base, 0.7)
    numbered(expert, 0.3)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(save(tmp_path / "base", base, [])),
        "models": [{
            "model": str(save(tmp_path / "expert", expert, ["<a>", "<b>", "<c>"])),
            "parameters": {"weight": 1.0},
        }],
        "tokenizer_source": "union",
    }  # fmt: skip
    run(config_from_mapping(content), tmp_path / "out")
    merged, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert merged.get_input_embeddings().weight.shape[0] == VOCAB + 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("w5 <a> w9 <c> <b>", return_tensors="pt")["input_ids"]
    assert ids.max() == VOCAB + 2
    inputs = {"input_ids": ids}
    if merged.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        ours, theirs = (m.eval()(**inputs).logits for m in (merged, expert))
    assert torch.allclose(ours, theirs, atol=1e-5)
    inputs = {key: value.clamp(max=VOCAB - 1) for key, value in inputs.items()}
    with torch.no_grad():
        others = base.eval()(**inputs).logits
    assert not torch.allclose(ours[..., :VOCAB], others, atol=1e-3)
