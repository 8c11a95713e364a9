"""Make a model family: a base and its fine-tuned experts, in Llama's layout.

The weights are random and mean nothing, but their statistics are those of real fine-tunes where
that matters for merging: the base is normal, deltas are heavy-tailed and so small that bf16
rounding makes many of them exactly zero and leaves few distinct magnitudes a row.

Everything is a function of the arguments: the values of a block of a tensor depend on the seed,
the place of the tensor and the block alone, not on threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della_dist.demo.tokenizer import BOS_ID, EOS_ID, MAX_POSITIONS, PAD_ID, tokenizer_files
from della_dist.demo.weights import BASE_STD, write_weights
from della_dist.errors import OutputError

EXPERT_NAMES = ("math", "code", "chat", "law", "medicine", "poetry", "french", "chess")

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class FamilyPaths:
    """Where a family is."""

    base: Path
    experts: tuple[Path, ...]
    config_path: Path
    """A DELLA configuration that merges the experts into the base."""


def make_family(
    directory: Path,
    *,
    hidden: int = 512,
    intermediate: int = 1408,
    layers: int = 10,
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 8192,
    num_experts: int = 3,
    shard_size_bytes: int = 32 << 20,
    seed: int = 0,
    dtype: str = "BF16",
    tie: bool = False,
) -> FamilyPaths:
    """Make a base and `num_experts` experts under `directory`, and ``demo.yaml`` to merge them.

    Memory does not depend on the size of the models. The defaults are 38 million parameters.

    Parameters
    ----------
    directory
        Created if need be. The configuration names the checkpoints by it: where it is relative,
        the configuration works from the current directory only.
    hidden, intermediate, layers, heads, kv_heads, vocab
        The shape of the models; `vocab` at least `della_dist.demo.tokenizer.MIN_VOCAB`.
    num_experts
        At most 8: see `EXPERT_NAMES`.
    shard_size_bytes
        Data bytes of a shard at most.
    seed
        Of all values.
    dtype
        Safetensors name: ``BF16``, ``F16`` or ``F32``.
    tie
        Whether the output head is the embedding (and not stored).

    Raises
    ------
    OutputError
        If a checkpoint of the family is there already.
    ValueError
        If the shape is impossible.
    """
    _check_shape(hidden, heads, kv_heads, num_experts, dtype)
    names = ("base", *EXPERT_NAMES[:num_experts])
    config = _model_config(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        dtype=_DTYPES[dtype],
        tie=tie,
    )
    files = {
        "config.json": _json(config),
        "generation_config.json": _json(
            {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        ),
        **tokenizer_files(vocab),
    }
    folders = [directory / name for name in names]
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                f"{folder} is there already: remove {directory}, or name another directory."
            )
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        kv_width=kv_heads * (hidden // heads),
        vocab=vocab,
        tie=tie,
    )
    write_weights(folders, shapes, dtype=dtype, shard_size_bytes=shard_size_bytes, seed=seed)
    for folder in folders:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    config_path = directory / "demo.yaml"
    config_path.write_text(_merge_config(folders, dtype), encoding="utf-8")
    return FamilyPaths(folders[0], tuple(folders[1:]), config_path)


def _check_shape(hidden: int, heads: int, kv_heads: int, num_experts: int, dtype: str) -> None:
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise ValueError(
            f"{heads} heads must divide hidden size {hidden} into even parts, and {kv_heads} "
            "key-value heads must divide them"
        )
    if not 1 <= num_experts <= len(EXPERT_NAMES):
        raise ValueError(f"num_experts must be from 1 to {len(EXPERT_NAMES)}, not {num_experts}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")


def _shapes(
    *, hidden: int, intermediate: int, layers: int, kv_width: int, vocab: int, tie: bool
) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape, as LlamaForCausalLM has them."""
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not tie:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _model_config(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    dtype: str,
    tie: bool,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": BASE_STD,
        "intermediate_size": intermediate,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab,
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _merge_config(folders: Sequence[Path], dtype: str) -> str:
    base, *experts = (json.dumps(str(folder), ensure_ascii=False) for folder in folders)
    models = "".join(
        f"  - model: {expert}\n    parameters:\n      weight: 1.0\n" for expert in experts
    )
    return (
        "# DELLA on the demo's models; paths are relative to the current directory.\n"
        f"merge_method: della\nbase_model: {base}\nmodels:\n{models}"
        "parameters:\n"
        "  density: 0.4 # the fraction of each delta that is kept\n"
        "  epsilon: 0.1 # keep probabilities from 0.3 to 0.5, by rank\n"
        "  lambda: 1.0\n"
        f"rescale: inverse\ndtype: {_DTYPES[dtype]}\nseed: 0\n"
    )
