"""The merged delta as an adapter: what PEFT makes of it is what the merge makes of the base."""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, InputError, OutputError, RunError, TensorDataError
from della_dist.ops.factoring import factors_along
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.tensor import load_backend
from della_dist.planning.layout import MIB
from della_dist.planning.memory import MemoryBudget
from della_dist.planning.views.peft_types import EXPERT_NAMES, EXPERT_TYPES
from della_dist.planning.views.renamed_types import RENAMED_TYPES
from della_dist.runtime.describe import describe_plan
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.task.blas import one_blas_thread
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.kept_factors import FACTORS
from della_dist.runtime.task.merge import digest_tensor
from della_dist.runtime.task.meter import Meter
from della_dist.runtime.verify import verify
from della_dist.specs.sources import Factor
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.tensor_table import TENSORS_NAME
from tests.adapters import HEADS, SHAPE, by_peft, save_adapter, save_llama, save_model
from tests.checkpoints import make_experts, save_checkpoint, tensor
from tests.hub import files_of
from tests.interrupting import Killed
from tests.merging import config_for, run
from tests.remote import download, upload_inputs
from tests.servers.hub import Hub, add_commit
from tests.servers.hub_writes import TOKEN

WEIGHTS = "adapter_model.safetensors"
#: Of float32: the base and the delta are rounded before they are added, and added.
ROUNDING = 2e-7


def merging(base: Path, experts: list[Any], rank: int | None = None, **keys: Any) -> MergeConfig:
    """Return a merge of models with one weight each, as an adapter or, without a rank, a model."""
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(model), "parameters": {"weight": 0.75 - 0.25 * i}}
            for i, model in enumerate(experts)
        ],
        **keys,
    }
    if rank is not None:
        content["output"] = {"adapter": rank}
    return config_from_mapping(content, "merge.yaml")


