"""Adapters of PEFT for tests, made by PEFT, and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.config import config_from_mapping
from tests.merging import run

if TYPE_CHECKING:  # they take seconds to import, and every worker collects every test
    import torch

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = ["q_proj", "v_proj"]


def save_model(folder: Path, model: Any) -> Path:
    """Write a model of transformers, whose numbers are drawn here."""
    _draw(dict(model.named_parameters()), seed=0, std=0.05)
    model.save_pretrained(folder)
    return folder


def save_llama(folder: Path, dtype: str = "float32", **config: Any) -> Path:
    """Write a small Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **HEADS, **config}))
    return save_model(folder, model.to(getattr(torch, dtype)))


def save_adapter(
    model: Path,
    folder: Path,
    *,
    seed: int = 1,
    std: float = 0.1,
    auto: str = "AutoModelForCausalLM",
    save_embedding_layers: bool | str = "auto",
    **config: Any,
) -> Path:
    """Train an adapter of a model, as it were: every number of it is drawn."""
    import transformers
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = getattr(transformers, auto).from_pretrained(model, dtype="float32")
        settings = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **config})
        adapted: Any = get_peft_model(loaded, settings)
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        _draw(trained, seed, std)
        adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def _draw(parameters: Mapping[str, torch.Tensor], seed: int, std: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator) * std
            # Lengths of rows and norms are not near zero.
            offset = 1.0 if "magnitude" in name or "norm" in name or "ln_" in name else 0.0
            parameter.copy_(noise + offset)


def by_peft(model: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model after PEFT has merged adapters into it, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        for adapter in adapters:
            loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    state: dict[str, torch.Tensor] = loaded.state_dict()
    return state


def largest_difference(out: Path, expected: dict[str, torch.Tensor]) -> float:
    """Return how far the tensors of an output are from others of the same names."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() <= expected.keys()
    return max(float((found[n].float() - expected[n]).abs().max()) for n in found)


def save_adapters_and_models(folder: Path) -> tuple[Path, list[Path], list[Path]]:
    """Write a base, adapters of it, and the models in F32 that they were merged into."""
    base = save_llama(folder / "base")
    given, full = [], []
    for seed in range(3):
        given.append(save_adapter(base, folder / f"a{seed}", seed=seed))
        whole = {
            "merge_method": "passthrough",
            "models": [{"model": f"{base}+{given[-1]}"}],
            "dtype": "float32",
        }
        full.append(folder / f"full{seed}")
        run(config_from_mapping(whole), full[-1])
    return base, given, full
