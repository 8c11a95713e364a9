"""Merges of checkpoints that torch.save wrote: the bytes of the same merge of safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from della_dist import plan
from della_dist.config import MergeConfig
from della_dist.errors import InputChangedError, InputError
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.verify import verify
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.hub import snapshot as hub_snapshot
from della_dist.storage.opening import open_output_store
from tests.checkpoints import Tensor, load_tensors, make_experts, mixed_base, save_checkpoint
from tests.hub import Family, publish
from tests.interrupting import interrupt
from tests.merging import config_for, run, save_family
from tests.remote import upload_inputs
from tests.servers.hub import Hub
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from tests.torch_files import convert, cut_out, save_torch, transposed
from tests.vocabularies import make_models

MIB = 1 << 20
SHARD_BYTES = 100_000
PARAMETERS: dict[str, Any] = {"parameters": {"density": 0.4}, "seed": 7}


def reshaped(tensor: Any) -> Any:
    return torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor


STORED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda tensor: tensor,
    "parameters": reshaped,
    "transposed": transposed,
    "cut out": cut_out,
}
METHODS = ["della", "ties", "dare_linear", "task_arithmetic", "linear"]


def save_old_family(
    folder: Path, stored: Callable[[Any], Any] = STORED["plain"], **how: Any
) -> tuple[Path, list[Path]]:
    """Write what `save_family` writes, as torch.save has it."""
    base = mixed_base()
    base_path = save_torch(folder / "base", base, stored=stored, **how)
    experts = [
        save_torch(folder / f"expert{m}", expert, stored=stored, num_shards=m + 1)
        for m, expert in enumerate(make_experts(base, 3))
    ]
    return base_path, experts


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what comes of the same tensors in safetensors files, by method."""
    folder = tmp_path_factory.mktemp("safetensors")
    family = save_family(folder)
    return {
        method: run(config_for(*family, method, **PARAMETERS), folder / method).model_digest
        for method in METHODS
    }


@pytest.fixture(scope="module", params=STORED)
def old_family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    return save_old_family(tmp_path_factory.mktemp("old"), STORED[request.param])


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes(
    old_family: tuple[Path, list[Path]], digests: dict[str, str], tmp_path: Path, method: str
) -> None:
    config = config_for(*old_family, method, **PARAMETERS)
    planned = plan(config)
    for name, options in (
        ("a", {"memory_bytes": 32 * MIB, "threads": 1}),
        ("b", {"memory_bytes": 1024 * MIB, "shard_bytes": SHARD_BYTES, "workers": 2}),
    ):
        summary = run(config, tmp_path / name, **options)
        assert summary.model_digest == digests[method]
        assert planned.bytes_to_read <= summary.bytes_read <= planned.most_bytes_to_read
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "della_manifest.json",
        "della_run.json",
        "della_tensors.parquet",
        "model.safetensors",
    ]
    assert len(verify(str(tmp_path / "a"), recompute=4).recomputed) == 4


