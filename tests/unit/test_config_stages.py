"""Several documents: their order, their names, what is wrong with them."""

from __future__ import annotations

import pickle
from itertools import permutations

import pytest

from della_dist.config import config_from_mapping, load_config, parse_config
from della_dist.config.reading import MAX_NODES
from della_dist.errors import ConfigError
from tests.staged import document, staged, text_of


def linear(name: str | None, *models: str, **keys: str) -> dict[str, object]:
    return document(models, "linear", name=name, **keys)


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml")
    return str(caught.value)


DOCUMENTS = [
    linear("a", "/x", "/y"),
    linear("b", "a", "/z"),
    linear("c", "/x", base_model="a"),
    linear("d", "b", "c"),
]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_order_is_that_of_what_they_need(order: tuple[int, ...]) -> None:
    config = staged(*(DOCUMENTS[i] for i in order))
    names = [stage.name for stage in config.stages]
    assert names[0] == "a"
    assert set(names) == {"a", "b", "c"}
    # Otherwise as they stand.
    assert names[1:] == [name for name in ("abcd"[i] for i in order) if name in "bc"]
    assert [model.model for model in config.models] == ["b", "c"]
    assert config.name is None
    assert all(not stage.stages for stage in config.stages)


def test_an_adapter_on_a_stage() -> None:
    config = staged(linear("a", "/x", "/y"), document(["a+org/lora"], "passthrough"))
    assert [stage.name for stage in config.stages] == ["a"]


def test_the_unnamed_one_is_the_output_wherever_it_stands() -> None:
    for documents in permutations([linear(None, "a"), linear("a", "/x"), linear("b", "a")]):
        config = staged(*documents)
        assert config.models[0].model == "a"
        assert sorted(str(stage.name) for stage in config.stages) == ["a", "b"]


def test_names_are_seen_wherever_models_stand() -> None:
    parts = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    sliced = {"merge_method": "passthrough", "slices": parts}
    based = document(["/x", "b"], "ties", base_model="a", tokenizer_source="b")
    config = staged(based, {"name": "b", **sliced}, linear("a", "/y"))
    assert [stage.name for stage in config.stages] == ["a", "b"]
    assert config.tokenizer is not None
    assert config.tokenizer.source == "b"


