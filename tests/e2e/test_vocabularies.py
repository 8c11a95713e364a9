"""Models of other vocabularies: every row goes to its token, as if it had been moved by hand."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from della_dist import plan, verify
from della_dist.config import config_from_mapping
from della_dist.errors import InputError, OutputError
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.tensor import load_backend
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.merge import digest_tensor
from della_dist.runtime.task.meter import Meter
from tests.merging import run
from tests.remote import upload
from tests.vocabularies import (
    EMBEDDING,
    add_tokens,
    align_by_hand,
    make_models,
    move_tokens,
    vocabulary,
)

NAMES = ("base", "same", "a", "b", "moved")


@pytest.fixture(scope="module", params=["F32", "BF16", "tied", "padded"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    special: dict[str, dict[str, Any]] = {"tied": {"tie": True}, "padded": {"vocab": 1600}}
    how = special.get(request.param, {"dtype": request.param})
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


def test_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """Every kind of source, forced and not, for tokens that are there and that are not."""
    base, b = models["base"], models["b"]
    number = vocabulary(base)["Ġthe"]
    tokens = {
        "<b1>": {"source": {"kind": "zero"}},
        "<both>": {"source": {"kind": "model_token", "model": str(base), "token": "Ġthe"}},
        "<new>": {"source": {"kind": "model_token", "model": str(b), "token_id": number}},
        "Ġand": {"source": str(models["moved"]), "force": True},
        "Ġto": {"source": {"kind": "zero"}, "force": True},
    }
    output = vocabulary(base)
    for token in ("<b1>", "<both>", "<new>"):
        output[token] = max(output.values()) + 1
    given = {
        "<b1>": None, "<both>": ("base", "Ġthe"), "<new>": ("b", "Ġthe"),
        "Ġand": ("moved", "Ġand"), "Ġto": None,
    }  # fmt: skip
    rows = -(-max(rows_of(base), len(output)) // 48) * 48
    by_hand = align_by_hand(
        models, output, rows, tmp_path / "aligned", given=given, forced={"Ġand", "Ġto"}
    )
    run(config_from_mapping(configuration(by_hand, "task_arithmetic")), tmp_path / "expected")
    block = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 48}
    content = configuration(models, "task_arithmetic", tokenizer=block)
    config = config_from_mapping(content)
    assert config_from_mapping(config.normalized()) == config
    run(config, tmp_path / "out")
    assert vocabulary(tmp_path / "out") == output
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    check_loads(tmp_path / "out", set(output))


def test_the_order_of_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """It counts for nothing: the manifest, of which a run is verified, does not keep it."""
    content = configuration(models, "task_arithmetic")
    digests = set()
    for i, names in enumerate((("<x>", "<a>", "<c>"), ("<c>", "<x>", "<a>"))):
        tokens = {t: {"source": {"kind": "zero"}} if t != "<a>" else {
            "source": str(models["a"])} for t in names}  # fmt: skip
        out = tmp_path / str(i)
        config = config_from_mapping({**content, "tokenizer": {"tokens": tokens}})
        digests.add(run(config, out).model_digest)
        assert EMBEDDING in verify(str(out), recompute=1000).recomputed
    assert len(digests) == 1


@pytest.mark.parametrize("source", ["a", "b", "moved"])
def test_the_tokenizer_of_a_model(models: dict[str, Path], tmp_path: Path, source: str) -> None:
    output, rows = vocabulary(models[source]), rows_of(models[source])
    by_hand = align_by_hand(models, output, rows, tmp_path / "aligned", donor=source)
    run(config_from_mapping(configuration(by_hand, "della")), tmp_path / "expected")
    content = configuration(models, "della", tokenizer_source=str(models[source]))
    run(config_from_mapping(content), tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models[source] / name).read_bytes()
    check_loads(tmp_path / "out", set(output))


def without_base(paths: dict[str, Path], names: Sequence[str], **keys: Any) -> dict[str, Any]:
    models = [
        {"model": str(paths[n]), "parameters": {"weight": 1 + i}} for i, n in enumerate(names)
    ]
    return {"merge_method": "linear", "models": models, **keys}


def test_without_a_base(models: dict[str, Path], tmp_path: Path) -> None:
    """Then a token that several have is their mean where another lacks it, whoever comes first."""
    names = ("moved", "b", "a")
    paths = {"base": models["moved"], "b": models["b"], "a": models["a"]}
    output = vocabulary(models["moved"])
    for token in ("<both>", "<b1>", "<b2>", "<a>"):
        output[token] = max(output.values()) + 1
    rows = max(rows_of(models["moved"]), len(output))
    by_hand = align_by_hand(paths, output, rows, tmp_path / "aligned", has_base=False)
    content = without_base(by_hand, ("base", "b", "a"))
    run(config_from_mapping(content), tmp_path / "expected")
    content = without_base(models, names, tokenizer_source="union")
    run(config_from_mapping(content), tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    check_loads(tmp_path / "out", set(output))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_same_bytes_and_what_is_read(
    models: dict[str, Path], tmp_path: Path, granularity: str
) -> None:
    """Over memory, threads and backends; what is read is what the plan says."""
    content = configuration(models, "della", tokenizer_source="union", granularity=granularity)
    config = config_from_mapping(content)
    found = set()
    for memory, threads in ((32 << 20, 1), (1 << 30, 2)):
        out = tmp_path / f"{memory}"
        done = run(config, out, memory_bytes=memory, threads=threads)
        found.add(tuple(shards(out).items()))
        assert done.bytes_read == plan(config).bytes_to_read
    assert len(found) == 1


def test_a_run_knows_its_rows(models: dict[str, Path], tmp_path: Path) -> None:
    """Other tokens at the same rows are another merge."""
    paths = {**models, "a": shutil.copytree(models["a"], tmp_path / "a")}
    config = config_from_mapping(configuration(paths, "della", tokenizer_source="base"))
    run(config, tmp_path / "out")
    assert run(config, tmp_path / "out").already_complete
    move_tokens(paths["a"], weights=False)
    with pytest.raises(OutputError, match="tokens of a tokenizer file"):
        run(config, tmp_path / "out")
    assert verify(str(tmp_path / "out")).num_tensors


def test_without_a_policy(models: dict[str, Path], tmp_path: Path) -> None:
    """The error says which there are, and what each would do here."""
    names = [n for n in NAMES if n != "moved"]
    content = configuration({n: models[n] for n in NAMES}, "della")
    content["models"] = content["models"][: len(names) - 1]
    tokens = len(vocabulary(models["base"]))
    if rows_of(models["base"]) == rows_of(models["b"]):
        assert any("tokens only it has" in note for note in plan(content).notes)
        return
    with pytest.raises(InputError) as caught:
        plan(content)
    said = str(caught.value)
    assert f"`tokenizer_source: base` the {tokens} tokens of the base (4 tokens that only" in said
    assert f"`tokenizer_source: union` all {tokens + 4}" in said


def test_every_wrong_row_is_said(models: dict[str, Path]) -> None:
    def of(**source: Any) -> dict[str, Any]:
        return {"source": {"kind": "model_token", "model": str(models["b"]), **source}}

    tokens = {
        "<x>": of(token="none"),
        "<y>": of(token_id=9999),
        "<z>": {"source": str(models["b"])},
    }
    content = configuration(models, "task_arithmetic", tokenizer={"tokens": tokens})
    with pytest.raises(InputError, match="3 problems") as caught:
        plan(content)
    assert all(f"`tokenizer.tokens.{token}`" in str(caught.value) for token in tokens)


def test_a_base_without_a_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    """Its rows are taken for the tokens of the first that has one, if they are as many."""
    bare = shutil.copytree(models["base"], tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    content = {
        "merge_method": "linear",
        "models": [{"model": str(bare)}, {"model": str(models["moved"])}],
    }
    said = " ".join(plan(content).notes)
    assert f"{bare} has no tokenizer, and the output none" in said
    content["tokenizer_source"] = str(models["moved"])
    run(config_from_mapping(content), tmp_path / "out")
    assert vocabulary(tmp_path / "out") == vocabulary(models["moved"])


@pytest.mark.parametrize("source", ["union", "moved"])
@pytest.mark.s3
def test_from_a_bucket(
    models: dict[str, Path], tmp_path: Path, source: str, s3_bucket: str
) -> None:
    """Rows come in other orders than they lie; what is read is still what the plan says."""
    whose = source if source == "union" else str(models[source])
    config = config_from_mapping(configuration(models, "ties", tokenizer_source=whose))
    run(config, tmp_path / "local")
    places = {str(p): upload(p, f"s3://{s3_bucket}/{n}") for n, p in models.items()}
    done = run(config.with_locations(places), tmp_path / "out", memory_bytes=64 << 20)
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    expected = plan(config)
    assert expected.bytes_to_read <= done.bytes_read <= expected.most_bytes_to_read


def test_slices(models: dict[str, Path], tmp_path: Path) -> None:
    """Embeddings of the first slice, heads of the last, both of the output's tokens."""
    slices = [
        {"sources": [{"model": str(models["a"]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models["b"]), "layer_range": [1, 2]}]},
    ]
    content = {"merge_method": "passthrough", "dtype": "float32", "slices": slices}
    run(config_from_mapping({**content, "tokenizer_source": "union"}), tmp_path / "out")
    output = vocabulary(models["a"])
    for token in ("<b1>", "<b2>"):
        output[token] = max(output.values()) + 1
    check_loads(tmp_path / "out", set(output))
    paths = {"base": models["a"], "b": models["b"]}
    rows = max(rows_of(models["a"]), len(output))
    by_hand = align_by_hand(paths, output, rows, tmp_path / "aligned", has_base=False)
    slices = [
        {"sources": [{"model": str(by_hand["base"]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(by_hand["b"]), "layer_range": [1, 2]}]},
    ]
    run(config_from_mapping({**content, "slices": slices}), tmp_path / "expected")
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")


def test_other_dtypes(models: dict[str, Path], tmp_path: Path) -> None:
    """A row of another dtype is not rounded on its way: its delta stays zero."""
    import torch
    from safetensors.torch import load_file, save_file

    expert = shutil.copytree(models["b"], tmp_path / "b")
    state = load_file(expert / "model.safetensors")
    halves = {name: value.to(torch.float16) for name, value in state.items()}
    save_file(halves, expert / "model.safetensors", metadata={"format": "pt"})
    add_tokens(base := shutil.copytree(models["base"], tmp_path / "base"), ["<base>"])
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"weight": 1.0}}],
        "tokenizer_source": "base",
    }
    run(config_from_mapping(content), tmp_path / "out")
    out, before = (load_file(p / "model.safetensors") for p in (tmp_path / "out", base))
    number = vocabulary(base)["<base>"]
    assert out[EMBEDDING].dtype == before[EMBEDDING].dtype
    assert torch.equal(out[EMBEDDING][number], before[EMBEDDING][number])


def test_torch_backend(models: dict[str, Path]) -> None:
    """Both backends are given the same columns."""
    config = config_from_mapping(configuration(models, "della", tokenizer_source="union"))
    opened = open_plan(config)
    tensors = {tensor.name: tensor for shard in opened.shards for tensor in shard.tensors}
    budget = MemoryBudget(64 << 20, workers=1, threads=2)
    digests = set()
    with ThreadPoolExecutor(2) as compute:
        for backend in (load_backend("numba"), TorchBackend("cpu")):
            context = MergeContext(
                opened, backend, budget, compute, Meter(), threading.Event(), InputStores(1)
            )
            digests.add(digest_tensor(context, tensors[EMBEDDING]))
    assert len(digests) == 1
