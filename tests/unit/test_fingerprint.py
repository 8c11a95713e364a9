"""What a run is: everything the output depends on is in its identity, and nothing else."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import config_from_mapping
from della_dist.planning.build import MergePlan, build_plan
from della_dist.planning.fingerprint import (
    copied_inputs,
    differences,
    explain_difference,
    fingerprint,
    identity,
    is_open,
    stage_differences,
)
from della_dist.specs.checkpoint import (
    CheckpointIndex,
    FileVersion,
    ShardFile,
    TensorEntry,
)

TENSORS = {
    "model.embed_tokens.weight": (10, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}


def version(mtime_ns: int = 1, ctime_ns: int = 2, inode: int = 3) -> str:
    return str(FileVersion(mtime_ns, ctime_ns, inode))


def checkpoint(location: str, **changes: Any) -> CheckpointIndex:
    tensors = {
        name: TensorEntry(name, "BF16", shape, 0, 8, 8 + 2 * shape[0])
        for name, shape in TENSORS.items()
    }
    shard = ShardFile("model.safetensors", 100, version(), "0" * 64, f"content of {location}")
    shard = replace(shard, **changes)
    return CheckpointIndex(location, (shard,), tensors, ("config.json",))


def settings(**keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "della",
        "base_model": "/base",
        "models": [{"model": "/a"}, {"model": "/b"}],
        "parameters": {"density": 0.5},
        **keys,
    }


def plan(
    keys: dict[str, Any] | None = None,
    shard_bytes: int | None = None,
    base: CheckpointIndex | None = None,
    expert: CheckpointIndex | None = None,
) -> MergePlan:
    config = config_from_mapping(settings() if keys is None else keys)
    experts = (checkpoint("/a"), expert or checkpoint("/b"))
    return build_plan(config, base or checkpoint("/base"), experts, shard_bytes=shard_bytes)


REFERENCE = identity(plan())

TIED = replace(checkpoint("/base"), documents={"config.json": {"tie_word_embeddings": True}})

CHANGES: dict[str, tuple[Callable[[], MergePlan], str]] = {
    "seed": (lambda: plan(settings(seed=1)), "config.seed was 0, now 1"),
    "density": (
        lambda: plan(settings(parameters={"density": 0.25})),
        "config.models[0].parameters.density was 0.5, now 0.25",
    ),
    "method": (
        lambda: plan(settings(merge_method="ties")),
        'config.merge_method was "della", now "ties"',
    ),
    "dtype": (lambda: plan(settings(out_dtype="float32")), "config.out_dtype was null"),
    "nonfinite": (lambda: plan(settings(on_nonfinite="zero")), "config.on_nonfinite was"),
    "shards": (lambda: plan(shard_bytes=50), "the shard size (--shard-size) was 268435456, now 50"),
    "size": (
        lambda: plan(expert=checkpoint("/b", size_bytes=101)),
        "/b/model.safetensors: size_bytes was 100, now 101",
    ),
    "content": (
        lambda: plan(expert=checkpoint("/b", sample="other")),
        '/b/model.safetensors: content was "content of /b", now "other"',
    ),
    "an object": (
        lambda: plan(expert=checkpoint("/b", version="etag", sample="")),
        "/b/model.safetensors: version was null",
    ),
    "arithmetic": (
        lambda: replace(plan(), arithmetic={"numpy": "2.1"}),
        "this kind of machine was null",
    ),
    "header": (
        lambda: plan(base=checkpoint("/base", header_sha256="1" * 64)),
        "/base/model.safetensors: header_sha256 was",
    ),
    "name": (
        lambda: plan(expert=checkpoint("/b", name="other.safetensors")),
        '/b/other.safetensors: name was "model.safetensors"',
    ),
    "more shards": (
        lambda: plan(
            expert=replace(checkpoint("/b"), shards=checkpoint("/b").shards * 2),
        ),
        "/b had 1 shards, now 2",
    ),
    # config.json is in no header, and yet it decides which tensors are merged.
    "tied": (lambda: plan(base=TIED, expert=replace(TIED, location="/b")), "lm_head.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_run(change: str) -> None:
    make, words = CHANGES[change]
    if change == "tied":
        tied = [replace(checkpoint(place), documents=TIED.documents) for place in ("/a", "/b")]
        changed = identity(build_plan(config_from_mapping(settings()), TIED, tuple(tied)))
    else:
        changed = identity(make())
    assert fingerprint(changed) != fingerprint(REFERENCE)
    assert any(words in line for line in differences(REFERENCE, changed))


def test_order_of_the_experts_counts() -> None:
    keys = settings(models=[{"model": "/b"}, {"model": "/a"}])
    swapped = build_plan(
        config_from_mapping(keys), checkpoint("/base"), (checkpoint("/b"), checkpoint("/a"))
    )
    assert fingerprint(identity(swapped)) != fingerprint(REFERENCE)


def test_what_does_not_change_the_run() -> None:
    # The same thing said in other words, with comments and notes of its own.
    keys = settings(parameters={"drop_rate": 0.5, "int8_mask": True}, chat_template="auto")
    assert identity(plan(keys)) == REFERENCE
    assert identity(plan(settings(), shard_bytes=256 << 20)) == REFERENCE
    assert fingerprint(identity(plan())) == fingerprint(REFERENCE)


@pytest.mark.parametrize(
    "expert",
    [
        checkpoint("/b", version=version(ctime_ns=9)),  # another mode, or a link more
        checkpoint("/b", version=version(ctime_ns=9, inode=9)),  # a copy that kept its time
        replace(checkpoint("/b", version=version(mtime_ns=9)), location="/elsewhere"),
    ],
)
def test_what_only_the_file_system_says(expert: CheckpointIndex) -> None:
    place = expert.location
    same = identity(plan(settings(models=[{"model": "/a"}, {"model": place}]), expert=expert))
    assert same != REFERENCE
    assert differences(REFERENCE, same) == []
    assert fingerprint(same) == fingerprint(REFERENCE)


def test_file_that_was_written_to() -> None:
    # The samples are equal, but they need not see what was written.
    written = identity(plan(expert=checkpoint("/b", version=version(mtime_ns=9, ctime_ns=9))))
    (line,) = differences(REFERENCE, written)
    assert line.startswith("/b/model.safetensors: it was written to since (last at 1970-01-01T")
    assert copied_inputs(REFERENCE, written) == ["/b/model.safetensors"]
    late = identity(plan(expert=checkpoint("/b", version=version(mtime_ns=10**30))))
    (line,) = differences(REFERENCE, late)
    assert f"{10**30} ns" in line


def test_file_that_was_saved_again() -> None:
    """Another file, at the same place: on this machine it is another input, elsewhere a copy."""
    saved = identity(plan(expert=checkpoint("/b", version=version(mtime_ns=9, inode=9))))
    (line,) = differences(REFERENCE, saved)
    assert line.startswith("/b/model.safetensors: it was written to since")
    elsewhere = {**saved, "machine": "another"}
    assert differences(REFERENCE, elsewhere) == []
    assert fingerprint(elsewhere) == fingerprint(REFERENCE)
    assert copied_inputs(REFERENCE, elsewhere) == ["/b/model.safetensors"]
    kept = identity(plan(expert=checkpoint("/b", version=version(ctime_ns=9, inode=9))))
    assert copied_inputs(REFERENCE, kept) == []


def test_the_name_of_the_machine_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    named = identity(plan())
    assert "secret" not in json.dumps(named)
    assert named["machine"] != REFERENCE["machine"]


def test_object_with_another_etag() -> None:
    old, new = (
        identity(plan(expert=checkpoint("s3://b", version=etag, sample=""))) for etag in "12"
    )
    assert differences(old, new) == ['s3://b/model.safetensors: version was "1", now "2"']
    assert fingerprint(old) != fingerprint(new)


def test_paths_mean_the_same_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    keys = settings(base_model="base", models=[{"model": "a"}, {"model": "./b"}])
    found = identity(plan(keys, base=checkpoint("base"), expert=checkpoint("b")))
    assert found["config"]["base_model"] == str(tmp_path / "base")
    assert [m["model"] for m in found["config"]["models"]] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    assert found["inputs"][0]["location"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({}, "output_version was null, now 4"),
        ({**REFERENCE, "output_version": 1, "inputs": 7}, "output_version was 1, now 4"),
        ({**REFERENCE, "inputs": 7}, "damaged"),
        ({**REFERENCE, "inputs": [{}, {}, {}]}, "damaged"),
        ({**REFERENCE, "config": None}, "damaged"),
        ({**REFERENCE, "inputs": REFERENCE["inputs"][:2]}, "there were 2 inputs, now 3"),
    ],
)
def test_records_that_cannot_be_compared(recorded: dict[str, Any], words: str) -> None:
    (line,) = differences(recorded, REFERENCE)
    assert words in line


def test_survives_json() -> None:
    # It is compared with what a file says.
    read = json.loads(json.dumps(REFERENCE))
    assert read == REFERENCE
    assert fingerprint(read) == fingerprint(REFERENCE)
    assert differences(read, REFERENCE) == []


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    turned = {key: REFERENCE[key] for key in reversed(REFERENCE)}
    assert list(turned) != list(REFERENCE)
    assert fingerprint(turned) == fingerprint(REFERENCE)
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(REFERENCE))


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a was 1, now 2"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b[1] was 2, now 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a was [1], now [1, 2]"]),
        ({"a": 1}, {"b": 1}, ["a was 1, now null", "b was null, now 1"]),
        ({"a": {"b": 1}}, {"a": None}, ['a was {"b": 1}, now null']),
        ({"a": "x"}, {"a": 7}, ['a was "x", now 7']),
        ({"z": 1, "a": 1}, {"z": 2, "a": 2}, ["a was 1, now 2", "z was 1, now 2"]),
    ],
)
def test_differences(old: Any, new: Any, lines: list[str]) -> None:
    assert explain_difference(old, new) == lines


def test_differences_are_short() -> None:
    (line,) = explain_difference({"a": "x" * 1000}, {"a": ["y"] * 1000})
    assert len(line) < 200
    assert line.count("...") == 2


@pytest.mark.parametrize(("old", "new"), [(True, 1), (1, 1.0), (0, False)])
def test_values_that_python_calls_equal(old: Any, new: Any) -> None:
    # JSON tells them apart, and so does the fingerprint: a difference that is refused must be told.
    one, other = ({**REFERENCE, "shard_bytes": value} for value in (old, new))
    assert fingerprint(one) != fingerprint(other)
    assert differences(one, other) != []


def stage(**changes: Any) -> CheckpointIndex:
    """Return an expert that the same run makes."""
    return replace(checkpoint("/b", **changes), is_stage=True)


TO_BE_MADE = {"version": "", "sample": ""}


def test_times_of_a_stage_say_nothing() -> None:
    """It may have been made again; an object's ETag is its content."""
    made, again = (identity(plan(expert=stage(version=version(i, i, i)))) for i in (3, 9))
    assert differences(made, again) == []
    assert differences(made, REFERENCE) == []
    assert copied_inputs(made, again) == []
    assert fingerprint(made) == fingerprint(again) == fingerprint(REFERENCE)
    altered = identity(plan(expert=stage(sample="another")))
    assert any(".content" in line or "content was" in line for line in differences(made, altered))
    etags = (identity(plan(expert=stage(sample="", version=etag))) for etag in ("a", "b"))
    assert len(differences(*etags)) == 1


