"""The demo's family: loads like a real one, and merges like a real one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.config import load_config
from della_dist.demo import EXPERT_NAMES, FamilyPaths, make_family
from della_dist.demo.tokenizer import MIN_VOCAB
from della_dist.errors import OutputError
from della_dist.planning.facts import model_facts
from della_dist.storage.checkpoint import open_checkpoint

SMALL: dict[str, Any] = {
    "hidden": 64,
    "intermediate": 176,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 512,
    "shard_size_bytes": 100_000,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FamilyPaths:
    return make_family(tmp_path_factory.mktemp("demo") / "family", **SMALL)


def read(checkpoint: Path, name: str) -> npt.NDArray[np.float32]:
    index = open_checkpoint(str(checkpoint))
    entry = index.tensors[name]
    data = (checkpoint / index.shards[entry.shard].name).read_bytes()[entry.start : entry.stop]
    assert entry.dtype == "BF16"
    bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    return bits.view(np.float32).reshape(entry.shape)


def digest(folder: Path) -> str:
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "demo.yaml":
            hashed.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()


def test_layout(family: FamilyPaths) -> None:
    assert [e.name for e in family.experts] == ["math", "code", "chat"]
    base = open_checkpoint(str(family.base))
    assert len(base.shards) > 1
    assert len(base.tensors) == 2 * 9 + 3
    assert base.tensors["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    for expert in family.experts:
        index = open_checkpoint(str(expert))
        assert index.files == base.files
        assert {n: (t.dtype, t.shape) for n, t in index.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in base.tensors.items()
        }


def test_loads_with_transformers(family: FamilyPaths) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for checkpoint in (family.base, *family.experts):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, output_loading_info=True, dtype=torch.bfloat16
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        prompt = tokenizer("the answer is", return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert tokens.shape[1] > prompt["input_ids"].shape[1]


def test_tokenizer_round_trips(family: FamilyPaths) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    assert MIN_VOCAB < len(tokenizer) <= SMALL["vocab"]
    for text in ("the sum of two numbers", "def f(x):\n\treturn x\n", "naïve ☃ 😀 \x00", " a  b "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert max(ids) < SMALL["vocab"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(" the of and to in")["input_ids"]) == 5
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two and two?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_statistics_are_those_of_fine_tunes(tmp_path: Path) -> None:
    family = make_family(
        tmp_path, hidden=1024, intermediate=4096, layers=1, heads=8, kv_heads=8, vocab=512
    )
    zeros, distinct, tails = [], [], []
    for expert in family.experts:
        for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"):
            name = f"model.layers.0.{part}.weight"
            base = read(family.base, name)
            delta_RC = read(expert, name) - base
            assert base.std() == pytest.approx(0.02, rel=0.01)
            assert 1.4e-4 < delta_RC.std() < 6.5e-4
            zeros.append((delta_RC == 0).mean())
            distinct += [len(np.unique(np.abs(row))) for row in delta_RC[:8]]
            tails.append(np.mean((delta_RC / delta_RC.std()) ** 4))
    # bf16 leaves 8 to 29 % of the deltas exactly zero, and a row of 1,024 has 50 to 160 magnitudes.
    assert min(zeros) > 0.07
    assert max(zeros) < 0.31
    assert min(distinct) > 45
    assert max(distinct) < 170
    assert min(tails) > 6  # 3 for a normal distribution
    norm = read(family.base, "model.norm.weight")
    assert norm.mean() == pytest.approx(1, abs=0.01)
    assert 0.1 < np.mean(read(family.experts[0], "model.norm.weight") != norm) < 0.9


def test_is_deterministic(tmp_path: Path) -> None:
    make_family(tmp_path / "a", **SMALL)
    make_family(tmp_path / "b", **SMALL)
    make_family(tmp_path / "c", **SMALL, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_values_do_not_depend_on_sharding(family: FamilyPaths, tmp_path: Path) -> None:
    single = make_family(tmp_path, **{**SMALL, "shard_size_bytes": 1 << 30})
    assert (single.base / "model.safetensors").is_file()
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert np.array_equal(read(single.experts[1], name), read(family.experts[1], name))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_dtypes_and_tied(tmp_path: Path, dtype: str) -> None:
    family = make_family(tmp_path, **SMALL, dtype=dtype, tie=True, num_experts=2)
    base = open_checkpoint(str(family.base))
    assert "lm_head.weight" not in base.tensors
    assert model_facts(base).tie is True
    assert {t.dtype for t in base.tensors.values()} == {dtype}
    assert load_config(family.config_path).output_dtype == dtype


def test_config_works_from_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = make_family(Path("my demo: ✓"), **SMALL)
    config = load_config(family.config_path)
    assert config.merge_method == "della"
    assert config.base_model == "my demo: ✓/base"
    for model in config.models:
        open_checkpoint(model.model)


def test_never_overwrites(family: FamilyPaths) -> None:
    before = digest(family.base.parent)
    with pytest.raises(OutputError, match="is there already"):
        make_family(family.base.parent, **SMALL)
    assert digest(family.base.parent) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 5},
        {"kv_heads": 3},
        {"vocab": 100},
        {"num_experts": 0},
        {"num_experts": len(EXPERT_NAMES) + 1},
        {"dtype": "F64"},
    ],
)
def test_impossible_shapes(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_family(tmp_path / "family", **{**SMALL, **wrong})
    assert not (tmp_path / "family").exists()


def test_needs_numpy_only() -> None:
    code = (
        "import sys, della_dist.demo as d, pathlib, tempfile\n"
        "with tempfile.TemporaryDirectory() as t:\n"
        "    d.make_family(pathlib.Path(t) / 'f', hidden=64, intermediate=64, layers=1, heads=2,\n"
        "                  kv_heads=2, vocab=512)\n"
        "print([m for m in ('torch', 'tokenizers', 'transformers', 'safetensors', 'numba')\n"
        "       if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
