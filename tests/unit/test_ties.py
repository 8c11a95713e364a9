"""Which heads are the embedding, and which parameters are stored twice."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from della_dist.planning.ties import Ties, resolve_ties
from della_dist.planning.twins import find_twins
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"

#: Tensor name -> its content, which here is one word.
Contents = Mapping[str, str]


class Words:
    """Bytes of tensors that are one word, and how much of them was looked at."""

    def __init__(self, contents: Mapping[str, Contents]) -> None:
        self._contents = contents
        self.compared: list[str] = []
        self.sampled: list[tuple[str, str]] = []

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        self.compared.append(checkpoint.location)
        words = self._contents[checkpoint.location]
        return words[a.name] == words[b.name]

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        self.sampled.append((checkpoint.location, entry.name))
        return self._contents[checkpoint.location][entry.name][0]


def checkpoint(
    location: str,
    contents: Contents,
    tie: bool | None = None,
    text_tie: bool | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> CheckpointIndex:
    tensors = {
        name: TensorEntry(
            name,
            (dtypes or {}).get(name, "BF16"),
            (4,) if name.endswith("norm.weight") else (10, 4),
            0,
            100 * i,
            100 * i + 80,
        )
        for i, name in enumerate(contents)
    }
    shard = ShardFile("model.safetensors", 0, "", "")
    keys = {"tie_word_embeddings": tie, "text_config": {"tie_word_embeddings": text_tie}}
    return CheckpointIndex(location, (shard,), tensors, (), {"config.json": keys})


def resolve(*checkpoints: tuple[Contents, bool | None]) -> tuple[Ties, Words]:
    words = Words({f"/{i}": contents for i, (contents, _) in enumerate(checkpoints)})
    indexes = [checkpoint(f"/{i}", *c) for i, c in enumerate(checkpoints)]
    return resolve_ties(indexes, words), words


NONE: Contents = {EMBED: "e", NORM: "n"}
EQUAL: Contents = {**NONE, HEAD: "e"}
OWN: Contents = {**NONE, HEAD: "h"}


def heads(ties: Ties) -> list[str | None]:
    """Return where each checkpoint has its head: at its own place, the embedding's, or nowhere."""
    places: list[str | None] = []
    for c in ties.checkpoints:
        if HEAD not in c.tensors:
            places.append(None)
        else:
            is_embedding = c.tensors[HEAD].start == c.tensors[EMBED].start
            places.append("embedding" if is_embedding else "own")
    return places


@pytest.mark.parametrize(
    ("base", "expert", "expected", "left_out", "untied"),
    [
        ((NONE, True), (NONE, True), [None, None], False, False),
        ((EQUAL, True), (EQUAL, True), [None, None], True, False),
        ((EQUAL, True), (NONE, True), [None, None], True, False),
        ((EQUAL, True), (NONE, False), [None, None], True, False),
        ((EQUAL, True), (EQUAL, False), [None, None], True, False),
        ((NONE, True), (EQUAL, True), [None, None], False, False),
        ((NONE, None), (EQUAL, None), [None, None], False, False),
        ((OWN, True), (OWN, True), ["own", "own"], False, True),
        ((EQUAL, True), (OWN, True), ["own", "own"], False, True),
        ((OWN, True), (NONE, True), ["own", "embedding"], False, True),
        ((NONE, True), (OWN, False), ["embedding", "own"], False, True),
        ((OWN, False), (NONE, True), ["own", "embedding"], False, False),
        ((OWN, False), (NONE, None), ["own", "embedding"], False, False),
        # Stored and equal, but config.json may not tie it: it stays stored.
        ((EQUAL, False), (NONE, True), ["own", "embedding"], False, False),
        ((EQUAL, None), (NONE, None), ["own", "embedding"], False, False),
        # Heads that are nowhere, or one more tensor: for matching to refuse.
        ((OWN, False), (NONE, False), ["own", None], False, False),
        ((NONE, False), (OWN, False), [None, "own"], False, False),
        ((OWN, True), (NONE, False), ["own", None], False, False),
    ],
)
def test_heads(
    base: tuple[Contents, bool | None],
    expert: tuple[Contents, bool | None],
    expected: list[str | None],
    *,
    left_out: bool,
    untied: bool,
) -> None:
    ties, _ = resolve(base, expert)
    assert heads(ties) == expected
    assert ties.left_out == ((HEAD,) if left_out else ())
    assert ties.untied == ((HEAD,) if untied else ())
    assert [c.location for c in ties.checkpoints] == ["/0", "/1"]
    assert all(NORM in c.tensors and EMBED in c.tensors for c in ties.checkpoints)
    changed = heads(ties) != [("own" if HEAD in c[0] else None) for c in (base, expert)]
    assert bool(ties.notes) == (changed or untied)  # nothing of an input is changed in silence


def test_what_is_not_compared() -> None:
    # The usual model, untied and tied, is not read at all.
    for contents, tie in ((OWN, False), (OWN, None), (NONE, True)):
        ties, words = resolve((contents, tie), (contents, tie), (contents, tie))
        assert (ties.notes, words.compared) == ((), [])
    # The first difference ends it.
    _, words = resolve((OWN, True), (EQUAL, True), (EQUAL, True))
    assert words.compared == ["/0"]