def fine_tuned(
    model: Path, folder: Path, auto: str = "AutoModelForCausalLM", seed: int = 1
) -> Path:
    """Write a model all of whose numbers are others."""
    import torch
    import transformers

    loaded = getattr(transformers, auto).from_pretrained(model, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    loaded.save_pretrained(folder)
    return folder


def energies(out: Path) -> dict[str, float]:
    """Return what is kept of the delta, by the name of a factor."""
    rows = pq.read_table(out / TENSORS_NAME).to_pylist()
    return {row["name"]: row["energy"] for row in rows if row["action"] == "factor"}


def load(out: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors of an adapter."""
    from safetensors.numpy import load_file

    return load_file(out / WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tuned models of it, and three adapters."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "base")
    fine_tuned(folder / "base", folder / "math")
    fine_tuned(folder / "base", folder / "code", seed=2)
    save_adapter(folder / "base", folder / "a", r=4, lora_alpha=8)
    save_adapter(folder / "base", folder / "b", seed=2, r=2, lora_alpha=3, use_rslora=True)
    all_linear: dict[str, Any] = {"target_modules": "all-linear", "rank_pattern": {"o_proj": 5}}
    save_adapter(folder / "base", folder / "c", seed=3, r=3, **all_linear)
    return folder


# ---------------------------------------------------------------- what PEFT makes of it


def _models() -> dict[str, tuple[str, Any, str]]:
    import transformers as t

    small = {**SHAPE, "num_attention_heads": 4}
    gpt = {"n_embd": 32, "n_head": 4, "n_positions": 32, "n_layer": 2, "vocab_size": 96}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    causal, embeds = "AutoModelForCausalLM", {"max_position_embeddings": 40}
    return {
        "llama": (causal, t.LlamaConfig(**SHAPE, **HEADS), ""),
        "llama_tied": (causal, t.LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True), ""),
        "qwen2_biases": (causal, t.Qwen2Config(**SHAPE, **HEADS), ""),
        "gemma2": (causal, t.Gemma2Config(**SHAPE, **HEADS, head_dim=8), ""),
        "phi": (causal, t.PhiConfig(**small), ""),
        "falcon_tied": (causal, t.FalconConfig(**small), ""),
        "gpt2_transposed": (causal, t.GPT2Config(**gpt, **tokens), ""),
        "opt_positions": (
            causal,
            t.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, **embeds),
            "",
        ),
        "gpt_neox": (causal, t.GPTNeoXConfig(**small), "embed_out"),
        "classifier": (
            "AutoModelForSequenceClassification",
            t.LlamaConfig(**SHAPE, **HEADS, pad_token_id=0),
            "",
        ),
        "bert_classifier": (
            "AutoModelForSequenceClassification",
            t.BertConfig(**small, **embeds),
            "",
        ),
        "without_a_head": ("AutoModel", t.LlamaConfig(**SHAPE, **HEADS), ""),
        "t5": (
            "AutoModelForSeq2SeqLM",
            t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96,
                       decoder_start_token_id=0),
            "shared",
        ),
    }  # fmt: skip


NAMES = (
    *("llama", "llama_tied", "qwen2_biases", "gemma2", "phi", "falcon_tied", "gpt2_transposed"),
    *("opt_positions", "gpt_neox", "classifier", "bert_classifier", "without_a_head", "t5"),
)


@pytest.mark.parametrize("name", NAMES)
def test_of_full_rank_peft_has_the_merged_model(tmp_path: Path, name: str) -> None:
    import torch
    import transformers
    from peft import PeftModel

    auto, settings, left = _models()[name]
    model = getattr(transformers, auto).from_config(settings)
    base = save_model(tmp_path / "base", model)
    expert = fine_tuned(base, tmp_path / "expert", auto)
    # What no adapter can hold stays the base's.
    weight = [{"filter": left, "value": 0.0}] * bool(left) + [{"value": 0.75}]
    models = [{"model": str(expert), "parameters": {"weight": weight}}]
    run(merging(base, [], models=models), tmp_path / "full")
    run(merging(base, [], rank=1000, models=models), tmp_path / "out")

    def loaded(path: Path) -> Any:
        return getattr(transformers, auto).from_pretrained(path, dtype="float32").eval()

    full = loaded(tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        adapted: Any = PeftModel.from_pretrained(loaded(base), tmp_path / "out").eval()
    ids = torch.arange(10)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    with torch.no_grad():
        before, wanted = adapted(**inputs)[0], full(**inputs)[0]
        assert float((before - wanted).abs().max()) < 1e-5
        assert float((loaded(base)(**inputs)[0] - wanted).abs().max()) > 1e-3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are tied no longer
            merged = adapted.merge_and_unload()
        assert float((merged(**inputs)[0] - wanted).abs().max()) < 1e-5
    state, expected = merged.state_dict(), full.state_dict()
    assert state.keys() == expected.keys()
    assert all(float((state[n] - expected[n]).abs().max()) < ROUNDING for n in expected)


METHODS = [
    "task_arithmetic",
    "ties",
    "dare_linear",
    "della",
    "model_stock",
    "multislerp",
    "breadcrumbs",
    "sce",
    "ramplus_tl",
]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_low_rank_loses_is_what_energy_says(
    folder: Path, tmp_path: Path, method: str
) -> None:
    has_density = method in ("ties", "dare_linear", "della", "breadcrumbs")
    parameters = {"density": 0.6} if has_density else {}
    how: dict[str, Any] = {"merge_method": method, "parameters": parameters}
    models = [folder / "math", folder / "code"]
    run(merging(folder / "base", models, **how), tmp_path / "full")
    run(merging(folder / "base", models, rank=6, **how), tmp_path / "out")
    base, full = by_peft(folder / "base"), by_peft(tmp_path / "full")
    found = by_peft(folder / "base", tmp_path / "out")
    kept = energies(tmp_path / "out")
    for name, whole in full.items():
        if whole.ndim != 2:
            assert (found[name] == whole).all()
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        mine = next(energy for n, energy in kept.items() if n.startswith(f"{module}.lora"))
        delta = (whole - base[name]).double()
        lost = float(((found[name] - whole).double() ** 2).sum() / (delta**2).sum())
        best = np.linalg.svd(delta.numpy(), compute_uv=False)
        assert lost == pytest.approx(1 - mine, rel=1e-4)
        assert 1 - lost == pytest.approx(float((best[:6] ** 2).sum() / (best**2).sum()), rel=1e-4)
    assert len(kept) == 2 * len([t for t in full.values() if t.ndim == 2])
    assert 0.1 < min(kept.values()) < max(kept.values()) < 0.9


def test_it_is_an_expert_of_another_merge(folder: Path, tmp_path: Path) -> None:
    """What is written here is read here: the same weights as by the full merge."""
    from safetensors.numpy import load_file

    models = [folder / "math", folder / "code"]
    run(merging(folder / "base", models), tmp_path / "full")
    run(merging(folder / "base", models, rank=1000), tmp_path / "out")
    again = {
        "merge_method": "passthrough",
        "models": [{"model": f"{folder / 'base'}+{tmp_path / 'out'}"}],
    }
    run(config_from_mapping(again), tmp_path / "again")
    full, found = (load_file(tmp_path / n / "model.safetensors") for n in ("full", "again"))
    assert full.keys() == found.keys()
    assert all(np.abs(full[n] - found[n]).max() < ROUNDING for n in full)


# ---------------------------------------------------------------- adapters of adapters


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"lambda": 0.5}),
        ("task_arithmetic", {"normalize": True}),
        ("dare_linear", {"density": 1.0}),
        ("della_linear", {}),
    ],
)
def test_the_sum_of_adapters_is_exact(
    folder: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    models = [folder / "a", folder / "b", folder / "c"]
    how: dict[str, Any] = {"merge_method": method, "parameters": parameters}
    run(merging(folder / "base", models, **how), tmp_path / "full")
    summary = run(merging(folder / "base", models, rank=9, **how), tmp_path / "out")
    found, full = by_peft(folder / "base", tmp_path / "out"), by_peft(tmp_path / "full")
    assert max(float((found[n] - full[n]).abs().max()) for n in full) < ROUNDING
    assert set(energies(tmp_path / "out").values()) == {1.0}
    assert any("14 layers, 14 of them exactly" in note for note in summary.notes)
    assert not any("SVD" in note for note in summary.notes)
    out = load(tmp_path / "out")
    at = "base_model.model.model.layers.0."
    ranks = {"self_attn.q_proj": 9, "self_attn.k_proj": 3, "self_attn.o_proj": 5}
    assert {m: out[f"{at}{m}.lora_A.weight"].shape[0] for m in ranks} == ranks
    # The first adapter's own matrix, to the bit.
    theirs = load(folder / "a")[f"{at}self_attn.q_proj.lora_A.weight"]
    assert (out[f"{at}self_attn.q_proj.lora_A.weight"][:4] == theirs).all()


@pytest.mark.parametrize("kind", ["transposed", "embeddings", "tied"])
def test_sums_of_adapters_of_other_layers(tmp_path: Path, kind: str) -> None:
    """Of matrices that PEFT turns, and of an embedding that is the head: that is there whole."""
    import transformers as t

    gpt2 = t.GPT2Config(n_embd=32, n_head=4, n_positions=32, n_layer=2, vocab_size=96,
                        bos_token_id=0, eos_token_id=1)  # fmt: skip
    tied = kind == "tied"
    if kind == "transposed":
        base = save_model(tmp_path / "base", t.GPT2LMHeadModel(gpt2))
        how: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    else:
        base = save_llama(tmp_path / "base", tie_word_embeddings=tied)
        how = {"target_modules": ["q_proj", "embed_tokens"]}
    models = [save_adapter(base, tmp_path / f"{i}", seed=i, r=2 + i, **how) for i in (1, 2)]
    run(merging(base, models), tmp_path / "full")
    run(merging(base, models, rank=7), tmp_path / "out")
    found, full = by_peft(base, tmp_path / "out"), by_peft(tmp_path / "full")
    assert max(float((found[n] - full[n]).abs().max()) for n in full) < ROUNDING
    assert set(energies(tmp_path / "out").values()) == {1.0}
    names = load(tmp_path / "out").keys()
    assert any(name.endswith("lora_embedding_A") for name in names) == (kind == "embeddings")
    assert ("base_model.model.lm_head.weight" in names) == tied


@pytest.mark.parametrize("what", ["adapter", "model"])
def test_damaged_experts_are_named(folder: Path, tmp_path: Path, what: str) -> None:
    from safetensors.numpy import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(folder / ("a" if what == "adapter" else "math"), damaged)
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name] = tensors[name] * np.float32(np.nan)
    save_file(tensors, file, {"format": "pt"})
    config = merging(folder / "base", [folder / "b", damaged], rank=16)
    with pytest.raises(TensorDataError, match=f"(?s)q_proj.*{damaged}.*NaN or infinite"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("why", ["rank", "elect", "dropped", "angles", "overlap"])
def test_what_is_no_sum_of_such_a_rank_is_factored(folder: Path, tmp_path: Path, why: str) -> None:
    given: dict[str, dict[str, Any]] = {
        "rank": {},
        "elect": {"merge_method": "ties", "parameters": {"density": 1.0}},
        "dropped": {"merge_method": "dare_linear", "parameters": {"density": 0.5}},
        "angles": {"merge_method": "multislerp"},
        "overlap": {"merge_method": "ram"},
    }
    how = given[why]
    rank = 5 if why == "rank" else 9
    plan = open_plan(merging(folder / "base", [folder / "a", folder / "b"], rank=rank, **how))
    sources = [plan.source(tensor) for shard in plan.shards for tensor in shard.tensors]
    assert sources
    assert not any(source.is_sum for source in sources if isinstance(source, Factor))
    run(plan.config, tmp_path / "out")
    kept = energies(tmp_path / "out").values()
    assert all(0 < energy <= 1 for energy in kept)
    assert any(energy < 1 for energy in kept) or why in ("angles", "overlap")


def test_whole_tensors_of_adapters(folder: Path, tmp_path: Path) -> None:
    """What an adapter has in the place of others is there as merged."""
    saved: dict[str, Any] = {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]}
    one = save_adapter(folder / "base", tmp_path / "one", seed=5, **saved)
    models = [one, folder / "a"]
    run(merging(folder / "base", models), tmp_path / "full")
    run(merging(folder / "base", models, rank=64), tmp_path / "out")
    found, full = by_peft(folder / "base", tmp_path / "out"), by_peft(tmp_path / "full")
    assert max(float((found[n] - full[n]).abs().max()) for n in full) < ROUNDING


# ---------------------------------------------------------------- the same bytes


def _large(folder: Path) -> tuple[Path, list[Path]]:
    """Write a base and experts with matrices that are factored step by step, wide and tall."""
    rng = np.random.default_rng(0)
    shapes = {"up_proj": (700, 500), "down_proj": (500, 700), "q_proj": (96, 4000)}
    base = {
        f"model.layers.0.{name}.weight": tensor(rng.normal(0, 0.05, shape), "BF16")
        for name, shape in shapes.items()
    }
    base["model.norm.weight"] = tensor(rng.normal(1, 0.05, 500), "BF16")
    path = save_checkpoint(folder / "base", base)
    experts = [
        save_checkpoint(folder / f"expert{m}", expert)
        for m, expert in enumerate(make_experts(base, 2))
    ]
    return path, experts


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return _large(tmp_path_factory.mktemp("large"))


HOW: dict[str, dict[str, Any]] = {
    "della": {"parameters": {"density": 0.6}},
    "ties": {"method": "ties", "parameters": {"density": 0.2}},
    "l1": {"parameters": {"density": 0.6, "rescale": "l1"}},
    "float32": {"method": "task_arithmetic", "out_dtype": "float32"},
}


@pytest.mark.parametrize("how", HOW)
def test_same_bytes_whatever_the_memory_and_the_threads(
    large: tuple[Path, list[Path]], tmp_path: Path, how: str
) -> None:
    config = config_for(*large, **HOW[how], output={"adapter": 8})
    plan = open_plan(config)
    steps = [plan.source(tensor) for shard in plan.shards for tensor in shard.tensors]
    assert sum(isinstance(source, Factor) for source in steps) == 6
    digests = set()
    for i, options in enumerate(
        ({"threads": 1, "workers": 1}, {"threads": 3, "memory_bytes": 40 * MIB}, {"threads": 4})
    ):
        summary = run(config, tmp_path / str(i), **options)
        digests.add(summary.model_digest)
        described = describe_plan(config, None)
        assert described.bytes_to_read <= summary.bytes_read <= described.most_bytes_to_read
    assert len(digests) == 1
    assert len({(tmp_path / str(i) / TENSORS_NAME).read_bytes() for i in range(3)}) == 1
    verify(str(tmp_path / "0"), recompute=7)


def test_an_interrupted_run_goes_on(
    large: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(*large, method="task_arithmetic", output={"adapter": 8})
    whole = run(config, tmp_path / "whole")
    calls = []

    def stopped(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise TensorDataError("stopped here")
        return factors_along(*args, **how)

    monkeypatch.setattr("della_dist.runtime.task.factors.factors_along", stopped)
    with pytest.raises(TensorDataError, match="stopped here"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    monkeypatch.undo()
    assert run(config, tmp_path / "out").model_digest == whole.model_digest
    again = run(config, tmp_path / "out")
    assert again.already_complete
    model = config_for(*large, method="task_arithmetic")
    with pytest.raises(OutputError, match=r'config.output was {"adapter": 8}, now null'):
        run(model, tmp_path / "out")
    other = config_for(*large, method="task_arithmetic", output={"adapter": 9})
    with pytest.raises(OutputError, match=r"`?output\.adapter`? was 8, now 9") as error:
        run(other, tmp_path / "out")
    assert "shard" not in str(error.value)
    for name in (WEIGHTS, "adapter_config.json"):  # what is lost is made again
        (tmp_path / "out" / name).unlink()
        assert run(config, tmp_path / "out").model_digest == whole.model_digest
    verify(str(tmp_path / "out"))


def test_what_was_made_of_single_matrices_is_kept(
    large: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the last matrix, a run goes on with it; nothing of it is left in the end."""
    monkeypatch.setattr("della_dist.runtime.task.kept_factors.KEPT_OPERATIONS", 1)
    config = config_for(*large, method="task_arithmetic", output={"adapter": 8})
    whole = run(config, tmp_path / "whole")
    out, kept = tmp_path / "out", tmp_path / "out" / FACTORS
    calls = []

    def stopped(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RunError("stopped here")
        return factors_along(*args, **how)

    monkeypatch.setattr("della_dist.runtime.task.factors.factors_along", stopped)
    with pytest.raises(RunError, match="stopped here"):
        run(config, out)
    files = list(kept.iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")
    calls.clear()
    summary = run(config, out)
    assert len(calls) == 2  # one was damaged, one was not made
    assert summary.model_digest == whole.model_digest
    assert (out / TENSORS_NAME).read_bytes() == (tmp_path / "whole" / TENSORS_NAME).read_bytes()
    assert summary.bytes_read < whole.bytes_read
    assert not (out / ".della").exists()


def test_kept_factors_are_those_of_one_plan(
    large: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("della_dist.runtime.task.kept_factors.KEPT_OPERATIONS", 1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("della_dist.runtime.output.commit.Output.commit", _killed)
        with pytest.raises(Killed):
            run(config_for(*large, method="task_arithmetic", output={"adapter": 8}), out)
    assert len(list((out / FACTORS).iterdir())) == 3
    model = config_for(*large, method="task_arithmetic")
    with pytest.raises(OutputError, match=r'config.output was {"adapter": 8}, now null'):
        run(model, tmp_path / "out")
    other = config_for(*large, method="task_arithmetic", output={"adapter": 9})
    with pytest.raises(OutputError, match=r"config.output.adapter was 8, now 9"):
        run(other, out)
    there = run(other, out, restart=True)
    assert there.model_digest == run(other, tmp_path / "other").model_digest


def _killed(*_: object) -> None:
    raise Killed


def test_both_backends(large: tuple[Path, list[Path]]) -> None:
    plan = open_plan(config_for(*large, parameters={"density": 0.6}, output={"adapter": 8}))
    assert plan.adapter is not None
    with one_blas_thread(plan), ThreadPoolExecutor(2) as compute:
        contexts = [
            MergeContext(
                plan, backend, MemoryBudget(64 * MIB, 1, 2), compute, Meter(),
                threading.Event(), InputStores(4),
            )
            for backend in (load_backend("numba"), TorchBackend("cpu"))
        ]  # fmt: skip
        for tensor in plan.shards[0].tensors:
            one, other = (digest_tensor(context, tensor) for context in contexts)
            assert one == other, tensor.name


@pytest.mark.s3
def test_from_a_bucket_and_into_it(
    large: tuple[Path, list[Path]], tmp_path: Path, s3_bucket: str
) -> None:
    config = config_for(*large, parameters={"density": 0.6}, output={"adapter": 8})
    here = run(config, tmp_path / "out")
    there = upload_inputs(config, f"s3://{s3_bucket}/in")
    out = f"s3://{s3_bucket}/out"
    summary = run(there, out, memory_bytes=192 * MIB)
    assert summary.model_digest == here.model_digest
    planned = describe_plan(there, None, RunOptions(device="cpu", memory_bytes=192 * MIB))
    assert planned.bytes_to_read == summary.bytes_read
    verify(out, recompute=7)
    back = download(out, tmp_path / "back")
    assert (back / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_sums_from_a_store(folder: Path, tmp_path: Path) -> None:
    config = merging(folder / "base", [folder / "a", folder / "b"], rank=8)
    here = run(config, tmp_path / "out")
    there = upload_inputs(config, f"memory://{tmp_path.name}")
    summary = run(there, f"memory://{tmp_path.name}/out", memory_bytes=192 * MIB)
    assert summary.model_digest == here.model_digest
    planned = describe_plan(there, None, RunOptions(device="cpu", memory_bytes=192 * MIB))
    assert planned.bytes_to_read == summary.bytes_read


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_to_the_hub(
    folder: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that the adapter names is the repository, at its commit."""
    from huggingface_hub import snapshot_download

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = add_commit(hub.folder, "llm/base", files_of(folder / "base"))
    config = merging(Path("llm/base"), [folder / "a", folder / "math"], rank=8)
    summary = run(config, "hf://writer/adapter")
    back = Path(snapshot_download("writer/adapter"))
    said = json.loads((back / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("llm/base", commit)
    assert "base_model: llm/base\n" in (back / "README.md").read_text()
    local = run(merging(folder / "base", [folder / "a", folder / "math"], rank=8), tmp_path / "out")
    assert summary.model_digest == local.model_digest
    verify("hf://writer/adapter")


@pytest.mark.gpu
def test_same_bytes_on_a_gpu(large: tuple[Path, list[Path]], tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = config_for(*large, parameters={"density": 0.6}, output={"adapter": 8})
    here = run(config, tmp_path / "cpu")
    there = run(config, tmp_path / "cuda", device="cuda")
    assert here.model_digest == there.model_digest


# ---------------------------------------------------------------- what is written, and said


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = merging(folder / "base", [folder / "math"], rank=4, seed=7)
    planned = describe_plan(config, str(out))
    summary = run(config, out)
    assert planned.bytes_to_write == (summary.bytes_written)
    assert sorted(file.name for file in out.iterdir()) == [
        *("README.md", "adapter_config.json", WEIGHTS, "della_manifest.json", RUN_NAME),
        TENSORS_NAME,
    ]
    said = json.loads((out / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (4, 4, {})
    assert said["base_model_name_or_path"] == str(folder / "base")
    assert "q_proj" in said["target_modules"]
    assert "model.norm" in said["modules_to_save"]
    card = (out / "README.md").read_text()
    assert "| `q_proj` | 2 |" in card
    assert "library_name: peft" in card
    assert "on machines of one kind" in card
    tensors = load(out)
    for name, right in tensors.items():
        if name.endswith("lora_A.weight"):
            assert np.abs(right @ right.T - np.eye(len(right))).max() < 1e-6
            assert (right[np.arange(len(right)), np.abs(right).argmax(axis=1)] > 0).all()
    assert any("truncated SVD" in note for note in planned.notes)
    assert any("whole" in note for note in planned.notes)
    verify(str(out))


@pytest.mark.parametrize(
    ("keys", "task"),
    [({"num_mel_bins": 80}, None), ({"input_feat_per_channel": 80}, None), ({}, "SEQ_2_SEQ_LM")],
)
def test_models_that_hear_have_no_task(
    tmp_path: Path, keys: dict[str, Any], task: str | None
) -> None:
    """Of SEQ_2_SEQ_LM, PEFT hands the model the numbers of words."""
    stated = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        **keys,
    }
    for i, name in enumerate(("base", "expert")):
        matrix = tensor(np.full((8, 8), 1.0 + i), "F32")
        tensors = {"model.encoder.layers.0.self_attn.q_proj.weight": matrix}
        save_checkpoint(tmp_path / name, tensors, config=stated)
    run(merging(tmp_path / "base", [tmp_path / "expert"], rank=2), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["task_type"] == task


def test_transformers_loads_the_base_with_it(folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    models = [folder / "a", folder / "c"]
    run(merging(folder / "base", models), tmp_path / "full")
    run(merging(folder / "base", models, rank=4), tmp_path / "out")
    loaded = [
        AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        for path in (folder / "base", tmp_path / "full", tmp_path / "out")
    ]
    with torch.no_grad():
        base, full, found = (model(input_ids=torch.arange(10)[None])[0] for model in loaded)
    assert float((found - full).abs().max()) < 0.5 * float((base - full).abs().max())


def test_patterns_name_other_ranks(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftConfig

    run(merging(folder / "base", [folder / "a", folder / "c"], rank=20), tmp_path / "out")
    said = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(said, LoraConfig)
    assert said.rank_pattern == said.alpha_pattern
    assert (said.r, said.rank_pattern) == (3, {"o_proj": 5, "q_proj": 7, "v_proj": 7})


def test_zero_deltas(folder: Path, tmp_path: Path) -> None:
    """An expert that is the base, in other files: zeros, and nothing lost."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "base").save_pretrained(tmp_path / "same")
    run(merging(folder / "base", [tmp_path / "same"], rank=4), tmp_path / "out")
    assert set(energies(tmp_path / "out").values()) == {1.0}
    found, base = by_peft(folder / "base", tmp_path / "out"), by_peft(folder / "base")
    assert all((found[n] == base[n]).all() for n in base)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"output": {"adapter": 0}}, "`output.adapter` is 0; it must be a whole number"),
        ({"output": {"adapter": True}}, "`output.adapter` is true; it must be a whole number"),
        ({"output": {"adapter": "8"}}, "`output.adapter` is '8'; it must be a whole number"),
        ({"output": {"adapter": 1 << 40}}, "the rank of the adapter: from 1 to 2147483647"),
        ({"output": {"adapter": 10**5000}}, "is a huge number; it must be a whole number"),
        ({"output": {"adapter": 0, "form": 1}}, "(2) `output.adapter` is 0; it must be"),
        ({"output": {}}, "`output.adapter` is missing: the rank of the adapter"),
        ({"output": {"adaptor": 8}}, "`output.adaptor` is no known key"),
        ({"output": "there"}, "`output` must be a mapping (adapter: RANK), not 'there'"),
        ({"merge_method": "linear"}, "needs deltas to a base, which linear has not"),
        ({"merge_method": "passthrough"}, "needs deltas to a base, which passthrough has not"),
        ({"tokenizer_source": "base"}, "does not go with `tokenizer`"),
        ({"chat_template": "chatml"}, "does not go with `chat_template`"),
        (
            {"models": (), "slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}]}]},
            "does not go with `slices`",
        ),
        (
            {"base_model": {"model": "b", "rename": [{"from": "^net", "to": "model"}]}},
            "does not go with `rename` of the base",
        ),
    ],
)
def test_configurations_that_are_refused(keys: dict[str, Any], words: str) -> None:
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "expert"}],
        "output": {"adapter": 8},
        **keys,
    }
    with pytest.raises(ConfigError) as error:
        config_from_mapping({k: v for k, v in content.items() if v != ()}, "merge.yaml")
    assert words in str(error.value)
    assert re.match(r"merge\.yaml: (2 problems\. \(1\) )?`output", str(error.value))


def test_stages_are_models() -> None:
    stage = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "name": "soup"}
    last = {"merge_method": "ties", "base_model": "base", "output": {"adapter": 8}}
    models = [{"model": "soup"}, {"model": "a"}]
    whole = config_from_mapping({**last, "models": models, "stages": [stage]})
    assert config_from_mapping(whole.normalized()) == whole
    of_soup = {**last, "models": [{"model": "a"}], "base_model": "soup", "stages": [stage]}
    with pytest.raises(ConfigError, match=r"would be an adapter of 'soup', which is removed"):
        config_from_mapping(of_soup)
    inner = {**last, "models": [{"model": "a"}], "name": "inner"}
    with pytest.raises(ConfigError, match="stands in 'inner', which others are merged of"):
        config_from_mapping({**last, "models": [{"model": "inner"}], "stages": [inner]})


def _refused(base: Path, model: object, **keys: Any) -> str:
    with pytest.raises(InputError) as error:
        open_plan(merging(base, [model], rank=4, **keys))
    return str(error.value)


def test_an_adapter_without_matrices_is_refused(folder: Path) -> None:
    weight = [{"filter": "norm", "value": 1.0}, {"value": 0.0}]
    models = [{"model": str(folder / "math"), "parameters": {"weight": weight}}]
    text = _refused(folder / "base", "", models=models)
    assert "norm.weight" in text
    assert "no matrix of a layer" in text


def test_modules_that_end_alike_are_saved_together(tmp_path: Path) -> None:
    """PEFT saves every module whose name ends as one that it is told: `norm`, `input_layernorm`."""
    import transformers as t

    base = save_model(tmp_path / "base", t.LlamaModel(t.LlamaConfig(**SHAPE, **HEADS)))
    saved: dict[str, Any] = {"modules_to_save": ["layernorm", "norm"], "auto": "AutoModel"}
    expert = save_adapter(base, tmp_path / "expert", **saved)
    weight = [{"filter": "layernorm", "value": 0.0}, {"value": 1.0}]
    models = [{"model": str(expert), "parameters": {"weight": weight}}]
    plan = open_plan(merging(base, [], rank=8, models=models))
    assert plan.adapter is not None
    assert "norm" in plan.adapter.saved
    assert "layers.1.post_attention_layernorm" in plan.adapter.saved
    run(plan.config, tmp_path / "out")
    from peft import PeftModel

    loaded: Any = t.AutoModel.from_pretrained(base, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = PeftModel.from_pretrained(loaded, tmp_path / "out")
    state = adapted.merge_and_unload().state_dict()
    before = t.AutoModel.from_pretrained(base, dtype="float32").state_dict()
    changed = {name for name in state if not (state[name] == before[name]).all()}
    assert "norm.weight" in changed
    assert not any("layernorm" in name for name in changed)


def test_tensors_that_are_refused(folder: Path, tmp_path: Path) -> None:
    import transformers as t

    small = {**SHAPE, **HEADS}
    experts = save_model(
        tmp_path / "experts", t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=4))
    )
    text = _refused(experts, fine_tuned(experts, tmp_path / "of_experts"))
    assert "experts.0.w1.weight" in text
    assert "experts and their routers are no linear layers in memory" in text
    # What an adapter of the rest changes can be written.
    attention = save_adapter(experts, tmp_path / "attention")
    assert open_plan(merging(experts, [attention], rank=4)).adapter is not None

    mamba = t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=8)
    states = save_model(tmp_path / "states", t.MambaForCausalLM(mamba))
    text = _refused(states, fine_tuned(states, tmp_path / "of_states"))
    assert "mixer.A_log" in text
    assert "belongs to no layer that has only a weight and a bias" in text

    # Two reasons, each with what it is about.
    mixed = save_checkpoint(tmp_path / "mixed", _old_bert(1.0))
    text = _refused(mixed, save_checkpoint(tmp_path / "of_mixed", _old_bert(2.0)))
    assert re.search(r"LayerNorm\.beta, \S+LayerNorm\.gamma \(the model in memory calls it", text)
    assert re.search(r"; layer\.A_log \(it belongs to no layer", text)

    masked = t.BertConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=40)
    bert = save_model(tmp_path / "bert", t.BertForMaskedLM(masked))
    text = _refused(bert, fine_tuned(bert, tmp_path / "of_bert", "AutoModelForMaskedLM"))
    assert "word_embeddings.weight" in text
    assert "shared by parts of the model" in text

    adapted = f"{folder / 'base'}+{folder / 'a'}"
    text = _refused(Path(adapted), folder / "math")
    assert "is itself made with an adapter" in text
    zero = {"models": [{"model": str(folder / "math"), "parameters": {"weight": 0.0}}]}
    assert "changes no tensor of the base" in _refused(folder / "base", "", **zero)


