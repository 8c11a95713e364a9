"""The tables of names and layouts against what the installed transformers really writes."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from della_dist.errors import InputError
from della_dist.planning.views.layouts import seen_as_reference
from della_dist.planning.views.prefixes import find_renamings
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.storage.checkpoint import open_checkpoint
from tests.layouts import drawn, save

#: Whatever a configuration calls its sizes.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_layers": 1,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
}  # fmt: skip

#: Models with experts that transformers 5 has in memory in another layout than in files.
WITH_EXPERTS = (
    *("afmoe", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v32", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "granitemoe", "hunyuan_v1_moe", "hy_v3", "jamba"),
    *("kimi_linear", "laguna", "longcat_flash", "mellum", "mimo_v2_flash", "minimax"),
    *("minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("qwen3_next", "sarvam_mla", "sarvam_moe", "solar_open"),
)


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_experts_of_transformers(tmp_path: Path, model_type: str) -> None:
    """Every byte of each layout is found in the other."""
    kind = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(kind.__init__).parameters, *kind.__dataclass_fields__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kind(**{key: size for key, size in SIZES.items() if key in known})
        model = drawn(AutoModelForCausalLM.from_config(config))
    save(model, tmp_path / "files")
    save(model, tmp_path / "memory", as_in_memory=True)
    files, memory = (open_checkpoint(str(tmp_path / name)) for name in ("files", "memory"))
    assert files.tensors.keys() != memory.tensors.keys()
    for reference, checkpoint in ((files, memory), (memory, files)):
        layout = seen_as_reference(reference, checkpoint)
        assert layout is not None
        expected = load_file(Path(reference.location) / "model.safetensors")
        data = (Path(checkpoint.location) / "model.safetensors").read_bytes()
        assert layout.checkpoint.tensors.keys() == expected.keys()
        for name, entry in layout.checkpoint.tensors.items():
            pieces = [data[piece.start : piece.stop] for piece in entry.pieces or (entry,)]
            assert b"".join(pieces) == expected[name].contiguous().numpy().tobytes()
            assert entry.shape == tuple(expected[name].shape)


def checkpoint(location: str, **shapes: tuple[int, ...]) -> CheckpointIndex:
    tensors, start = {}, 8
    for name, shape in shapes.items():
        stop = start + 2 * shape[0] * shape[1]
        tensors[name] = TensorEntry(name, "BF16", shape, 0, start, stop)
        start = stop
    return CheckpointIndex(location, (), tensors, ())


def test_a_text_with_two_places() -> None:
    """Text and images have layers of one kind: shapes tell them apart, or nothing does."""
    names = [f"layers.{i}.mlp.weight" for i in range(3)]
    ours = {f"{p}.{n}": n for p in ("text_model", "language_model") for n in names}
    found = find_renamings(names, ours, lambda _, our: our.startswith("text"), "x")
    assert [(one.theirs, one.ours, len(one.names)) for one in found] == [("", "text_model.", 3)]
    with pytest.raises(InputError, match=r"two ways, .* as well as .*`rename`"):
        find_renamings(names, ours, lambda *_: True, "x")


def test_two_names_of_one_tensor() -> None:
    base = checkpoint("base", **{"a.mlp.router.weight": (2, 2), "b.x": (2, 2), "c.x": (2, 2)})
    names = ("a.mlp.gate.weight", "a.block_sparse_moe.gate.weight", "b.x", "c.x")
    with pytest.raises(InputError, match="two names of one tensor"):
        seen_as_reference(base, checkpoint("expert", **dict.fromkeys(names, (2, 2))))


def test_names_that_only_one_has_are_left_alone() -> None:
    base = checkpoint("base", **{"a.x": (2, 2), "b.x": (2, 2)})
    assert seen_as_reference(base, checkpoint("expert", **{"a.x": (2, 2), "c.x": (2, 2)})) is None
    assert seen_as_reference(base, checkpoint("expert", **{"a.x": (2, 2)})) is None


def test_the_readme_counts_them() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"as {len(WITH_EXPERTS)} model types of transformers have them" in readme
