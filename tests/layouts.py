"""Small models of transformers, saved with the names of two of its generations."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from della_dist.config import MergeConfig, config_from_mapping

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {**FEW, "n_routed_experts": 4, "first_k_dense_replace": 1}
VISION = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}

#: Class of the model, and its configuration.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", LOCAL),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**FEW, "num_experts": 4, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **ROUTED, **LATENT, "num_key_value_heads": 4, "v_head_dim": 8, "qk_nope_head_dim": 8,
            "n_group": 2, "topk_group": 1,
        },
    ),
    "granitemoe": ("GraniteMoeForCausalLM", LOCAL),
}  # fmt: skip

TEXT = {key: SHAPE[key] for key in list(SHAPE)[:6]}
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


def make_multimodal(name: str, seed: int = 0) -> Any:
    """Return a model of text and images."""
    if name == "qwen2_vl":
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        config: Any = transformers.Qwen2VLConfig(
            text_config={**TEXT, "model_type": "qwen2_vl_text", "rope_scaling": rope},
            vision_config={**VISION, "embed_dim": 32},
        )
        return drawn(transformers.Qwen2VLForConditionalGeneration(config), seed)
    if name == "gemma3":
        config = transformers.Gemma3Config(
            text_config={**TEXT, "head_dim": 8}, vision_config=dict(CLIP)
        )
        return drawn(transformers.Gemma3ForConditionalGeneration(config), seed)
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**CLIP, "model_type": "clip_vision_model"},
    )
    return drawn(transformers.LlavaForConditionalGeneration(config), seed)


#: Of them, those that transformers 5 has in memory in another layout than in files.
TWO_LAYOUTS = [name for name in MODELS if name not in ("llama", "phi3", "qwen2")]


def make(name: str, seed: int = 0, **config: Any) -> Any:
    """Return a model, whose numbers are drawn."""
    kind, more = MODELS[name]
    cls = getattr(transformers, kind)
    return drawn(cls(cls.config_class(**{**SHAPE, **more, **config})), seed)


def drawn(model: Any, seed: int = 0) -> Any:
    """Draw all numbers of a model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def save(model: Any, folder: Path, *, as_in_memory: bool = False) -> Path:
    """Write a model as its files are, or with the names and the layout that it has in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_original_format=not as_in_memory)
    return folder


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Write a checkpoint with tensors changed, in one file, beside the same configuration."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def renamed(source: Path, folder: Path, *pairs: tuple[str, str]) -> Path:
    """Write a checkpoint whose names begin otherwise: the first that fits."""

    def name(old: str) -> str:
        for begin, other in pairs:
            if old.startswith(begin):
                return other + old[len(begin) :]
        return old

    return rewrite(source, folder, lambda tensors: {name(n): t for n, t in tensors.items()})


def joined(parts: tuple[str, ...], whole: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Return what puts matrices of each layer that lie side by side into one."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            stem, leaf, ending = f".{name}".rsplit(".", 2)
            stem = stem[1:]
            if leaf == parts[0]:
                rows = [tensors[f"{stem}.{part}.{ending}"] for part in parts]
                out[f"{stem}.{whole}.{ending}"] = torch.cat(rows)
            elif leaf not in parts:
                out[name] = tensor
        return out

    return change


def cut(whole: str, parts: Mapping[str, int]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Return the contrary: parts by name, and the rows of each."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            stem, _, leaf = name.removesuffix(".weight").rpartition(".")
            if leaf == whole:
                rows = tensor.split(list(parts.values()))
                for part, mine in zip(parts, rows, strict=True):
                    out[f"{stem}.{part}.weight"] = mine.contiguous()
            else:
                out[name] = tensor
        return out

    return change


def both(*changes: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[..., Any]:
    """Return one change after another."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for one in changes:
            tensors = one(tensors)
        return tensors

    return change


FUSED = both(
    joined(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    joined(("gate_proj", "up_proj"), "gate_up_proj"),
)
SINGLE = both(
    cut("qkv_proj", {"q_proj": 32, "k_proj": 16, "v_proj": 16}),
    cut("gate_up_proj", {"gate_proj": 48, "up_proj": 48}),
)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
}


def merging(
    base: Path, experts: list[Path], method: str = "task_arithmetic", **keys: Any
) -> MergeConfig:
    parameters = {"weight": 0.5, **METHODS.get(method, {})}
    models = [{"model": str(one), "parameters": parameters} for one in experts]
    content: dict[str, Any] = {"merge_method": method, "models": models, **keys}
    if method == "linear":
        models.insert(0, {"model": str(base), "parameters": {"weight": 1.0}})
    else:
        content["base_model"] = str(base)
    return config_from_mapping(content, "merge.yaml")


def weights(out: Path) -> str:
    """Return a digest of the weights of an output."""
    return hashlib.sha256(weights_of(out).read_bytes()).hexdigest()


def weights_of(out: Path) -> Path:
    """Return the one file of weights of an output."""
    (file,) = out.glob("*.safetensors")
    return file


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adding(model: Path, *adapters: Path) -> MergeConfig:
    """Return a merge that adds the deltas of adapters to their model."""
    models = [{"model": str(one), "parameters": {"weight": 1.0}} for one in adapters]
    return config_from_mapping(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(model),
            "models": models,
            "parameters": {"normalize": False},
        }
    )


#: A model of a class that has attention in one matrix, or in several, and the other layout.
OTHER_LAYOUT = {"llama": FUSED, "phi3": SINGLE, "qwen2": FUSED}


MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def named(path: Path, *rules: tuple[str, str]) -> dict[str, Any]:
    """Return an entry of a configuration with its names changed."""
    return {"model": str(path), "rename": [{"from": a, "to": b} for a, b in rules]}


def save_models(folder: Path) -> Path:
    """Write every model as in files and as in memory, a base and an expert of each."""
    for name in MODELS:
        for seed, which in enumerate(("base", "expert")):
            model = make(name, seed)
            save(model, folder / name / which)
            if name in TWO_LAYOUTS:
                save(model, folder / name / f"{which}_memory", as_in_memory=True)
    return folder