def test_a_stage_that_is_not_made_yet() -> None:
    """Its layout is compared, its content is not, nor what only that could tell."""
    planned = identity(plan(expert=stage(**TO_BE_MADE)))
    made = identity(plan(expert=stage()))
    assert is_open(planned)
    assert not is_open(made)
    told = {**made, "twins": {"x": "y"}, "untied": ["lm_head.weight"]}
    for recorded, now in ((made, planned), (planned, made), (planned, planned), (told, planned)):
        assert differences(recorded, now) == []
    other = identity(plan(settings(seed=1), expert=stage(**TO_BE_MADE)))
    assert differences(made, other) == ["config.seed was 0, now 1"]
    larger = identity(plan(expert=stage(**TO_BE_MADE, size_bytes=101)))
    assert differences(made, larger) == ["/b/model.safetensors: size_bytes was 100, now 101"]
    # Where all content is known, what follows from it counts.
    assert differences(told, made) != []


def record(name: str, of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "location": f"/out.stages/{name}", "model_digest": "0", **of, **more}


def test_stages_are_compared_one_by_one() -> None:
    seeded = identity(plan(settings(seed=1)))
    recorded = [record("one", REFERENCE), record("two", REFERENCE)]
    elsewhere = [{**r, "location": "/x", "model_digest": None} for r in recorded]
    assert stage_differences(recorded, elsewhere) == []
    changed = [recorded[0], record("two", seeded)]
    assert stage_differences(recorded, changed) == ["stage two: config.seed was 0, now 1"]
    (line,) = stage_differences(recorded, recorded[:1])
    assert line == 'the list of stages was ["one", "two"], now ["one"]'


@pytest.mark.parametrize("recorded", [[None], [{}], ["one"], [{"name": "one"}], 3, None])
def test_records_of_stages_that_are_damaged(recorded: Any) -> None:
    assert stage_differences(recorded, [record("one", REFERENCE)]) != []
