"""Several documents: the bytes of separate runs, one run that continues, nothing left of stages."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import della_dist
from della_dist.cli import main
from della_dist.config import MergeConfig, parse_config
from della_dist.errors import (
    ConfigError,
    InputError,
    OutputError,
    StorageError,
    TensorDataError,
)
from della_dist.report.progress import Goal
from della_dist.report.run_log import JsonLines
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.removal import owner
from della_dist.runtime.verify import verify
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_output_store
from tests.checkpoints import load_tensors, mixed_base, save_checkpoint, tensor
from tests.hub import files_of
from tests.interrupting import Killed
from tests.merging import assert_paragraph, run, save_family
from tests.remote import download, upload
from tests.servers.hub import Hub, add_commit
from tests.staged import NAMING, by_hand, contents, document, staged, text_of

SHARD_BYTES = 150_000
FILES = {"model_type": "llama", "num_hidden_layers": 11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, config=FILES)
    return folder


def two(folder: Path, **first: Any) -> MergeConfig:
    """A stage, and what is merged of it and another expert: with one method, seed and base."""
    base = folder / "base"
    return staged(
        document([folder / "expert0", folder / "expert1"], name="first", base_model=base, **first),
        document(["first", folder / "expert2"], base_model=base),
    )


def test_what_is_wrong_in_several_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    """Of what reads a stage that cannot be planned, what is not there; the rest is not known."""
    config = staged(
        document([folder / "gone0"], name="first", base_model=folder / "base"),
        document([folder / "gone1", "third"], name="second", base_model=folder / "base"),
        document([folder / "expert0"], name="third", base_model=folder / "base"),
        document(["first", "second", folder / "gone2"], base_model=folder / "base"),
    )
    with pytest.raises(InputError) as caught:
        run(config, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"3 problems. (1) checkpoint {folder / 'gone0'} does not exist. (2) ")
    assert "gone1" in said
    assert "gone2" in said


def diamond(folder: Path) -> MergeConfig:
    """Two stages of one stage, in no order, and an output of both; all are named."""
    base = folder / "base"
    return staged(
        document(["left", "right"], name="all", base_model="root"),
        document(["root", folder / "expert1"], "dare_ties", name="right", base_model=base),
        document([folder / "expert0", base], "linear", name="root", dtype="bfloat16"),
        document(["root", folder / "expert2"], name="left", base_model=base, out_dtype="float32"),
    )


def layers(folder: Path) -> MergeConfig:
    """Slices of a stage, of which a stage of slices is merged with another."""

    def source(model: object, first: int, last: int) -> dict[str, Any]:
        return {"sources": [{"model": str(model), "layer_range": [first, last]}]}

    stacked = {"merge_method": "passthrough", "slices": [source("a", 0, 2), source("b", 1, 3)]}
    base = folder / "base"
    return staged(
        document([folder / "expert0", folder / "expert1"], name="a", base_model=base),
        document([folder / "expert2", folder / "expert1"], name="b", base_model=base),
        {"name": "stacked", **stacked},
        {"name": "twin", **stacked, "dtype": "float32"},
        document(["stacked"], "dare_linear", base_model="twin"),
    )


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of three layers, whose heads are stored and tied."""
    folder = tmp_path_factory.mktemp("llamas")
    rng = np.random.default_rng(1)

    def random(*shape: int) -> Any:
        return tensor(rng.normal(0, 0.05, shape), "BF16")

    base = {"model.embed_tokens.weight": random(20, 16), "model.norm.weight": random(16)}
    for i in range(3):
        base[f"model.layers.{i}.mlp.down_proj.weight"] = random(16, 24)
        base[f"model.layers.{i}.input_layernorm.weight"] = random(16)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    }
    save_family(folder, base, config=config)
    return folder


