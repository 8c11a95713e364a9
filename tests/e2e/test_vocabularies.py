"""Models of other vocabularies: every row goes to its token, as if it had been moved by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from della_dist import plan
from della_dist.config import config_from_mapping
from tests.merging import run
from tests.vocabularies import EMBEDDING, HEAD, align_by_hand, make_models, vocabulary

NAMES = ("base", "same", "a", "b", "moved")


@pytest.fixture(scope="module", params=["F32", "BF16", "tied", "padded"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    how: dict[str, Any] = {"tied": {"tie": True}, "padded": {"vocab": 1600}}.get(
        request.param, {"dtype": request.param}
    )
    return make_models(tmp_path_factory.mktemp("models"), **how)


def rows_of(path: Path) -> int:
    rows: int = json.loads((path / "config.json").read_text())["vocab_size"]
    return rows


def configuration(paths: dict[str, Path], method: str, **keys: Any) -> dict[str, Any]:
    parameters = {"density": 0.5} if method != "task_arithmetic" else {}
    return {
        "merge_method": method,
        "base_model": str(paths["base"]),
        "models": [
            {"model": str(paths[name]), "parameters": {"weight": 0.3 + 0.1 * i, **parameters}}
            for i, name in enumerate(NAMES[1:])
        ],
        **keys,
    }


def shards(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}


def check_loads(path: Path, tokens: set[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) <= model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert set(tokenizer.get_vocab()) == tokens == set(vocabulary(path))
    assert tokenizer.get_vocab() == vocabulary(path)
    text = "the model said " + "".join(t for t in ("<a>", "<both>", "<b2>") if t in tokens)
    numbers = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(numbers["input_ids"][0]) == text
    assert torch.isfinite(model(**numbers).logits).all()


@pytest.mark.parametrize("method", ["della", "ties", "task_arithmetic", "dare_linear"])
def test_base(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    by_hand = align_by_hand(
        models, vocabulary(models["base"]), rows_of(models["base"]), tmp_path / "aligned"
    )
    run(config_from_mapping(configuration(by_hand, method)), tmp_path / "expected")
    content = configuration(models, method, tokenizer_source="base")
    run(config_from_mapping(content), tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        models["base"] / "tokenizer.json"
    ).read_bytes()
    check_loads(tmp_path / "out", set(vocabulary(models["base"])))


@pytest.mark.parametrize("method", ["della", "ties"])
def test_union(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    output = vocabulary(models["base"])
    count = max(output.values()) + 1
    for name in NAMES:
        for token in sorted(vocabulary(models[name]), key=vocabulary(models[name]).__getitem__):
            output.setdefault(token, max(output.values()) + 1)
    assert list(output)[count:] == ["<a>", "<both>", "<b1>", "<b2>"]
    rows = max(rows_of(models["base"]), len(output))
    by_hand = align_by_hand(models, output, rows, tmp_path / "aligned")
    run(config_from_mapping(configuration(by_hand, method)), tmp_path / "expected")
    content = configuration(models, method, tokenizer_source="union")
    run(config_from_mapping(content), tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    assert vocabulary(tmp_path / "out") == output
    check_loads(tmp_path / "out", set(output))