def test_outer_and_inner_keys() -> None:
    for tie, text_tie, left_out in (
        (True, False, True),
        (None, True, True),
        (False, True, False),  # Qwen2-VL ties by it, Gemma 3 does not: stays stored
    ):
        index = checkpoint("/0", EQUAL, tie, text_tie)
        ties = resolve_ties(
            [index, checkpoint("/1", EQUAL, tie, text_tie)], Words({"/0": EQUAL, "/1": EQUAL})
        )
        assert ties.left_out == ((HEAD,) if left_out else ())
        assert heads(ties) == ([None, None] if left_out else ["own", "own"])
        assert ties.untied == ()


def test_a_head_of_another_dtype_is_its_own() -> None:
    words = Words({"/0": EQUAL, "/1": EQUAL})
    wide = checkpoint("/0", EQUAL, tie=True, dtypes={HEAD: "F32"})
    ties = resolve_ties([wide, checkpoint("/1", EQUAL, tie=True)], words)
    assert ties.untied == (HEAD,)


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "transformer.wte.weight"),
        ("lm_head.weight", "embed_tokens.weight"),
        ("lm_head.weight", "model.language_model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("lm_head.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ],
)
def test_names_of_architectures(head: str, embedding: str) -> None:
    others = {"vision.embeddings.norm.weight": "v", "model.layers.61.embed_tokens.weight": "x"}
    without, own = {**others, embedding: "e"}, {**others, embedding: "e", head: "h"}
    ties, _ = resolve((without, True), (own, True))
    base, expert = ties.checkpoints
    assert base.tensors[head].start == base.tensors[embedding].start
    assert expert.tensors[head].start != expert.tensors[embedding].start
    assert (ties.untied, ties.filled) == ((head,), (("/0", head, embedding),))


@pytest.mark.parametrize("name", ["decoder.embed_tokens.weight", "x.head.weight"])
def test_what_is_no_head(name: str) -> None:
    # Without an embedding for both, the decoder's is its own; without an embedding, so is a head.
    contents = {name: "a", NORM: "n"}
    ties, words = resolve((contents, True), (contents, True))
    assert (ties.untied, ties.left_out, ties.notes, words.compared) == ((), (), (), [])


def test_of_two_embeddings_the_stored_head_tells() -> None:
    audio, text = "audio.embed_tokens.weight", "text.embed_tokens.weight"
    base = {audio: "a", text: "t", NORM: "n"}
    expert = {audio: "b", text: "s", NORM: "n", HEAD: "s"}
    ties, _ = resolve((base, True), (expert, False))
    assert not any(HEAD in c.tensors for c in ties.checkpoints)  # tied to the text's, as there
    ties, _ = resolve((base, True), (expert, True), ({**expert, HEAD: "h"}, True))
    assert [c.tensors[HEAD].start for c in ties.checkpoints[:2]] == [
        ties.checkpoints[0].tensors[text].start,
        ties.checkpoints[1].tensors[HEAD].start,
    ]


MTP = "model.layers.61.embed_tokens.weight"
MTP_HEAD = "model.layers.61.shared_head.head.weight"


def twins(*contents: Contents) -> tuple[Mapping[str, str], Words]:
    words = Words({f"/{i}": c for i, c in enumerate(contents)})
    indexes = [checkpoint(f"/{i}", c) for i, c in enumerate(contents)]
    return find_twins(indexes, list(contents[0]), words), words


def test_twins() -> None:
    model = {MTP: "e1", HEAD: "h1", EMBED: "e1", MTP_HEAD: "h1", NORM: "e1"}
    other = {MTP: "e2", HEAD: "h2", EMBED: "e2", MTP_HEAD: "h2", NORM: "e2"}
    assert twins(model, other)[0] == {MTP: EMBED, MTP_HEAD: HEAD}
    assert twins({**model, HEAD: "e1", MTP_HEAD: "e1"}, {**other, HEAD: "e2", MTP_HEAD: "e2"})[
        0
    ] == {MTP: EMBED, HEAD: EMBED, MTP_HEAD: EMBED}
    # Trained apart in one input: two parameters.
    assert twins(model, {**other, MTP: "e3"})[0] == {MTP_HEAD: HEAD}


def test_twins_of_a_usual_model_take_one_block_each() -> None:
    found, words = twins(OWN, OWN, OWN)
    assert found == {}
    assert words.sampled == [("/0", EMBED), ("/0", HEAD)]
    assert words.compared == []
    found, words = twins({**NONE, HEAD: "e2"}, OWN)  # alike in the first block alone
    assert found == {}
    assert words.compared == ["/0"]


def test_twins_in_several_groups_that_begin_alike() -> None:
    model = {EMBED: "e1", HEAD: "e2", MTP: "e1", MTP_HEAD: "e2"}
    assert twins(model, model)[0] == {MTP: EMBED, MTP_HEAD: HEAD}
    # The first of a group may be the one that is another in an expert.
    assert twins({**model, HEAD: "e1", MTP_HEAD: "e1"}, {**model, MTP: "e2"})[0] == {
        HEAD: MTP,
        MTP_HEAD: MTP,
    }


def test_twins_need_one_dtype_and_shape() -> None:
    indexes = [checkpoint("/0", EQUAL, dtypes={HEAD: "F32"}), checkpoint("/1", EQUAL)]
    words = Words({"/0": EQUAL, "/1": EQUAL})
    assert find_twins(indexes, list(EQUAL), words) == {}
    assert words.sampled == []