GRAPHS: dict[str, tuple[Callable[[Path], MergeConfig], str, list[str]]] = {
    "two": (two, "folder", ["first"]),
    "diamond": (diamond, "folder", ["root", "right", "left"]),
    "layers": (layers, "llamas", ["a", "b", "stacked", "twin"]),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_bytes_of_separate_runs(
    request: pytest.FixtureRequest, tmp_path: Path, graph: str
) -> None:
    make, family, names = GRAPHS[graph]
    config = make(request.getfixturevalue(family))
    assert [stage.name for stage in config.stages] == names
    out = tmp_path / "out"
    summary = run(config, out, shard_bytes=SHARD_BYTES, keep_stages=True)
    hand = by_hand(config, tmp_path / "hand", shard_bytes=SHARD_BYTES)
    assert contents(out, but=NAMING) == contents(hand, but=NAMING)
    kept = tmp_path / "out.stages"
    assert [path.name for path in sorted(kept.iterdir())] == sorted(names)
    for name in names:
        there, separate = kept / name, tmp_path / "hand" / name
        assert contents(there, but=NAMING) == contents(separate, but=NAMING)
        assert verify(str(there), recompute=2).recomputed
    assert verify(str(out), recompute=4).recomputed
    assert [stage.name for stage in summary.stages] == names
    assert summary.stages_in == str(kept)
    # What was made by hand is gone on with, and the other way round: content counts.
    manifests = [json.loads((at / MANIFEST_NAME).read_bytes()) for at in (out, hand)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    assert manifests[0]["stage"] == manifests[1]["stage"] > 0


def test_stages_are_removed(folder: Path, tmp_path: Path) -> None:
    config, out = diamond(folder), tmp_path / "out"
    summary = run(config, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (out / ".della").exists()
    assert summary.stages_in is None
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    # It says of what the stages were made, the content of every input included.
    assert [stage["name"] for stage in manifest["stages"]] == ["root", "left", "right"]
    digests = {stage["name"]: stage["model_digest"] for stage in manifest["stages"]}
    assert digests == {stage.name: stage.model_digest for stage in summary.stages}
    experts = [one["location"] for one in manifest["stages"][1]["inputs"]]
    assert experts[0] == str(folder / "base")
    assert all(
        shard["content"]
        for stage in manifest["stages"]
        for one in stage["inputs"]
        for shard in one["shards"]
    )
    # Their bytes, read and written, count; seconds and memory are those of the whole.
    assert summary.bytes_written > sum(stage.bytes_written for stage in summary.stages) > 0
    assert summary.elapsed_s >= sum(stage.elapsed_s for stage in summary.stages)
    card = (out / "README.md").read_text()
    recipe = card.partition("```yaml\n")[2].partition("```")[0]
    again = parse_config(recipe)
    assert [stage.name for stage in again.stages] == ["root", "left", "right"]
    assert str(folder) not in card


def test_a_complete_output_needs_no_stage(folder: Path, tmp_path: Path) -> None:
    config, out = diamond(folder), tmp_path / "out"
    first = run(config, out)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}

    before = times()
    again = run(config, out)
    assert again.already_complete
    assert again.stages == ()
    assert again.model_digest == first.model_digest
    # To keep stages, they are made again; the output is looked at and left alone.
    kept = run(config, out, keep_stages=True)
    assert kept.already_complete
    assert [stage.already_complete for stage in kept.stages] == [False] * 3
    assert times() == before
    assert verify(str(out), recompute=3).recomputed
    # They may be moved together with it.
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    out.rename(moved)
    (tmp_path / "out.stages").rename(moved.with_name("moved.stages"))
    assert verify(str(moved), recompute=3).recomputed
    moved.rename(out)
    moved.with_name("moved.stages").rename(tmp_path / "out.stages")
    # A run without the option removes them.
    assert run(config, out).already_complete
    assert not (tmp_path / "out.stages").exists()
    with pytest.raises(InputError, match="--keep-stages makes them again"):
        verify(str(out), recompute=3)
    assert verify(str(out)).model_digest == first.model_digest


@pytest.mark.parametrize("change", ["weight", "seed", "input", "a stage less"])
def test_another_stage_makes_another_output(folder: Path, tmp_path: Path, change: str) -> None:
    """Although the stages are gone: what they were made of is recorded."""
    family = Path(shutil.copytree(folder, tmp_path / "family"))
    config, out = two(family), tmp_path / "out"
    run(config, out)
    words = "stage first"
    if change == "weight":
        expert = replace(config.stages[0].models[0], settings=config.stages[0].models[1].settings)
        models = (expert, *config.stages[0].models[1:])
        config = replace(config, stages=(replace(config.stages[0], models=models),))
    elif change == "seed":
        config = replace(config, stages=(config.stages[0].with_seed(3),))
    elif change == "input":
        path = family / "expert0" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    else:
        config = staged(
            *(
                document([family / "expert0"], "linear", name=name, base_model=family / "base")
                for name in ("first", "other")
            ),
            document(["first", "other"], base_model=family / "base"),
        )
        words = "the list of stages|experts|inputs|models"
    with pytest.raises(OutputError, match=f"holds another merge: .*{words}"):
        run(config, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out"]
    assert not run(config, out, restart=True).already_complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out"]


def test_what_a_complete_output_has_lost_is_made_again(folder: Path, tmp_path: Path) -> None:
    config, out = two(folder), tmp_path / "out"
    run(config, out, shard_bytes=SHARD_BYTES)
    whole = contents(out)
    lost = sorted(out.glob("model-*"))[1]
    lost.unlink()
    summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == summary.num_tasks - 1
    assert [stage.already_complete for stage in summary.stages] == [False]
    assert contents(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_stage_that_was_altered_is_made_again(folder: Path, tmp_path: Path) -> None:
    config, out = two(folder), tmp_path / "out"
    run(config, out, keep_stages=True)
    whole = contents(tmp_path)
    path = tmp_path / "out.stages" / "first" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    summary = run(config, out, keep_stages=True, verify_resumed=True)
    assert [stage.already_complete for stage in summary.stages] == [False]
    assert contents(tmp_path) == whole
    shutil.rmtree(out)
    path.unlink()
    summary = run(config, out, keep_stages=True)
    assert contents(tmp_path) == whole


class Countdown:
    """Kills the run at one of the writes and removals of local outputs, if it gets there."""

    def __init__(self, writes: int) -> None:
        self.left = writes
        self.at = ""

    def run(self, config: MergeConfig, out: Path, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("put", "create", "delete", "delete_state"):
                patch.setattr(LocalStore, name, self._counting(name, getattr(LocalStore, name)))
            run(config, out, workers=1, **options)

    def _counting(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def counted(store: LocalStore, *arguments: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return do(store, *arguments)  # a worker's, which only the death of all would end
            if self.left == 0:
                self.at = f"{name} {arguments[:1]} in {store.root}"
                raise Killed(self.at)
            self.left -= 1
            return do(store, *arguments)

        return counted


def test_killed_at_any_write(folder: Path, tmp_path: Path) -> None:
    """Each time another file is written or removed, the run is killed, and continued."""
    config, place = two(folder), tmp_path / "place"
    out, stage = place / "out", place / "out.stages" / "first"
    run(config, out, shard_bytes=SHARD_BYTES, workers=1)
    expected = contents(place)
    num_made_before = writes = 0
    while True:
        shutil.rmtree(place)
        countdown = Countdown(writes)
        try:
            countdown.run(config, out, shard_bytes=SHARD_BYTES)
        except Killed:
            pass
        else:
            break
        stage_made, all_made = ((at / MANIFEST_NAME).exists() for at in (stage, out))
        summary = run(config, out, shard_bytes=SHARD_BYTES, workers=1)
        assert contents(place) == expected, countdown.at
        assert not stage.parent.exists(), countdown.at
        assert summary.already_complete == all_made, countdown.at
        if not all_made:  # a stage that is complete is not made twice
            assert [one.already_complete for one in summary.stages] == [stage_made], countdown.at
            num_made_before += stage_made
        writes += 1
    assert contents(place) == expected
    assert writes > 50
    assert num_made_before > 15


def test_a_run_that_fails_keeps_what_is_made(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Values that cannot be merged are seen late; the stages before stay, for the next try."""
    base = mixed_base()
    bad = dict(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    bad[name] = tensor(np.full(bad[name].shape, np.nan), "BF16")
    save_checkpoint(tmp_path / "bad", bad, config=FILES)
    documents = [
        document([folder / "expert0"], "linear", name="first", base_model=folder / "base"),
        document(["first", tmp_path / "bad"], name="second", base_model=folder / "base"),
        document(["second"], base_model=folder / "base"),
    ]
    out = tmp_path / "out"
    with pytest.raises(TensorDataError, match="NaN or infinite"):
        run(staged(*documents), out)
    assert [path.name for path in (tmp_path / "out.stages").iterdir()] == ["first"]
    assert (
        f"kept in {tmp_path}/out.stages for the same command to go on from: first." in caplog.text
    )
    assert not out.exists()
    documents[1]["on_nonfinite"] = "zero"
    summary = run(staged(*documents), out)
    assert [stage.already_complete for stage in summary.stages] == [True, False]
    assert not (tmp_path / "out.stages").exists()


def test_a_refusal_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Of values in the very first stage, too, which are seen when it is made."""
    bad = dict(mixed_base())
    bad["scale"] = tensor(np.array(np.inf), "F32")
    save_checkpoint(tmp_path / "bad", bad, config=FILES)
    config = staged(
        document([tmp_path / "bad"], name="first", base_model=folder / "base"),
        document(["first"], base_model=folder / "base"),
    )
    with pytest.raises(TensorDataError, match="NaN or infinite"):
        run(config, tmp_path / "deep" / "er" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_restart_begins_with_the_first_stage(folder: Path, tmp_path: Path) -> None:
    config, out = two(folder), tmp_path / "out"
    run(config, out, keep_stages=True)
    mine = [tmp_path / "out.stages" / "first" / "mine.txt", out / "mine.txt"]
    for path in mine:
        path.write_text("mine")
    summary = run(config.with_seed(5), out, restart=True)
    assert [stage.already_complete for stage in summary.stages] == [False]
    # What is not of the merge stays, and so do its folders.
    assert all(path.read_text() == "mine" for path in mine)
    there = [path for path in (tmp_path / "out.stages").rglob("*") if path.is_file()]
    assert there == mine[:1]
    assert run(config.with_seed(5), tmp_path / "fresh").model_digest == summary.model_digest


def test_options_hold_for_every_stage(folder: Path, tmp_path: Path) -> None:
    config = two(folder)
    seeded = run(config, tmp_path / "seeded", seed=7, shard_bytes=SHARD_BYTES, keep_stages=True)
    written = run(config.with_seed(7), tmp_path / "written", shard_bytes=SHARD_BYTES)
    assert seeded.model_digest == written.model_digest != run(config, tmp_path / "o").model_digest
    assert seeded.num_tasks > 1
    assert seeded.stages[0].num_tasks > 1
    for at in (tmp_path / "seeded", tmp_path / "seeded.stages" / "first"):
        assert json.loads((at / MANIFEST_NAME).read_bytes())["seed"] == 7
    labels = RunOptions(locality=("/data/*:disk=a",)).applied_to(config)
    assert all(merge.node_labels == {"/data/*": "disk=a"} for merge in (labels, *labels.stages))


def test_two_runs_at_once(folder: Path, tmp_path: Path) -> None:
    config, out = two(folder), tmp_path / "out"
    store = open_output_store(str(tmp_path / "out.stages"))
    with store.lock(owner()), pytest.raises(OutputError, match="is being written by another run"):
        run(config, out)
    assert not out.exists()
    assert not run(config, out).already_complete
    assert not (tmp_path / "out.stages").exists()


def test_a_watch_sees_every_stage(folder: Path, tmp_path: Path) -> None:
    goals: list[Goal] = []
    options = RunOptions(device="cpu")
    mapping = diamond(folder).normalized()
    with JsonLines(str(tmp_path / "log.json")):
        summary = della_dist.merge(
            mapping, tmp_path / "out", options, watch=lambda goal, look: goals.append(goal)
        )
    assert [goal.stage for goal in goals] == [
        "stage 1 of 4: root",
        "stage 2 of 4: right",
        "stage 3 of 4: left",
        "stage 4 of 4: the output",
    ]
    assert [goal.num_tasks for goal in goals[:-1]] == [s.num_tasks for s in summary.stages]
    events = [json.loads(line) for line in (tmp_path / "log.json").read_text().splitlines()]
    assert events[0]["num_merges"] == 4
    told = [(e["event"], e["stage"]) for e in events if e["event"] in ("plan", "end")]
    made = ["root", "right", "left", ""]
    assert told == [(kind, name) for name in made for kind in ("plan", "end")]
    digests = [e["model_digest"] for e in events if e["event"] == "end"]
    assert digests == [s.model_digest for s in (*summary.stages, summary)]


@pytest.mark.s3
def test_on_an_object_store(folder: Path, tmp_path: Path, s3_bucket: str) -> None:
    root = f"s3://{s3_bucket}/some"
    for name in ("base", "expert0", "expert1", "expert2"):
        upload(folder / name, f"{root}/in/{name}")

    def remote(merge: MergeConfig) -> MergeConfig:
        return merge.with_locations(
            {at: at.replace(str(folder), f"{root}/in") for at in merge.locations()}
        )

    local = two(folder)
    config = replace(remote(local), stages=tuple(map(remote, local.stages)))
    run(local, tmp_path / "out", shard_bytes=SHARD_BYTES)
    expected = contents(tmp_path / "out", but=NAMING)
    for keep_stages in (True, False):
        # Again, from a complete output and stages that are kept.
        summary = run(config, f"{root}/out", shard_bytes=SHARD_BYTES, keep_stages=keep_stages)
        assert summary.already_complete == (not keep_stages)
        everything = open_output_store(root).list()
        stages = {key.split("/")[1] for key in everything if key.startswith("out.stages/")}
        assert stages == ({"first"} if keep_stages else set())
    found = contents(download(f"{root}/out", tmp_path / "down"), but=NAMING)
    assert found == expected
    again = run(config, f"{root}/out", shard_bytes=SHARD_BYTES)
    assert again.already_complete
    with pytest.raises(OutputError, match="whole bucket"):
        run(config, f"s3://{s3_bucket}")
    store = open_output_store(f"{root}/out")
    store.delete(store.list("model-00002")[0])
    partly = run(config, f"{root}/out", shard_bytes=SHARD_BYTES)
    assert partly.tasks_resumed == partly.num_tasks - 1


def test_on_any_store(folder: Path, tmp_path: Path) -> None:
    local = run(two(folder), tmp_path / "out")
    remote = run(two(folder), "memory://stages-e2e/out")
    assert remote.model_digest == local.model_digest
    assert not open_output_store("memory://stages-e2e/out.stages").list()


def test_from_the_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Checkpoints on the Hub, in stages too: downloaded first, and pinned."""
    for name in ("base", "expert0"):
        add_commit(hub.folder, f"org/{name}", files_of(folder / name))
    config = staged(
        document(["org/expert0"], name="first", base_model="org/base"),
        document(["first"], base_model="org/base"),
    )
    done = run(config, tmp_path / "out", download=True)
    assert (tmp_path / "hf" / "hub" / "models--org--expert0").is_dir()
    local = staged(
        document([folder / "expert0"], name="first", base_model=folder / "base"),
        document(["first"], base_model=folder / "base"),
    )
    assert done.model_digest == run(local, tmp_path / "local").model_digest
    (stage,) = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())["stages"]
    assert re.fullmatch(r"hf://org/base@[0-9a-f]{40}", stage["inputs"][0]["location"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/expert0\n" in card


# ---------------------------------------------------------------- before any work


def refusals(folder: Path) -> dict[str, tuple[MergeConfig, type[Exception], str]]:
    """Return what is wrong with a later stage, and what is said of it."""
    base, expert = folder / "base", folder / "expert0"
    first = document([expert], "linear", name="first", base_model=base)
    filters = {"density": [{"filter": "no_such_layer", "value": 0.1}, {"value": 0.5}]}
    wide = {name: t for name, t in mixed_base().items() if name != "column"}
    wide["column"] = tensor(np.zeros((400, 2)), "BF16")
    if not (folder / "wide").exists():
        save_checkpoint(folder / "wide", wide, config=FILES)
    return {
        "a shape": (
            staged(first, document(["first", folder / "wide"], base_model=base)),
            InputError,
            "column",
        ),
        "a filter": (
            staged(first, document(["first"], base_model=base, parameters=filters)),
            ConfigError,
            "no_such_layer",
        ),
        "layers": (
            staged(
                first,
                {
                    "merge_method": "passthrough",
                    "slices": [{"sources": [{"model": "first", "layer_range": [0, 99]}]}],
                },
            ),
            InputError,
            "layers",
        ),
        "a missing input": (
            staged(first, document(["first", folder / "nowhere"], base_model=base)),
            InputError,
            "nowhere does not exist",
        ),
        "a typing error": (
            staged(
                first,
                document(["firts"], name="second", base_model=base),
                document(["second"], base_model="first"),
            ),
            ConfigError,
            r"document 2 \(second\): the model 'firts' is neither the name of a document nor a "
            r"path that exists \(did you mean first\)",
        ),
        "nobody's name": (
            staged(first, document(["x"], base_model="first")),
            ConfigError,
            "documents are called first",
        ),
        "a stage for nothing": (
            staged(first, document([expert], base_model=base)),
            ConfigError,
            r"document 1 \(first\): no document names it",
        ),
    }


REFUSALS = ["a shape", "a filter", "layers", "a missing input", "a typing error", "nobody's name"]


@pytest.mark.parametrize("what", [*REFUSALS, "a stage for nothing"])
def test_refused_before_any_work(folder: Path, tmp_path: Path, what: str) -> None:
    config, kind, words = refusals(folder)[what]
    out = tmp_path / "deep" / "out"
    with pytest.raises(kind, match=words):
        run(config, out)
    with pytest.raises(kind, match=words):
        della_dist.plan(config)
    assert list(tmp_path.iterdir()) == []


def test_several_problems_are_one_error(folder: Path, tmp_path: Path) -> None:
    config = staged(
        document(["y"], "linear", name="first"),
        document(["x"], "linear", name="second"),
        document(["first"], "linear"),
    )
    with pytest.raises(
        ConfigError, match=r"^3 problems\. \(1\) .*'y'.* \(2\) .*'x'.* \(3\) .*keep"
    ):
        run(config, tmp_path / "out")


def test_a_name_that_is_also_a_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = two(folder)
    (tmp_path / "first").mkdir()
    with pytest.raises(ConfigError, match=r"there is a path of that name. Rename .* \./first"):
        run(config, "out")
    (tmp_path / "first").rmdir()
    # Relative outputs, whose stages look like something on the Hub.
    run(config, "out", keep_stages=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.stages"]
    # One that nobody names is not in doubt: it may be what its output is called.
    named = staged(
        document([folder / "expert0"], "linear", name="a"), document(["a"], "linear", name="b")
    )
    assert not run(named, "b").already_complete
    assert run(named, "b").already_complete


def test_a_stage_for_nothing_can_be_kept(folder: Path, tmp_path: Path) -> None:
    config = staged(
        document([folder / "expert0"], "linear", name="aside"),
        document([folder / "expert1"], "linear"),
    )
    run(config, tmp_path / "out", keep_stages=True)
    assert (
        load_tensors(tmp_path / "out.stages" / "aside").keys()
        == load_tensors(tmp_path / "out").keys()
    )


def test_outputs_are_no_inputs_of_other_stages(folder: Path, tmp_path: Path) -> None:
    family = Path(shutil.copytree(folder, tmp_path / "family"))
    before = contents(family)
    for out in (family / "expert0" / "out", family / "expert0"):
        with pytest.raises(OutputError, match=r"overlap|would overwrite"):
            run(two(family), out)
    assert contents(family) == before
    with pytest.raises(OutputError, match="root of the file system"):
        run(two(family), "/")


def test_room_for_all_stages_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for each, and not for both."""
    config = two(folder)
    size = sum(p.stat().st_size for p in (folder / "base").iterdir())
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: (8 << 20) + int(1.5 * size))
    with pytest.raises(StorageError, match="1 stage included"):
        run(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def path(folder: Path, tmp_path: Path) -> Path:
    """Return the file of a configuration with two stages."""
    base = folder / "base"
    path = tmp_path / "merge.yaml"
    path.write_text(
        text_of(
            document([folder / "expert0"], "linear", name="one", base_model=base),
            document(["one", folder / "expert1"], name="two", base_model=base),
            document(["two", "one"], base_model=base),
        )
    )
    return path


def test_what_plan_prints(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for where in ((), (out,)):
        shown = invoke("plan", path, *where)
        assert shown.exit_code == 0, shown.output
        lines = shown.stdout.splitlines()
        assert [line for line in lines if line.startswith("stage")] == [
            "stage   1 of 3: one",
            "stage   2 of 3: two, of one",
            "stage   3 of 3: the output, of two, one",
        ]
        assert sum(line.startswith("output  ") for line in lines) == 3
        (total,) = (line for line in lines if line.startswith("total "))
        assert "all of it there at the end" in total
        assert lines[-1] == "checks  passed; nothing was written"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["merge.yaml"]
    plan = json.loads(invoke("plan", path, out, "--json").stdout)
    assert [stage["name"] for stage in plan["stages"]] == ["one", "two"]
    assert [stage["needs"] for stage in plan["stages"]] == [[], ["one"]]
    assert plan["needs"] == ["two", "one"]
    merges = [*plan["stages"], plan]
    for key in ("bytes_to_read", "bytes_to_write"):
        assert plan["total"][key] == sum(merge[key] for merge in merges)
    buffers = max(merge["buffers_mem"] for merge in merges)
    records = sum(merge["records_mem"] for merge in merges)
    assert plan["total"]["projected_mem"] == buffers + records
    assert "total" not in plan["stages"][0]
    # It is what the merge then does.
    summary = json.loads(invoke("merge", path, out, "--json", "--device", "cpu").stdout)
    assert summary["bytes_read"] == plan["total"]["bytes_to_read"]
    assert summary["bytes_written"] == plan["total"]["bytes_to_write"]
    assert [stage["name"] for stage in summary["stages"]] == ["one", "two"]
    assert summary["stages_in"] is None
    assert "state   " in invoke("plan", path, out).stdout
    assert f"{out} is complete; merge would do nothing" in invoke("plan", path, out).stdout


def test_what_merge_prints(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("merge", path, out, "--keep-stages", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert [line for line in done.stderr.splitlines() if line.startswith("stage ")] == [
        "stage 1 of 3: one",
        "stage 2 of 3: two",
        "stage 3 of 3: the output",
    ]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("stage   one: merged 14 of 14 tensors")
    assert lines[1].startswith("stage   two: merged 14 of 14 tensors")
    assert lines[2] == f"stages  kept in {out}.stages"
    assert lines[3].startswith("merged 14 of 14 tensors")
    again = invoke("merge", path, out).stdout.splitlines()
    assert again[:4] == [
        "stage   one: was complete already",
        "stage   two: was complete already",
        "stages  removed",
        f"{out} is complete already; nothing was done.",
    ]
    assert_paragraph(invoke("verify", out, "--recompute", "1"), 2, "one, two", "--keep-stages")


def test_a_wrong_document_is_named(path: Path, tmp_path: Path) -> None:
    path.write_text(path.read_text().replace("merge_method: linear", "merge_method: liner", 1))
    shown = invoke("merge", path, tmp_path / "out")
    assert_paragraph(shown, 2, f"{path}: document 1 (one): `merge_method` is 'liner'", "linear")


def unfinished(folder: Path, tmp_path: Path) -> MergeConfig:
    """Make the stage of `two` in ``out.stages``, and fail at the output; return `two`."""
    config = two(folder)
    tensors = load_tensors(folder / "expert2")
    name = next(n for n, t in tensors.items() if t.dtype == "F32")
    bad = np.full(tensors[name].shape, np.nan)
    save_checkpoint(tmp_path / "bad", {**tensors, name: tensor(bad, "F32")}, config=FILES)
    where = {p: str(tmp_path / "bad") if p.endswith("expert2") else p for p in config.locations()}
    with pytest.raises(TensorDataError):
        run(config.with_locations(where), tmp_path / "out", shard_bytes=SHARD_BYTES)
    return config


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_stage_that_is_there_is_read_whole(
    folder: Path, tmp_path: Path, is_damaged: bool
) -> None:
    """It is removed in the end, and nothing could find out any more."""
    config = unfinished(folder, tmp_path)
    stage = tmp_path / "out.stages" / "first"
    shard = sorted(stage.glob("*.safetensors"))[-1]
    if is_damaged:
        data = bytearray(shard.read_bytes())
        data[-8:] = b"\x01" * 8
        shard.write_bytes(data)
    done = run(config, tmp_path / "out", shard_bytes=SHARD_BYTES)
    (first,) = done.stages
    assert first.already_complete is not is_damaged
    assert first.num_tasks - first.tasks_resumed == int(is_damaged)
    hand = by_hand(config, tmp_path / "hand", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out", but=NAMING) == contents(hand, but=NAMING)


def test_the_stages_folder_is_an_output(folder: Path, tmp_path: Path) -> None:
    """Of another merge, whose records are not ours."""
    single = replace(two(folder).stages[0], name=None)
    run(single, tmp_path / "out.stages")
    with pytest.raises(OutputError, match="another merge lies there"):
        run(two(folder), tmp_path / "out")
    assert run(single, tmp_path / "out.stages").already_complete


def test_documents_that_draw_the_same_words(folder: Path) -> None:
    def said(config: MergeConfig) -> bool:
        notes = della_dist.plan(config).notes
        return any("drop the same elements" in note for note in notes)

    assert not said(two(folder))  # one needs the other
    left, right = (
        document([folder / f"expert{i}"], "dare_linear", name=f"s{i}", base_model=folder / "base")
        for i in range(2)
    )
    both = document(["s0", "s1"], "linear")
    assert said(staged(left, right, both))
    assert not said(staged(left, {**right, "seed": 1}, both))
    assert said(staged(left, {**right, "seed": 1}, both).with_seed(7))
