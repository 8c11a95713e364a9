"""What a run is: the identity under which committed work may be continued.

An identity says where the inputs lie, for `verify --recompute`, and what their file system says of
them. Whether two identities are the same merge, and the fingerprint, rest on the content alone: a
copy at another place, or on another machine, continues a run. But what was written to since, at the
same place of the same machine, is another input, even where its samples do not show it.

Of a stage, which the run makes itself and may have to make again, times say nothing. Where it is
still to be made, its layout is known and no content: what made it is compared instead.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from della_dist.locations import absolute
from della_dist.planning.build import MergePlan
from della_dist.specs.checkpoint import CheckpointIndex, FileVersion, ShardFile

#: Raised whenever the same inputs and configuration would give other output bytes than before.
OUTPUT_VERSION = 4
#: Raised in its place where that is so with one method alone; 1 of others.
METHOD_VERSIONS: Mapping[str, int] = {
    "model_stock": 2,
    "nuslerp": 2,
    "wudi": 3,
}


def identity(plan: MergePlan) -> dict[str, Any]:
    """Return everything the output bytes depend on, as a JSON-able mapping.

    Paths in it mean the same in every working directory.
    """
    places = [checkpoint.location for checkpoint in plan.inputs]
    where = {location: absolute(location) for location in plan.config.locations()}
    config = plan.config.with_locations(where).normalized()
    method_version = METHOD_VERSIONS.get(plan.config.merge_method)
    return {
        "output_version": OUTPUT_VERSION,
        **({} if method_version is None else {"method_version": method_version}),
        "config": config,
        "shard_bytes": plan.shard_bytes,
        "stage": plan.stage,  # by the manifests of the inputs, whose headers do not show it
        # By config.json and by the bytes of tensors, not by any header:
        "tied_left_out": list(plan.ties.left_out),
        "untied": list(plan.ties.untied),
        "heads_from_embedding": [
            [places.index(location), head, source] for location, head, source in plan.ties.filled
        ],
        "twins": dict(plan.twins),
        # By the files of the tokenizers:
        **({} if plan.alignment is None else {"rows": plan.alignment.digest()}),
        **({} if not plan.parts[0].adapted else {"adapted": _adapted(plan)}),
        **({} if plan.adapter is None else {"adapter": plan.adapter.digest()}),
        **({} if not plan.layouts else {"layouts": _layouts(plan)}),
        **({} if not plan.arithmetic else {"arithmetic": dict(plan.arithmetic)}),
        "companions": dict(plan.companions),
        "machine": _machine(),
        "inputs": [
            {
                "role": "base" if checkpoint is plan.base else "expert",
                "location": absolute(checkpoint.location),
                "shards": [_shard(checkpoint, shard) for shard in checkpoint.shards],
            }
            for checkpoint in plan.inputs
        ],
    }


def _adapted(plan: MergePlan) -> dict[str, Any]:
    """Return which inputs the models with adapters are made of, by number, and what these do."""
    return {
        str(number): {"inputs": list(one.inputs), "changes": one.digest()}
        for number, one in sorted(plan.parts[0].adapted.items())
    }


def _layouts(plan: MergePlan) -> dict[str, str]:
    """Return which inputs have other names in their files, and a digest of what they are here."""
    return {str(number): digest for number, digest in sorted(plan.layouts.items())}


def _machine() -> str:
    """Return what tells this machine from others, without its name: manifests are published."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:16]


