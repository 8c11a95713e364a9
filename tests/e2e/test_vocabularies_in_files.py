"""Tokenizers as people have them: files that disagree, and tokens that only one of them has.

The oracle is transformers: which token has which number in a model is what `AutoTokenizer` says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from della_dist import plan
from della_dist.config import config_from_mapping
from della_dist.errors import InputError
from della_dist.runtime.companions import made
from della_dist.runtime.companions.added_tokens import AddedTokens
from tests.merging import run
from tests.vocabularies import align_by_hand, make_models

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = make_models(tmp_path_factory.mktemp("models"), vocab=720)
    return {name: paths[name] for name in ("base", "a")}


def edit(name: str, change: Callable[[Any], Any]) -> Edit:
    """Return what changes a JSON file of a model, which begins empty where there is none."""

    def apply(model: Path) -> None:
        path = model / name
        document = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(change(document) or document))

    return apply


def config_edit(**keys: Any) -> Edit:
    return edit("tokenizer_config.json", lambda document: document.update(keys))


def listed(content: str) -> dict[str, Any]:
    return {"content": content, "special": True, "lstrip": False, "rstrip": False}


def renamed_ids(document: Any) -> None:
    for i, token in enumerate(document["added_tokens"]):
        token["id"] = 1000 + i


def vocab_beside(model: Path) -> None:
    """Write the vocabulary a second time, without what was added to it."""
    document = json.loads((model / "tokenizer.json").read_text())
    (model / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))


TOKENIZER = "tokenizer.json"
DECODER = {"640": listed("<p>"), "641": listed("<q>")}
EDITS: dict[str, tuple[str, Edit]] = {
    "only listed in the config": ("base", config_edit(added_tokens_decoder=DECODER)),
    "only listed by an expert": ("a", config_edit(added_tokens_decoder={"3": listed("<p>")})),
    "added_tokens.json": ("base", edit("added_tokens.json", lambda d: d.update({"<p>": 640}))),
    "additional": ("base", config_edit(additional_special_tokens=["<p>", "<q>"])),
    "extra": ("a", config_edit(extra_special_tokens=["<p>"])),
    "a name in the config": ("base", config_edit(pad_token="[PAD]", mask_token="[MASK]")),
    "a map": ("base", edit("special_tokens_map.json", lambda d: d.update(sep_token="[SEP]"))),
    "other ids": ("a", edit(TOKENIZER, renamed_ids)),
    "a vocabulary beside": ("a", vocab_beside),
}  # fmt: skip


def test_other_tokenizers_are_read_once(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the merge is planned, and when files are written: for all files together."""
    base = shutil.copytree(models["base"], tmp_path / "base")
    EDITS["additional"][1](base)
    (base / "added_tokens.json").write_text("{}")
    found: list[AddedTokens] = []

    def counted(*arguments: Any) -> AddedTokens:
        found.append(AddedTokens(*arguments))
        return found[-1]

    monkeypatch.setattr(made, "AddedTokens", counted)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(models["a"]), "parameters": {"weight": 0.5}}],
        "tokenizer_source": "union",
    }
    run(config_from_mapping(content), tmp_path / "out")
    assert len(found) == 2


@pytest.mark.parametrize("what", EDITS)
def test_numbers(models: dict[str, Path], tmp_path: Path, what: str) -> None:
    from transformers import AutoTokenizer

    paths = {name: shutil.copytree(path, tmp_path / name) for name, path in models.items()}
    which, change = EDITS[what]
    change(paths[which])
    numbers = {name: AutoTokenizer.from_pretrained(p).get_vocab() for name, p in paths.items()}
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(paths["base"]),
        "models": [{"model": str(paths["a"]), "parameters": {"weight": 0.5}}],
        "tokenizer_source": "union",
    }
    run(config_from_mapping(content), tmp_path / "out")
    output = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert set(output) == {token for vocab in numbers.values() for token in vocab}
    assert {token: output[token] for token in numbers["base"]} == numbers["base"]
    rows = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    assert max(output.values()) < rows
    by_hand = align_by_hand(paths, output, rows, tmp_path / "aligned", numbers=numbers)
    del content["tokenizer_source"]
    content["base_model"] = str(by_hand["base"])
    content["models"] = [{"model": str(by_hand["a"]), "parameters": {"weight": 0.5}}]
    run(config_from_mapping(content), tmp_path / "expected")
    bytes_of = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "expected"))
    assert next(bytes_of) == next(bytes_of)


