"""Which tensors are merged, copied, kept or left out, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from della_dist.errors import InputError
from della_dist.planning.matching import Matching, is_buffer, match_tensors
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry
from della_dist.specs.dtypes import COPY_DTYPES, DTYPE_BITS, FLOAT_DTYPES

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]

EMBED = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
HEAD = "lm_head.weight"

MODEL: Kinds = {
    EMBED: ("BF16", (10, 4)),
    UP: ("F16", (8, 4)),
    DOWN: ("F32", (4, 8)),
    HEAD: ("BF16", (10, 4)),
    "steps": ("I64", (3,)),
}


def entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, 0, 0, 0)


def checkpoint(location: str, kinds: Kinds, tie: bool | None = None) -> CheckpointIndex:
    tensors = {name: entry(name, *kind) for name, kind in kinds.items()}
    shard = ShardFile("model.safetensors", 0, "", "")
    return CheckpointIndex(
        location, (shard,), tensors, (), {"config.json": {"tie_word_embeddings": tie}}
    )


def match(
    base: Kinds,
    *experts: Kinds,
    ignore_extra: bool = False,
    base_for_missing: bool = False,
    tie: bool | None = None,
) -> Matching:
    others = [checkpoint(f"/expert{m}", kinds, tie) for m, kinds in enumerate(experts)]
    return match_tensors(
        checkpoint("/base", base),
        others,
        ignore_extra=ignore_extra,
        base_for_missing=base_for_missing,
    )


def changed(**kinds: tuple[str, tuple[int, ...]]) -> Kinds:
    return {**MODEL, **{name.replace("_DOT_", "."): kind for name, kind in kinds.items()}}


def without(*names: str) -> Kinds:
    return {name: kind for name, kind in MODEL.items() if name not in names}


def test_actions() -> None:
    matching = match(MODEL, MODEL, MODEL)
    assert matching == Matching(
        {EMBED: "merge", UP: "merge", DOWN: "merge", HEAD: "merge", "steps": "copy"}
    )
    assert list(matching.actions) == list(MODEL)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_is_merged_copied_or_refused(dtype: str) -> None:
    kinds = {"x": (dtype, (8,))}
    if dtype in FLOAT_DTYPES:
        assert match(kinds, kinds).actions == {"x": "merge"}
    elif dtype in COPY_DTYPES:
        assert match(kinds, kinds).actions == {"x": "copy"}
    else:
        with pytest.raises(InputError, match=rf"tensor x of /base has dtype {dtype},.*Convert"):
            match(kinds, kinds)


def test_float_dtypes_may_differ() -> None:
    other = {name: ("F64" if d != "I64" else d, shape) for name, (d, shape) in MODEL.items()}
    assert match(MODEL, other).actions == match(MODEL, MODEL).actions


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), True),
        ("inv_freq", (32,), True),
        ("model.rotary_emb.original_inv_freq", (32,), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("transformer.h.0.attn.bias", (1, 1, 1024, 1024), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 2048, 2048), True),
        ("transformer.h.0.attn.bias", (1024,), False),
        ("encoder.self_attention.bias", (1, 1, 8, 8), False),
        ("transformer.h.0.attn.c_proj.bias", (1, 1, 8, 8), False),
        ("model.my_inv_freq", (32,), False),
        ("inv_freq.weight", (32,), False),
        ("position_embeddings.weight", (512, 8), False),
    ],
)
def test_buffers(name: str, shape: tuple[int, ...], *, expected: bool) -> None:
    assert is_buffer(entry(name, "F32", shape)) is expected


@pytest.mark.parametrize("dtype", ["F32", "I64", "F8_E4M3"])
def test_buffers_need_not_match(dtype: str) -> None:
    base = {**MODEL, "inv_freq": (dtype, (32,))}
    assert match(base, MODEL).actions["inv_freq"] == "buffer"  # missing there
    other = {**MODEL, "inv_freq": ("F32", (64,)), "position_ids": ("I64", (1, 9))}
    matching = match(base, other)
    assert matching.actions["inv_freq"] == "buffer"
    assert "position_ids" not in matching.actions
    assert matching.extra_left_out == ()


def test_shapes() -> None:
    wrong = changed(steps=("I64", (4,)))
    with pytest.raises(
        InputError, match=r"^/expert1 does not fit /base: steps is \[4\], not \[3\]"
    ):
        match(MODEL, MODEL, wrong)
    with pytest.raises(InputError, match=r"\[\], not \[1\]"):
        match({"x": ("F32", (1,))}, {"x": ("F32", ())})


def test_integer_dtypes() -> None:
    with pytest.raises(InputError, match=r"/expert0 does not fit /base: steps is I32, not I64"):
        match(MODEL, changed(steps=("I32", (3,))))
    with pytest.raises(InputError, match=r"tensor .*up_proj.* of /expert0 has dtype I8"):
        match(MODEL, {**MODEL, UP: ("I8", (8, 4))})


def test_missing_tensor_names_the_nearest() -> None:
    other = {**without(UP), "model.layers.0.mlp.gate_up_proj.weight": ("F16", (8, 4))}
    renamed = {**without(UP), "language_model.model.layers.0.mlp.up_proj.weight": ("F16", (8, 4))}
    with pytest.raises(InputError, match=rf"^/expert0 lacks 1 tensor \({UP}\) that /base has"):
        match(MODEL, other)
    with pytest.raises(
        InputError,
        match=r"The nearest name there is language_model\.model\.layers\.0\.mlp\.up_proj",
    ):
        match(MODEL, renamed)


def test_no_nearest_name_where_none_is_near() -> None:
    with pytest.raises(InputError) as caught:
        match(MODEL, {"completely": ("F32", (1,))})
    assert "nearest" not in str(caught.value)


NAMED = 5  # the rest is counted


@pytest.mark.parametrize("count", [1, NAMED, NAMED + 1, 1000])
def test_messages_name_at_most_five_tensors(count: int) -> None:
    many: Kinds = {f"experts.{i:04d}.weight": ("F32", (2,)) for i in range(count)}
    other: Kinds = dict.fromkeys(many, ("F32", (3,)))
    one: Kinds = {"x": ("F32", (1,))}
    for base, expert in ((many, one), (one, {**one, **many}), (many, other)):
        with pytest.raises(InputError) as caught:
            match(base, expert)
        message = str(caught.value)
        named = message.split(" The nearest name", maxsplit=1)[0].count("experts.")
        assert named == min(count, NAMED)
        assert (f"and {count - NAMED} more" in message) == (count > NAMED)


def test_extra_tensors() -> None:
    other = {**MODEL, "model.layers.1.mlp.up_proj.weight": ("F16", (8, 4)), "more": ("F32", (1,))}
    with pytest.raises(
        InputError,
        match=r"^/expert1 has 2 tensors .*that /base does not have.*extra_tensors: ignore",
    ):
        match(MODEL, MODEL, other)
    matching = match(MODEL, MODEL, other, ignore_extra=True)
    assert matching.actions == match(MODEL, MODEL).actions
    assert matching.extra_left_out == (("/expert1", ("model.layers.1.mlp.up_proj.weight", "more")),)
    (note,) = matching.notes("/base")
    assert note.startswith("/expert1: 2 tensors (model.layers.1.mlp.up_proj.weight, more)")


def test_ignoring_extra_tensors_ignores_nothing_else() -> None:
    with pytest.raises(InputError, match="lacks"):
        match(MODEL, without(UP), ignore_extra=True)


def test_missing_tensors_from_the_base() -> None:
    matching = match(MODEL, without(UP), without(UP, "steps"), MODEL, base_for_missing=True)
    assert matching.actions == {**match(MODEL, MODEL).actions, UP: "base", "steps": "base"}
    assert matching.missing == (("/expert0", (UP,)), ("/expert1", (UP, "steps")))
    assert [note.partition(",")[0] for note in matching.notes("/base")] == [
        f"/expert0: lacks 1 tensor ({UP})",
        f"/expert1: lacks 2 tensors ({UP}",
    ]


def test_an_expert_of_another_model_is_not_missing_tensors() -> None:
    with pytest.raises(InputError, match=r"lacks 5 tensors .*, all of its tensors"):
        match(MODEL, {"other": ("F32", (1,))}, ignore_extra=True, base_for_missing=True)


def test_missing_tensors_do_not_excuse_others() -> None:
    with pytest.raises(InputError, match="does not fit"):
        match(MODEL, without(UP), {**MODEL, DOWN: ("F32", (4, 9))}, base_for_missing=True)
    with pytest.raises(InputError, match="missing_tensors: base"):
        match(MODEL, without(UP))


def test_a_head_that_is_nowhere() -> None:
    with pytest.raises(InputError, match=rf"lacks 1 tensor \({HEAD}\).*not the embedding"):
        match(MODEL, without(HEAD), tie=False)


def test_nothing_to_merge() -> None:
    with pytest.raises(InputError, match="/base holds no tensors"):
        match({}, {})