def _shard(checkpoint: CheckpointIndex, shard: ShardFile) -> dict[str, Any]:
    has_times = FileVersion.parse(shard.version) is not None
    return {
        "name": shard.name,
        "size_bytes": shard.size_bytes,
        "version": "" if checkpoint.is_stage and has_times else shard.version,
        "header_sha256": shard.header_sha256,
        "content": shard.sample,
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of what counts in an identity."""
    inputs = [
        {"role": i["role"], "shards": [_content(shard) for shard in i["shards"]]}
        for i in identity["inputs"]
    ]
    text = json.dumps({**_merge(identity), "inputs": inputs}, **_CANONICAL)
    return hashlib.sha256(text.encode()).hexdigest()


_CANONICAL: Mapping[str, Any] = {"sort_keys": True, "separators": (",", ":")}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for everything that makes two identities different merges.

    Parameters
    ----------
    recorded
        An identity from a file, perhaps of another version of the program.
    now
        That of the plan.
    """
    version = recorded.get("output_version")
    if version != now["output_version"]:  # nothing else can be compared
        return explain_difference(version, now["output_version"], "output_version")
    try:
        unknown = _BY_CONTENT if is_open(recorded) or is_open(now) else ()
        old, new = (
            {key: value for key, value in _merge(one).items() if key not in unknown}
            for one in (recorded, now)
        )
        return [
            *explain_difference(old, new),
            *input_differences(
                recorded["inputs"],
                now["inputs"],
                same_machine=recorded.get("machine") == now["machine"],
            ),
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        return ["what is recorded of it is damaged"]


#: What of an identity the bytes of the inputs decide.
_BY_CONTENT = ("tied_left_out", "untied", "heads_from_embedding", "twins")


def is_open(identity: Mapping[str, Any]) -> bool:
    """Return whether the content of some input is not known, since it is still to be made."""
    return any(_is_open(shard) for one in identity["inputs"] for shard in one["shards"])


def _is_open(shard: Mapping[str, Any]) -> bool:
    return not shard["content"] and not shard["version"]


def stage_differences(
    recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return one line for everything that makes two lists of stages others (`MergePlan.stages`)."""
    try:
        were, are = ([stage["name"] for stage in stages] for stages in (recorded, now))
    except (LookupError, TypeError):
        return ["what is recorded of its stages is damaged"]
    if were != are:
        return explain_difference(were, are, "the list of stages")
    return [
        f"stage {new['name']}: {line}"
        for old, new in zip(recorded, now, strict=True)
        for line in differences(old, new)
    ]


def copied_inputs(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the paths of files that are taken for those recorded by their samples alone.

    The identities are those of one merge. A copy that kept its time is no surprise.
    """
    return [
        f"{new['location']}/{b['name']}"
        for old, new in zip(recorded["inputs"], now["inputs"], strict=True)
        for a, b in zip(old["shards"], new["shards"], strict=True)
        if _written_since(a, b)
    ]


def input_differences(
    recorded: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    *,
    same_machine: bool = False,
) -> list[str]:
    """Return one line for everything in which two lists of inputs differ.

    Parameters
    ----------
    recorded, now
        Of two identities.
    same_machine
        Whether a path is the same place in both.
    """
    if len(recorded) != len(now):
        return [f"there were {len(recorded)} inputs, now {len(now)}"]
    lines = []
    for old, new in zip(recorded, now, strict=True):
        where = new["location"]
        lines += explain_difference(old["role"], new["role"], f"{where}: role")
        if len(old["shards"]) != len(new["shards"]):
            lines.append(f"{where} had {len(old['shards'])} shards, now {len(new['shards'])}")
            continue
        for a, b in zip(old["shards"], new["shards"], strict=True):
            path = f"{where}/{b['name']}"
            known = {} if not (_is_open(a) or _is_open(b)) else {"version": "", "content": ""}
            found = explain_difference({**_content(a), **known}, {**_content(b), **known})
            how = _written_since(a, b, copies=same_machine)
            if how and not found and old["location"] == where:
                found = [how]
            lines += [f"{path}: {line}" for line in found]
    return lines


def _written_since(
    old: Mapping[str, Any], new: Mapping[str, Any], *, copies: bool = True
) -> str | None:
    """Return how a file was written to since, or only the very same one unless `copies` count."""
    before, after = FileVersion.parse(old["version"]), FileVersion.parse(new["version"])
    if before is None or after is None:
        return None
    return after.written_since(before) if copies else after.rewritten(before)


def _merge(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what counts but for the inputs: where these lie is their own matter."""
    others = ("inputs", "machine", "name", "location", "model_digest")
    merge = {key: value for key, value in identity.items() if key not in others}
    config = dict(merge["config"])
    base = config["base_model"]
    config["base_model"] = base["rename"] if isinstance(base, dict) else base is not None
    places = [one["location"] for one in identity["inputs"]]
    if "tokenizer" in config:
        config["tokenizer"] = _without_places(config["tokenizer"], places)
    if "modules" in config:
        config["modules"] = {
            name: _by_number(module, places) for name, module in config["modules"].items()
        }
    elif "slices" in config:
        config = _by_number(config, places)
    else:
        config["models"] = [{**model, "model": None} for model in config["models"]]
    return {**merge, "config": config}


def _by_number(module: Mapping[str, Any], places: Sequence[str]) -> dict[str, Any]:
    """Return slices with the number of a checkpoint instead of where it lies."""
    slices = [
        {**part, "sources": [{**s, "model": places.index(s["model"])} for s in part["sources"]]}
        for part in module["slices"]
    ]
    return {**module, "slices": slices}


def _without_places(value: Any, places: Sequence[str]) -> Any:  # noqa: ANN401
    """Return a JSON-able value with the number of a checkpoint instead of where it lies."""
    if isinstance(value, dict):
        return {key: _without_places(inner, places) for key, inner in value.items()}
    return places.index(value) if value in places else value


def _content(shard: Mapping[str, Any]) -> dict[str, Any]:
    """Return what counts of a shard: of a file its samples, of an object its ETag."""
    return {k: v for k, v in shard.items() if k != "version" or not shard["content"]}


def explain_difference(old: Any, new: Any, where: str = "") -> list[str]:  # noqa: ANN401
    """Return one line for everything in which two JSON-able values differ."""
    if type(old) is type(new) and isinstance(old, dict):
        lines = []
        # An adapter is one file, whose size follows from its ranks.
        follows = {"shard_bytes"} if "adapter" in old and "adapter" in new else set()
        for key in sorted((old.keys() | new.keys()) - follows):
            inner = f"{where}.{key}" if where else str(key)
            lines += explain_difference(old.get(key), new.get(key), inner)
        return lines
    if type(old) is type(new) and isinstance(old, list) and len(old) == len(new):
        lines = []
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            lines += explain_difference(a, b, f"{where}[{i}]")
        return lines
    if type(old) is type(new) and old == new:  # 1 is not True, here
        return []
    said = {
        "shard_bytes": "the shard size (--shard-size)",
        "rows": "the tokens of a tokenizer file",
        "arithmetic": "this kind of machine",
        "method_version": "the definition of the method",
        "adapter": "what the config.json of the base says of its modules",
    }
    first, _, rest = where.partition(".")
    where = said.get(where, where)
    if first == "arithmetic" and rest:
        where = f"{rest}, on which the last digits of singular values hang,"
    return [f"{where} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:  # noqa: ANN401
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
