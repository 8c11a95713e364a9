"""Adapters of PEFT for tests, made by PEFT, and what PEFT itself makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = ["q_proj", "v_proj"]


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a small Llama."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **HEADS, **config}))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_adapter(
    model: Path, folder: Path, *, seed: int = 1, std: float = 0.1, **config: Any
) -> Path:
    """Train an adapter of a model, as it were: every number of it is drawn."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(loaded, LoraConfig(**{"r": 4, "target_modules": ATTENTION, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter += noise if "lora_" not in name or "magnitude" in name else 0
                if "lora_" in name and "magnitude" not in name:
                    parameter.copy_(noise)
    adapted.save_pretrained(str(folder))
    return folder


def by_peft(model: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model after PEFT has merged adapters into it, in float32."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for adapter in adapters:
        loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    state: dict[str, torch.Tensor] = loaded.state_dict()
    return state


def largest_difference(out: Path, expected: dict[str, torch.Tensor]) -> float:
    """Return how far the tensors of an output are from others of the same names."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() <= expected.keys()
    return max(float((found[n].float() - expected[n]).abs().max()) for n in found)


Save = Callable[..., Path]