def test_the_list_of_stages_is_the_same(tmp_path: object) -> None:
    config = staged(*DOCUMENTS)
    listed = {"stages": DOCUMENTS[:3], "name": "whatever", **linear(None, "b", "c")}
    assert config_from_mapping(listed) == config
    assert parse_config(text_of(listed)) == config
    assert config_from_mapping(config.normalized()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != staged(*DOCUMENTS[:2], linear("c", "/other", base_model="a"), DOCUMENTS[3])
    # The outer one is the output, although all have names and others are in nobody's.
    aside = {"stages": [linear("a", "/x")], **linear("b", "/y")}
    assert config_from_mapping(aside).models[0].model == "/y"


def test_seeds_and_labels_are_those_of_all() -> None:
    config = staged(*DOCUMENTS)
    assert {stage.seed for stage in config.with_seed(5).stages} == {5}
    labelled = config.with_node_labels(["/d/*:disk=a"])
    assert [dict(stage.node_labels) for stage in labelled.stages] == [{"/d/*": "disk=a"}] * 3
    each = staged(*(d | {"seed": i} for i, d in enumerate(DOCUMENTS)))
    assert [stage.seed for stage in each.stages] == [0, 1, 2]
    assert each.seed == 3


def test_a_name_of_one_document_says_nothing() -> None:
    config = staged(linear("any/thing at all: really", "/x"))
    assert config.stages == ()
    assert "name: accepted, has no effect with linear." in config.notes()
    several = staged(*DOCUMENTS)
    assert not any("name:" in note for c in (several, *several.stages) for note in c.notes())


@pytest.mark.parametrize(
    "name", ["a", "A-1", "step_1.b", "Part 1 (of 2)", "été", "7b", "x" * 100, "a.b"]
)
def test_names_that_are_folders(name: str) -> None:
    assert staged(linear(name, "/x"), linear(None, name)).stages[0].name == name


BAD_NAMES = ["", " ", ".", "..", "a/b", "a\\b", "a:b", "-a", ".a", "a.", "a ", "x" * 101, "a+b"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a@b", "a\nb", "~", "s3://a", "a*"])
def test_names_that_are_no_folders(name: str) -> None:
    text = text_of(linear(name, "/x"), linear(None, "/y"))
    assert refused(text).startswith("c.yaml: document 1: `name` is ")
    assert "no good name of a folder" in refused(text)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (
            [linear("a", "b"), linear("b", "c"), linear("c", "b"), linear(None, "a")],
            "c.yaml: no document can be merged first: 'b', which names 'c', which names 'b'. Let",
        ),
        ([linear("a", "a"), linear(None, "a")], "'a', which names 'a'."),
        (
            [linear("a", "/x"), linear("b", "/y")],
            "c.yaml: no document names 'a', 'b', and which of them is the output is not said",
        ),
        (
            [linear("a", "/x"), linear("A", "/x"), linear(None, "a")],
            "c.yaml: document 2: `name` is 'A', and that of document 1 is the same, or differs",
        ),
        (
            [linear(None, "/x"), linear("a", "/x"), linear(None, "a")],
            "c.yaml: document 3: `name` is missing, and document 1 has none either",
        ),
        (
            [linear("a", "/x") | {"stages": [linear("b", "/x")]}, linear(None, "a")],
            "c.yaml: document 1 (a): `stages` stands in one of several documents",
        ),
        (
            [linear("a", "/x") | {"name": 7}, linear(None, "a")],
            "c.yaml: document 1: `name` must be a word, not 7; write it in quotes.",
        ),
        (
            [linear("a", "/x") | {"seed": -1}, linear(None, "a") | {"seeds": 1}],
            "c.yaml: 2 problems. (1) document 1 (a): `seed` must be",
        ),
        (
            [linear("a", "/x") | {"seed": -1}, linear(None, "a") | {"seeds": 1}],
            "(2) document 2: `s",
        ),
        (
            [{"stages": [linear("a", "/x"), linear(None, "/x")], **linear(None, "a")}],
            "c.yaml: stages[1]: `name` is missing",
        ),
        (
            [{"stages": [linear("a", "/x") | {"sed": 1}], **linear(None, "a")}],
            "c.yaml: stages[0] (a): `sed` is no known key; did you mean `seed`?",
        ),
        ([{"stages": ["a"], **linear(None, "a")}], "c.yaml: stages[0]: must be a mapping"),
        ([{"stages": {"a": 1}, **linear(None, "a")}], "c.yaml: `stages` must be a list"),
    ],
)
def test_what_is_wrong(documents: list[dict[str, object]], words: str) -> None:
    assert words in refused(text_of(*documents))


def test_a_document_that_is_no_mapping() -> None:
    text = text_of(linear("a", "/x")) + "---\njust text\n---\n" + text_of(linear(None, "a"))
    assert refused(text) == (
        "c.yaml: document 2: must be a mapping of keys to values, not 'just text'."
    )


def test_more_problems_than_are_shown() -> None:
    documents = [linear(f"s{i}", "/x") | {"seed": -1} for i in range(12)]
    message = refused(text_of(*documents))
    assert "c.yaml: 12 problems. " in message
    assert "(10) document 10 (s9): " in message
    assert message.endswith("And 2 more.")


def test_later_errors_name_the_document() -> None:
    stage = document(["/x"], "della", name="a", base_model="/b")
    stage["parameters"] = {"density": [0.2, 0.9], "epsilon": 0.2}
    assert "c.yaml: document 1 (a): " in refused(text_of(stage, linear(None, "a")))


def test_the_budget_is_that_of_all_documents() -> None:
    values = "[" + "1, " * (MAX_NODES // 4) + "1]"
    one = f"x: &a {values}\ny: *a\n"
    message = refused("---\n".join([one] * 3))
    assert f"more than {MAX_NODES} values" in message
    # Anchors are those of one document.
    assert "the alias *a stands for nothing" in refused("x: &a 1\n---\ny: *a\n")


def test_empty_documents_count_for_nothing(tmp_path: object) -> None:
    text = "---\n---\n" + text_of(linear("a", "/x")) + "---\n---\n" + text_of(linear(None, "a"))
    assert [stage.name for stage in parse_config(text).stages] == ["a"]
    with pytest.raises(ConfigError):
        load_config(f"{tmp_path}/none.yaml")
