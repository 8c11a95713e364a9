"""What is planned of a stage before it is made is what it then is: headers, small files, ties."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist.config import MergeConfig
from della_dist.demo import make_family
from della_dist.planning.build import MergePlan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.stages.chain import Chain
from della_dist.runtime.stages.planned import PlannedStore
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.opening import open_store
from tests.checkpoints import save_checkpoint, tensor
from tests.merging import run
from tests.staged import document, staged
from tests.vocabularies import make_models

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small family with tokenizers; one expert has a head of its own, one a tied one, stored."""
    folder = tmp_path_factory.mktemp("family")
    shape: dict[str, Any] = {"hidden": 32, "intermediate": 48, "heads": 2, "kv_heads": 2}
    make_family(folder, layers=3, vocab=512, num_experts=3, tie=True, **shape)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return tensor(rng.normal(0, 0.05, shape), "BF16")

    for name, own in (("untied", True), ("tied", False)):
        tensors = {EMBEDDING: random(20, 16), "model.norm.weight": random(16)}
        for i in range(3):
            tensors[f"model.layers.{i}.mlp.down_proj.weight"] = random(16, 24)
        tensors[HEAD] = random(20, 16) if own else tensors[EMBEDDING]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        path = save_checkpoint(folder / name, tensors, config=config)
        (path / "extra" / "deeper").mkdir(parents=True)
        (path / "extra" / "deeper" / "notes.txt").write_text("of the model")
        (path / "generation_config.json").write_text("{}")
    return folder


def chat(family: Path) -> MergeConfig:
    """Chat templates, dtypes, tokenizers of others."""
    base = family / "base"
    return staged(
        document(
            [family / "math", family / "code"],
            name="first",
            base_model=base,
            out_dtype="float32",
            chat_template="chatml",
        ),
        document(["first"], "linear", name="second", dtype="float16"),
        document(
            ["second", family / "chat"],
            base_model=base,
            tokenizer_source="second",
            chat_template="llama3",
        ),
    )


def heads(family: Path) -> MergeConfig:
    """A head that differs from the embedding, and one that does not, through several stages."""
    return staged(
        document([family / "untied"], "linear", name="own", base_model=family / "tied"),
        document([family / "tied"], "linear", name="same", dtype="float32"),
        document(["same"], "task_arithmetic", name="again", base_model=family / "tied"),
        document(["own", "again"], "ties", base_model="same"),
    )


def sliced(family: Path) -> MergeConfig:
    def source(model: object, first: int, last: int) -> dict[str, Any]:
        return {"sources": [{"model": str(model), "layer_range": [first, last]}]}

    def stack(*parts: dict[str, Any], **keys: Any) -> dict[str, Any]:
        return {"merge_method": "passthrough", "slices": list(parts), **keys}

    return staged(
        stack(source(family / "tied", 0, 2), source(family / "untied", 1, 3), name="ends"),
        stack(source(family / "tied", 0, 2), source(family / "tied", 1, 3), name="one"),
        stack(source("one", 0, 3), source("ends", 0, 4), name="both"),
        document(["both"], "linear"),
    )


def vocabularies(family: Path) -> MergeConfig:
    """Unions of vocabularies that differ, tied and padded; later ones with what the first added."""
    paths = {name: family / "words" / "family" / name for name in ("base", "code", "chat")}
    base, code, chat = paths.values()  # the experts have tokens of their own
    if not base.exists():
        make_models(family / "words", tie=True)
    first = {"source": "union", "pad_to_multiple_of": 32}
    tokens = {"<new>": {"source": {"kind": "model_token", "model": "first", "token": "<both>"}}}
    return staged(
        document([code, chat], name="first", base_model=base, tokenizer=first),
        document(
            ["first", code],
            name="second",
            base_model=base,
            tokenizer={"source": "union", "tokens": tokens},
        ),
        document(["second", "first"], "ties", base_model=base, tokenizer={"source": "second"}),
    )


CONFIGS = {"vocabularies": vocabularies, "chat": chat, "heads": heads, "sliced": sliced}


def facts(plan: MergePlan) -> dict[str, Any]:
    """Return everything that a plan decides and knows, but for the content of stages."""
    inputs = [
        replace(
            checkpoint,
            shards=tuple(replace(shard, version="", sample="") for shard in checkpoint.shards),
        )
        for checkpoint in plan.inputs
    ]
    return {
        "inputs": inputs,
        "order": [list(checkpoint.tensors) for checkpoint in inputs],
        "shards": plan.shards,
        "actions": plan.matching.actions,
        "ties": (plan.ties.left_out, plan.ties.untied, plan.ties.filled),
        "twins": dict(plan.twins),
        "companions": dict(plan.companions),
        "companion_bytes": dict(plan.companion_bytes),
        "notes": plan.notes(),
        "stage": plan.stage,
        "rows": None if plan.alignment is None else plan.alignment.digest(),
        "stages": [(stage["name"], stage["location"]) for stage in plan.stages],
    }


@pytest.mark.parametrize("what", CONFIGS)
def test_what_is_planned_is_what_is_made(family: Path, tmp_path: Path, what: str) -> None:
    config, out = CONFIGS[what](family), str(tmp_path / "out")
    options = RunOptions(device="cpu", shard_bytes=8_000, keep_stages=True)
    before = Chain(config, out, options)
    assert all(before.is_planned(link) for link in before.links if link.needs)
    run(config, out, shard_bytes=8_000, keep_stages=True)
    after = Chain(config, out, options)
    for planned, made in zip(before.links, after.links, strict=True):
        assert not after.is_planned(made)
        assert made.is_complete
        assert facts(planned.plan) == facts(made.plan)
    # The last one, too, which nothing reads.
    for link in before.links:
        store = PlannedStore(link.plan, str(link.location), _store_of(before))
        there = open_store(str(link.location))
        for folder in ("", "extra", "extra/deeper"):
            assert store.children(folder) == there.children(folder)
        assert store.list() == there.list()
        for key in link.plan.companions:
            data = there.read(key)
            assert store.exists(key)
            assert store.stat(key).size_bytes == len(data)
            assert store.read(key) == data
            assert store.read(key, 1, 2) == data[1:2]
        assert not store.exists("nothing.json")


def _store_of(chain: Chain) -> Any:
    stores: dict[str, Any] = {}
    for link in chain.links:
        stores[str(link.location)] = PlannedStore(
            link.plan, str(link.location), lambda at: stores.get(at) or open_store(at)
        )
    return lambda at: stores.get(at) or open_store(at)


def test_heads_of_stages(family: Path, tmp_path: Path) -> None:
    """The case above is one: a stored head that is the embedding, and one that is not."""
    run(heads(family), tmp_path / "out", keep_stages=True)
    tied = {
        name: HEAD not in open_checkpoint(str(tmp_path / "out.stages" / name)).tensors
        for name in ("own", "same", "again")
    }
    assert tied == {"own": False, "same": True, "again": True}
    config = json.loads((tmp_path / "out.stages" / "own" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_what_comes_out_equal_by_its_values(family: Path, tmp_path: Path) -> None:
    """A head that nobody can tell to be the embedding before it is made: every delta is dropped."""
    nothing = {"density": 0}
    config = staged(
        document(
            [family / "untied"],
            "dare_linear",
            name="first",
            base_model=family / "tied",
            parameters=nothing,
        ),
        document(["first"], "linear", dtype="float32"),
    )
    out = tmp_path / "out"
    first = run(config, out)
    assert first.num_tasks == 1
    assert run(config, out).already_complete
    assert HEAD in open_checkpoint(str(out)).tensors