def test_both_backends(
    old_family: tuple[Path, list[Path]],
    digests: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(*old_family, "della", **PARAMETERS)
    used = []

    class Torch(TorchBackend):
        def merge(self, recipe: Any, *arguments: Any) -> Any:
            used.append(recipe.name)
            return super().merge(recipe, *arguments)

    monkeypatch.setattr("della_dist.runtime.task.backend.load_backend", lambda *_: Torch("cpu"))
    assert run(config, tmp_path / "out").model_digest == digests["della"]
    assert len(set(used)) == 11  # all that are merged, but the empty one


def test_interrupted_and_resumed(
    old_family: tuple[Path, list[Path]], digests: dict[str, str], tmp_path: Path
) -> None:
    config = config_for(*old_family, "della", **PARAMETERS)
    interrupt(config, tmp_path / "out", after=2, shard_bytes=SHARD_BYTES)
    summary = run(config, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == 2
    assert summary.model_digest == digests["della"]


@pytest.mark.parametrize(
    "stored", ["plain", "transposed", "cut out"], ids=lambda name: name.replace(" ", "_")
)
@pytest.mark.parametrize("where", ["memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_from_object_stores(
    request: pytest.FixtureRequest,
    digests: dict[str, str],
    tmp_path: Path,
    where: str,
    stored: str,
) -> None:
    root = f"memory://old-{stored.replace(' ', '-')}"
    if where == "s3":
        root = f"s3://{request.getfixturevalue('s3_bucket')}/old"
    family = save_old_family(tmp_path / "in", STORED[stored], num_shards=2)
    config = config_for(*family, "della", **PARAMETERS)
    remote = upload_inputs(config, root)
    for memory in (128 * MIB, 1024 * MIB):
        summary = run(remote, tmp_path / str(memory), memory_bytes=memory, shard_bytes=SHARD_BYTES)
        assert summary.model_digest == digests["della"]
    interrupt(remote, f"{root}/out", after=2, shard_bytes=SHARD_BYTES)
    assert run(remote, f"{root}/out", shard_bytes=SHARD_BYTES).model_digest == digests["della"]
    store = open_output_store(root)
    for key in store.list():
        store.delete(key)


@pytest.fixture
def hub_family(hub: Hub, tmp_path: Path) -> Family:
    """A family on the Hub, all of it as torch.save has it."""
    family = Family(hub, tmp_path)
    for path in (family.base, *family.experts):
        convert(path, num_shards=1 + (path == family.base))
        torch.save({"state": torch.ones(1000)}, path / "optimizer.pt")
        family.commits[path.name] = publish(hub, path, family.name(path), "old")
    return family


def old_names(family: Family) -> MergeConfig:
    paths = (family.base, *family.experts)
    return family.config(names={path.name: f"{family.name(path)}@old" for path in paths})


def test_from_the_hub(hub: Hub, hub_family: Family, tmp_path: Path) -> None:
    config = old_names(hub_family)
    expected = run(hub_family.local_config(), tmp_path / "local-out").model_digest
    assert run(config, tmp_path / "ranges").model_digest == expected
    assert len(verify(str(tmp_path / "ranges"), recompute=3).recomputed) == 3
    assert not (tmp_path / "hf" / "hub").exists()


def test_from_the_cache_of_the_hub(
    hub: Hub, hub_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the weights, as old programs put them there, and nobody to ask for more."""
    expected = run(hub_family.local_config(), tmp_path / "local-out").model_digest
    for path in (hub_family.base, *hub_family.experts):
        patterns = ["pytorch_model*", "config.json"]
        snapshot_download(hub_family.name(path), revision="old", allow_patterns=patterns)
    hub_snapshot.forget_snapshots()
    monkeypatch.setattr(hub_snapshot.constants_of(), "HF_HUB_OFFLINE", True)
    hub.forget()
    assert run(old_names(hub_family), tmp_path / "out").model_digest == expected
    assert not hub.seen()


def test_downloaded_first(hub: Hub, hub_family: Family, tmp_path: Path) -> None:
    expected = run(hub_family.local_config(), tmp_path / "local-out").model_digest
    summary = run(old_names(hub_family), tmp_path / "out", download=True)
    assert summary.model_digest == expected
    fetched = [seen["target"] for seen in hub.seen() if "/resolve/" in seen["target"]]
    assert any("pytorch_model.bin.index.json" in target for target in fetched)
    assert not any("optimizer.pt" in target for target in fetched)
    hub_snapshot.forget_snapshots()
    hub.forget()
    assert run(old_names(hub_family), tmp_path / "out", download=True).already_complete
    assert not [seen for seen in hub.seen() if seen["who"] == "store"]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_by_ray(digests: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config = config_for(*save_old_family(tmp_path / "in", transposed), "della", **PARAMETERS)
    with ray_cluster(1, 2) as cluster:
        summary = run(
            config,
            tmp_path / "out",
            engine="ray",
            address=cluster.address,
            shard_bytes=SHARD_BYTES,
            workers=2,
            memory_bytes=192 * MIB,
        )
    assert summary.model_digest == digests["della"]


def test_mixed_formats(digests: dict[str, str], tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    convert(experts[1], name="model.pt")
    convert(experts[2], num_shards=3, stored=transposed, name="model.pth")
    (experts[2] / "model.pth.index.json").unlink()  # the numbers in the names tell
    assert (
        run(config_for(base, experts, **PARAMETERS), tmp_path / "out").model_digest
        == (digests["della"])
    )


def test_files_that_the_index_does_not_name(digests: dict[str, str], tmp_path: Path) -> None:
    base, experts = save_old_family(tmp_path, num_shards=2)
    torch.save({"stale": torch.ones(2)}, base / "pytorch_model-00003-of-00003.bin")
    torch.save({"stale": torch.ones(2)}, base / "consolidated.00.pth")
    (base / "training_args.bin").write_bytes(b"whatever")
    summary = run(config_for(base, experts, **PARAMETERS), tmp_path / "out")
    assert summary.model_digest == digests["della"]
    (base / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(InputError, match="3 PyTorch files and no index"):
        open_checkpoint(str(base))
    (base / "pytorch_model-00003-of-00003.bin").unlink()
    assert len(open_checkpoint(str(base)).shards) == 2


def test_safetensors_are_preferred(digests: dict[str, str], tmp_path: Path) -> None:
    """Two forms of one model, as most repositories had them for a year: nobody opens the pickle."""
    base, experts = save_family(tmp_path)
    for path in (base, *experts):
        (path / "pytorch_model.bin").write_bytes(b"whatever")
        (path / "pytorch_model.bin.index.json").write_text("{}")
    config = config_for(base, experts, **PARAMETERS)
    assert any("pytorch_model.bin" in note for note in open_plan(config).notes())
    assert run(config, tmp_path / "out").model_digest == digests["della"]
    assert not list((tmp_path / "out").glob("pytorch_model*"))


@pytest.mark.parametrize("stored", ["plain", "transposed"])
def test_rows_of_tokens(tmp_path: Path, stored: str) -> None:
    """Embeddings that are gathered twice over: of views, and by token."""
    models = make_models(tmp_path / "models")
    experts = [models[name] for name in ("same", "a", "b", "moved")]
    config = config_for(models["base"], experts, "della", tokenizer_source="union")
    expected = run(config, tmp_path / "expected").model_digest
    for path in models.values():
        convert(path, stored=STORED[stored])
    summary = run(config, tmp_path / "out", memory_bytes=32 * MIB)
    assert summary.model_digest == expected


def test_files_beside_them(tmp_path: Path) -> None:
    """What is carried, what is not, and what is said."""
    base, experts = save_old_family(tmp_path, num_shards=2)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        (base / name).write_bytes(b"whatever")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "LICENSE").write_text("free")
    for expert in experts:
        (expert / "config.json").write_text(json.dumps({"model_type": "llama"}))
    summary = run(config_for(base, experts, **PARAMETERS), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("LICENSE", "README.md", "config.json"),
        *("della_manifest.json", "della_run.json", "della_tensors.parquet", "model.safetensors"),
    ]
    notes = [note for note in open_plan(config_for(base, experts)).notes() if "left out" in note]
    assert len(notes) == 1
    assert "training_args.bin" in notes[0]
    assert "pytorch_model" not in notes[0]
    assert summary.num_tensors == len(mixed_base())


def tied_family(folder: Path, *, is_transpose: bool = False) -> tuple[list[Path], list[Path]]:
    """Return a family as torch files, tied by sharing a storage, and as safetensors."""
    old: list[Path] = []
    new: list[Path] = []
    for m in range(3):
        numbers = torch.sin(torch.arange(64 * 64, dtype=torch.float32) + m / 100).reshape(64, 64)
        content = {
            "model.embed_tokens.weight": numbers,
            "lm_head.weight": numbers.t() if is_transpose else numbers,
            "model.layers.0.q.weight": numbers[:, 7:40],
            "model.layers.0.k.weight": numbers[5:30],
        }
        for kind, paths in (("old", old), ("new", new)):
            path = folder / kind / str(m)
            path.mkdir(parents=True)
            tie = {"model_type": "llama", "tie_word_embeddings": True}
            tie["architectures"] = ["LlamaForCausalLM"]
            (path / "config.json").write_text(json.dumps(tie))
            paths.append(path)
        torch.save(content, old[-1] / "pytorch_model.bin")
        save_file(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in content.items()},
            new[-1] / "model.safetensors",
        )
    return old, new


@pytest.mark.parametrize("is_transpose", [False, True])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_shared_storages(tmp_path: Path, is_transpose: bool, where: str) -> None:
    """Tied by the place of their bytes or by their bytes, they are tied; else they are not.

    A square matrix and its transpose begin and end in the same place.
    """
    old, new = tied_family(tmp_path, is_transpose=is_transpose)
    expected = run(config_for(new[0], new[1:], **PARAMETERS), tmp_path / "new-out")
    config = config_for(old[0], old[1:], **PARAMETERS)
    if where == "memory":
        config = upload_inputs(config, f"memory://tied-{is_transpose}")
    summary = run(config, tmp_path / "out", memory_bytes=128 * MIB)
    assert summary.model_digest == expected.model_digest
    assert ("lm_head.weight" in load_tensors(tmp_path / "out")) == is_transpose


def test_views_are_said(tmp_path: Path) -> None:
    config = config_for(*save_old_family(tmp_path, transposed))
    notes = [note for note in open_plan(config).notes() if "views of other data" in note]
    assert len(notes) == 4
    assert "(column, model.embed" in notes[0] or "tensors (" in notes[0]


def test_a_changed_file_is_another_input(tmp_path: Path) -> None:
    base, experts = save_old_family(tmp_path)
    config = config_for(base, experts, **PARAMETERS)
    interrupt(config, tmp_path / "out", after=2, shard_bytes=SHARD_BYTES)
    tensors = mixed_base(seed=1)
    shutil.rmtree(experts[0])
    save_torch(experts[0], tensors)
    with pytest.raises(Exception, match=r"expert0/pytorch_model\.bin"):
        run(config, tmp_path / "out", shard_bytes=SHARD_BYTES)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    base, experts = save_old_family(tmp_path)
    config = config_for(base, experts, **PARAMETERS)
    path = experts[0] / "pytorch_model.bin"

    def cut(*_: Any) -> None:
        os.truncate(path, 1000)

    with pytest.raises((InputChangedError, InputError)):
        merge(config, str(tmp_path / "out"), RunOptions(device="cpu"), watch=cut)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def tiny_model() -> Any:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
        )
    )


def test_what_transformers_loads(tiny_model: Any, tmp_path: Path) -> None:
    """Its state dictionary in the files that it wrote for years; the output loads in it."""
    import transformers

    state = tiny_model.state_dict()
    names = list(state)
    old = tmp_path / "old"
    tiny_model.config.save_pretrained(old)
    weight_map = {}
    for i, mine in enumerate((names[::2], names[1::2])):
        shard = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in mine}, old / shard)
        weight_map.update(dict.fromkeys(mine, shard))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(old).state_dict()
    assert set(open_checkpoint(str(old)).tensors) == set(names)
    other = tmp_path / "other"
    tiny_model.save_pretrained(other)
    config = config_for(old, [other], "task_arithmetic")
    run(config, tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(merged[name], tensor), name


def test_views_larger_than_the_budget(tmp_path: Path) -> None:
    """A transposed matrix of 64 MiB, merged in 32 MiB."""
    numbers = torch.arange(4096 * 8192, dtype=torch.int16).view(torch.bfloat16)
    matrix = torch.nan_to_num(numbers, 0.0, 0.0, 0.0).clamp(-10, 10).reshape(8192, 4096)
    paths = []
    for m in range(2):
        path = tmp_path / f"old{m}"
        path.mkdir()
        torch.save({"w.weight": (matrix + m / 8).t()}, path / "pytorch_model.bin")
        paths.append(path)
    config = config_for(paths[0], paths[1:], "task_arithmetic")
    summary = run(config, tmp_path / "out", memory_bytes=32 * MIB, threads=2)
    plain = []
    for m in range(2):
        tensor = (matrix + m / 8).t().contiguous()
        raw = tensor.view(torch.uint8).numpy().tobytes()
        tensors = {"w.weight": Tensor("BF16", (4096, 8192), raw)}
        plain.append(save_checkpoint(tmp_path / f"new{m}", tensors))
    expected = run(config_for(plain[0], plain[1:], "task_arithmetic"), tmp_path / "expected")
    assert summary.model_digest == expected.model_digest
