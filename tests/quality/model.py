"""A small Llama: made, trained, written and read as transformers does it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.quality.data import ALPHABET, Batch

#: Of one process. Tiny products gain nothing from more, and with one no sum depends on threads.
NUM_THREADS = 1


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model."""

    hidden: int
    intermediate: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how hard."""

    num_steps: int
    learning_rate: float
    batch_items: int = 64


def new_model(size: Size, seed: int) -> Any:
    """Return a LlamaForCausalLM in float32 whose matrices are drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                drawn = rng.normal(0, parameter.shape[1] ** -0.5, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    return model


def train(model: Any, data: Iterator[Batch], how: Training) -> None:
    """Train all weights by AdamW; the rate rises for a tenth of the steps, then falls (cosine)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    for step in range(how.num_steps):
        rise = min(1.0, (step + 1) / (0.1 * how.num_steps))
        fall = 0.5 * (1 + math.cos(math.pi * step / how.num_steps))
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * rise * fall
        batch = next(data)
        found = model(input_ids=torch.from_numpy(batch.ids), labels=torch.from_numpy(batch.labels))
        optimizer.zero_grad()
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def save(model: Any, folder: Path) -> None:
    """Write a model in bfloat16 and safetensors; it stays what it was."""
    dtype = model.dtype
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype).load_state_dict(kept)


def load(folder: Path) -> Any:
    """Read a model to compute with it in float32.

    Raises
    ------
    ValueError
        If transformers misses tensors there, or finds some that it does not know.
    """
    model, said = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    if any(said.values()):
        raise ValueError(f"{folder} is not what transformers expects: {said}")
    return model.float().eval()


def relative_delta(expert: Any, base: Any) -> float:
    """Return the norm of the delta of all weights, in parts of the base's norm."""
    of_delta = of_base = 0.0
    for theirs, ours in zip(expert.parameters(), base.parameters(), strict=True):
        of_delta += float((theirs.detach() - ours.detach()).double().square().sum())
        of_base += float(ours.detach().double().square().sum())
    return math.sqrt(of_delta / of_base)