def _old_bert(value: float) -> dict[str, Any]:
    names = ("a.LayerNorm.gamma", "a.LayerNorm.beta", "layer.A_log", "layer.dense.weight")
    return {f"{one}": tensor(np.full((8,) * (1 + ("dense" in one)), value), "F32") for one in names}


def test_names_that_are_not_those_in_memory(folder: Path, tmp_path: Path) -> None:
    base = {"blocks.0.up.weight": tensor(np.ones((8, 8)), "F32")}
    expert = {"blocks.0.up.weight": tensor(np.ones((8, 8)) * 2, "F32")}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    one = save_checkpoint(tmp_path / "base", base)
    other = save_checkpoint(tmp_path / "expert", expert)
    for path in (one, other):
        (path / "config.json").write_text(json.dumps(config))
    assert "what its class calls it in memory" in _refused(one, other)
    for path in (one, other):
        (path / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    assert "is a llava, whose modules transformers calls otherwise" in _refused(one, other)


@pytest.mark.parametrize(
    ("kind", "layer", "why"),
    [
        (
            "deepseek_v3",
            "mlp.down_proj",
            "takes every down_proj of a deepseek_v3",
        ),
        ("qwen3_moe", "mlp.shared_expert.gate_proj", "takes every gate_proj of a qwen3_moe"),
        ("minimax", "mlp.w1", "takes every w1 of a minimax"),
        ("mamba2", "mixer.out_proj", "refuses every out_proj of a mamba2"),
        ("jamba", "mamba.dt_proj", "multiplies by the weight of dt_proj without asking the layer"),
    ],
)
def test_layers_that_peft_takes_for_others(tmp_path: Path, kind: str, layer: str, why: str) -> None:
    """Dense and shared layers beside experts, and those of state spaces, by their names."""
    for changed in (layer, "self_attn.o_proj"):
        paths = [tmp_path / changed / name for name in ("base", "expert")]
        for i, path in enumerate(paths):
            names = {f"model.layers.0.{one}.weight": one for one in (layer, "self_attn.o_proj")}
            tensors = {
                name: tensor(np.full((8, 8), 1.0 + i * (one == changed)), "F32")
                for name, one in names.items()
            }
            save_checkpoint(path, tensors, config={"model_type": kind})
        if changed == layer:
            assert why in _refused(*paths)
            continue
        weight = [{"filter": "o_proj", "value": 1.0}, {"value": 0.0}]
        models = [{"model": str(paths[1]), "parameters": {"weight": weight}}]
        assert open_plan(merging(paths[0], [""], rank=4, models=models)).adapter is not None


def test_every_type_with_experts_that_peft_takes_for_others_is_known() -> None:
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    found = {
        kind
        for kind, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if pattern in conversion._MOE_TARGET_MODULE_MAPPING and kind == kind.lower()
    }
    assert len(found) > 20
    assert found == EXPERT_TYPES
    names = {name for of in conversion._MOE_TARGET_MODULE_MAPPING.values() for name in of}
    assert names == EXPERT_NAMES


def test_every_type_that_transformers_renames_is_known() -> None:
    import transformers.conversion_mapping as mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    renamed = {
        key
        for key, steps in mapping._build_checkpoint_conversion_mapping().items()
        if key in CONFIG_MAPPING_NAMES
        and not all(isinstance(step, WeightConverter) for step in steps)
    }
    of_experts = {"mixtral", "minimax", "minimax_m2", "phimoe", "ernie4_5_moe", "exaone_moe"}
    assert len(renamed) > 100
    assert renamed - RENAMED_TYPES == of_experts