def without(token: str) -> Edit:
    def remove(document: Any) -> None:
        del document["model"]["vocab"][token]

    return edit(TOKENIZER, remove)


WRONG: dict[str, tuple[Edit, str]] = {
    "two at one number": (
        without("Ġthe"), "its tokenizer.json cannot be read as a vocabulary: .* of another token"
    ),
    "no vocabulary": (
        edit(TOKENIZER, lambda d: d["model"].update(vocab=None)), "TypeError: 'NoneType'"
    ),
    "a number": (
        edit(TOKENIZER, lambda d: d["model"]["vocab"].update(x=1 << 40)), "'x' has the number"
    ),
    "half a character": (
        config_edit(added_tokens_decoder={"9": listed("\ud83d")}), "half a character"
    ),
    "another kind": (
        lambda path: shutil.move(path / TOKENIZER, path / "tokenizer.model"), "not of one kind"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(models: dict[str, Path], tmp_path: Path, what: str) -> None:
    expert = shutil.copytree(models["a"], tmp_path / "a")
    change, said = WRONG[what]
    change(expert)
    content = {
        "merge_method": "linear",
        "models": [{"model": str(models["base"])}, {"model": str(expert)}],
        "tokenizer_source": "union",
    }
    with pytest.raises(InputError, match=said) as caught:
        plan(content)
    assert str(expert) in str(caught.value) or what == "half a character"


LISTS: dict[str, Edit] = {
    "none": lambda path: None,
    "additional": config_edit(additional_special_tokens=["Ġthe"]),
    "extra": config_edit(extra_special_tokens=["Ġthe"]),
    "a mapping": config_edit(extra_special_tokens={"image_token": "Ġthe"}),
    "a map": edit(
        "special_tokens_map.json", lambda d: d.update(additional_special_tokens=["Ġthe"])
    ),
}


@pytest.mark.parametrize("where", LISTS)
def test_special_tokens_stay_special(models: dict[str, Path], tmp_path: Path, where: str) -> None:
    from transformers import AutoTokenizer

    paths = {name: shutil.copytree(path, tmp_path / name) for name, path in models.items()}
    LISTS[where](paths["base"])
    base = AutoTokenizer.from_pretrained(paths["base"])
    of_expert = AutoTokenizer.from_pretrained(paths["a"]).added_tokens_decoder.values()
    new = {str(t) for t in of_expert if t.special} - set(base.get_vocab())
    assert new
    content = {
        "merge_method": "linear",
        "models": [{"model": str(paths["base"])}, {"model": str(paths["a"])}],
        "tokenizer_source": "union",
    }
    run(config_from_mapping(content), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.all_special_tokens) == {*base.all_special_tokens, *new}
    words = tokenizer("".join(sorted(new)) + "the", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(words, skip_special_tokens=True) == "the"


def test_words_of_the_base_that_an_expert_cuts_out(models: dict[str, Path], tmp_path: Path) -> None:
    """A word of the base's vocabulary, at the same number an added token of the chat model."""
    from transformers import AutoTokenizer

    base, chat = (shutil.copytree(models["base"], tmp_path / name) for name in ("base", "chat"))
    mark = "<|im_end|>"
    document = json.loads((base / TOKENIZER).read_text())
    (number,) = (t["id"] for t in document["added_tokens"] if t["content"] == mark)
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != mark]
    document["model"]["vocab"][mark] = number
    (base / TOKENIZER).write_text(json.dumps(document))
    config_edit(additional_special_tokens=["<|im_start|>"])(base)
    assert mark not in AutoTokenizer.from_pretrained(base).all_special_tokens
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(base)}, {"model": str(chat)}],
        "chat_template": "chatml",
    }
    said = " ".join(plan(content).notes)
    assert f"it marks turns by {mark}, which are no tokens of" in said
    content["tokenizer_source"] = "union"
    assert "marks turns" not in " ".join(plan(content).notes)
    run(config_from_mapping(content), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(mark, add_special_tokens=False)["input_ids"] == [number]
    assert mark in tokenizer.all_special_tokens
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    same = {**content, "models": [{"model": str(models[n])} for n in ("base", "a")]}
    same["tokenizer"] = {"source": "base"}
    del same["tokenizer_source"]
    run(config_from_mapping(same), tmp_path / "same")
    files = [path / TOKENIZER for path in (tmp_path / "same", models["base"])]
    assert files[0].read_bytes() == files[1].read_bytes()  # only a union takes tokens over
