"""What experts' files say otherwise is said in one note each; other tokens are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from della_dist.config import MergeConfig
from della_dist.demo import make_family
from della_dist.demo.tokenizer import MIN_VOCAB, tokenizer_files
from della_dist.errors import InputError
from della_dist.runtime.companions.small_files import MAX_JSON_BYTES
from della_dist.runtime.open_plan import open_plan
from tests.merging import config_for, run, save_family
from tests.remote import upload_inputs

CONFIG = {"model_type": "llama", "num_attention_heads": 8, "rope_theta": 10000.0}


class Family:
    """A base and three experts with one tokenizer."""

    def __init__(self, folder: Path, vocab: int = MIN_VOCAB) -> None:
        self.base, self.experts = save_family(folder, config=CONFIG)
        for checkpoint in (self.base, *self.experts):
            for name, text in tokenizer_files(vocab).items():
                (checkpoint / name).write_text(text)

    def config(self, **keys: Any) -> MergeConfig:
        return config_for(self.base, self.experts, parameters={"density": 0.5}, **keys)

    def notes(self, **keys: Any) -> list[str]:
        return list(open_plan(self.config(**keys)).file_notes)

    def note(self, **keys: Any) -> str:
        """Return the only note, which is of the second expert."""
        (note,) = self.notes(**keys)
        assert note.startswith(f"{self.experts[1]}: ")
        assert note.endswith(f". The output's files are those of {self.base}.")
        return note.removeprefix(f"{self.experts[1]}: ")

    def edit(self, name: str, change: Callable[[Any], Any], *, of_base: bool = False) -> None:
        """Change a JSON document of the second expert, or of the base."""
        path = (self.base if of_base else self.experts[1]) / name
        document = json.loads(path.read_text())
        path.write_text(json.dumps(change(document) or document))


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def swap_two(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def test_equal_files_need_no_word(family: Family) -> None:
    assert family.notes() == []


def test_equal_files_are_not_parsed(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from della_dist.runtime.companions import checkpoint_files as expert_files

    def fail(*arguments: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(expert_files, "read_vocabulary", fail)
    assert family.notes() == []
    family.edit("tokenizer.json", lambda document: None)  # other bytes, same content
    with pytest.raises(AssertionError, match="parsed"):
        family.notes()


def test_other_architecture(family: Family) -> None:
    family.edit("config.json", lambda c: c.update(num_attention_heads=16, rope_theta=5e5))
    assert family.note().startswith(
        "its config.json says num_attention_heads 16, not 8; rope_theta 500000.0, not 10000.0."
    )


def test_one_note_an_expert_with_all_of_it(family: Family) -> None:
    family.edit("config.json", lambda c: c.update(model_type="mistral"))
    (family.experts[1] / "chat_template.jinja").write_text("{{ other }}")
    (family.experts[2] / "chat_template.jinja").write_text("{{ other }}")
    first, second = family.notes()
    assert 'model_type "mistral"' in first
    assert "it has another version of the chat template" in first
    assert second.startswith(f"{family.experts[2]}: it has another version of the chat template.")


# Chat templates.


def test_a_chat_template_only_an_expert_has(family: Family) -> None:
    for path in (family.base, *family.experts):
        document = json.loads((path / "tokenizer_config.json").read_text())
        del document["chat_template"]
        (path / "tokenizer_config.json").write_text(json.dumps(document))
    assert family.notes() == []
    (family.experts[1] / "chat_template.jinja").write_text("{{ messages }}")
    assert family.note().startswith("only it has the chat template.")


def test_additional_chat_templates(family: Family) -> None:
    folder = family.experts[1] / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("{{ documents }}")
    assert family.note().startswith("only it has the chat templates 'rag'.")


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "a list"])
def test_the_same_template_elsewhere_is_the_same(family: Family, where: str) -> None:
    path = family.experts[1]
    document = json.loads((path / "tokenizer_config.json").read_text())
    template = document.pop("chat_template")
    if where == "a list":
        document["chat_template"] = [{"name": "default", "template": template}]
    elif where.endswith(".json"):
        (path / where).write_text(json.dumps({"chat_template": template}))
    else:
        (path / where).write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps(document))
    assert family.notes() == []


# Tokens.


def test_permuted_tokens_are_refused(family: Family, tmp_path: Path) -> None:
    family.edit("tokenizer.json", swap_two)
    numbers = json.loads((family.base / "tokenizer.json").read_text())["model"]["vocab"]
    with pytest.raises(InputError) as caught:
        run(family.config(), tmp_path / "out")
    message = str(caught.value)
    assert str(family.experts[1]) in message
    assert str(family.base) in message
    assert f"2 of {len(numbers)} numbers" in message
    assert f"{numbers['a']}: 'b', not 'a'" in message
    assert "allow_different_tokenizers: true" in message
    assert not (tmp_path / "out").exists()


def test_permuted_tokens_are_merged_by_position_if_that_is_meant(
    family: Family, tmp_path: Path
) -> None:
    family.edit("tokenizer.json", swap_two)
    note = family.note(allow_different_tokenizers=True)
    assert note.startswith("2 of ")
    assert "merged by position as allow_different_tokenizers says" in note
    run(family.config(allow_different_tokenizers=True), tmp_path / "out")
    base = family.base / "tokenizer.json"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == base.read_bytes()


def test_an_adapter_is_merged_of_the_same_tokens(tmp_path: Path) -> None:
    """It carries no files over, and the models are compared all the same."""
    made = make_family(tmp_path / "family", layers=1, num_experts=1)

    def config(**keys: Any) -> MergeConfig:
        return config_for(made.base, made.experts, output={"adapter": 2}, **keys)

    run(config(), tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()
    path = made.experts[0] / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document))  # other bytes, same content
    assert open_plan(config()).file_notes == ()
    swap_two(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="allow_different_tokenizers: true"):
        open_plan(config())
    (note,) = open_plan(config(allow_different_tokenizers=True)).file_notes
    assert "merged by position as allow_different_tokenizers says" in note
    assert note.endswith(f"has no such files, and goes with those of {made.base}.")


def test_a_reserved_token_that_was_given_another_name(family: Family) -> None:
    # Only tokenizer_config.json says so, as of tokenizers that are edited by hand.
    for path in (family.base, *family.experts):
        name = "<|tool|>" if path == family.experts[1] else "<reserved>"
        document = json.loads((path / "tokenizer_config.json").read_text())
        document["added_tokens_decoder"] = {"1": {"content": name}}
        (path / "tokenizer_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"1: '<\|tool\|>', not '<reserved>'"):
        family.notes()


def test_added_tokens_are_counted(family: Family) -> None:
    added = [{"id": 900 + i, "content": f"<extra_{i}>"} for i in range(5)]
    family.edit("tokenizer.json", lambda t: t["added_tokens"].extend(added))
    assert family.note().startswith(
        "5 tokens only it has (261: '<extra_0>', 262: '<extra_1>', 263: '<extra_2>', ...)."
    )


def test_tokens_that_only_the_base_has(family: Family) -> None:
    token = {"id": 900, "content": "<extra>"}
    for path in (family.base, family.experts[0], family.experts[2]):
        document = json.loads((path / "tokenizer.json").read_text())
        document["added_tokens"].append(token)
        (path / "tokenizer.json").write_text(json.dumps(document))
    assert family.note().startswith(f"1 token only {family.base} has (261: '<extra>').")


def test_another_form_of_the_same_vocabulary_is_the_same(family: Family) -> None:
    def without_merges(tokenizer: dict[str, Any]) -> None:
        tokenizer["padding"] = {"strategy": "BatchLongest"}
        tokenizer["model"]["vocab"] = dict(reversed(tokenizer["model"]["vocab"].items()))

    family.edit("tokenizer.json", without_merges)
    assert family.notes() == []


def test_an_expert_without_a_tokenizer(family: Family) -> None:
    for name in tokenizer_files(MIN_VOCAB):
        (family.experts[1] / name).unlink()
    assert family.notes() == []


def test_tokenizers_that_have_no_file_in_common(family: Family) -> None:
    (family.experts[1] / "tokenizer.json").rename(family.experts[1] / "vocab.json")
    assert family.note().startswith(
        "its tokenizer was not compared (it has vocab.json, not tokenizer.json)."
    )


def test_a_form_that_is_not_known(family: Family) -> None:
    family.edit("tokenizer.json", lambda t: {"model": {"type": "Hash"}})
    assert family.note().startswith("its tokenizer.json is another, in a form that is not compared")


@pytest.mark.s3
def test_experts_in_an_object_store(family: Family, s3_bucket: str) -> None:
    family.edit("config.json", lambda c: c.update(rope_theta=5e5))
    config = upload_inputs(family.config(), f"s3://{s3_bucket}/in")
    (note,) = open_plan(config).file_notes
    assert note.startswith(f"s3://{s3_bucket}/in/expert1: its config.json says rope_theta")
    family.edit("tokenizer.json", swap_two)
    with pytest.raises(InputError, match="2 of "):
        open_plan(upload_inputs(family.config(), f"s3://{s3_bucket}/again"))


def test_documents_are_bounded(family: Family) -> None:
    template = family.experts[1] / "chat_template.jinja"
    template.write_text("x")
    os.truncate(template, MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match=r"has \d+ bytes, more than such a file can have"):
        family.notes()
