"""Tokens of other tokenizers, as the tokenizers library reads the files that get them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from della_dist.errors import InputError
from della_dist.runtime.companions.added_tokens import AddedTokens
from della_dist.runtime.companions.vocabulary import read_vocabulary

WORDS = ["<unk>", "a", "b", "ab", "c", "##c", "▁a"]


def tokenizer(kind: str, words: list[str], special: list[str], plain: list[str]) -> dict[str, Any]:
    """Return the document of a tokenizer of some kind."""
    vocab = {word: i for i, word in enumerate(words)}
    if kind == "BPE":
        model: Any = models.BPE(vocab, [("a", "b")], unk_token="<unk>")
    elif kind == "WordPiece":
        model = models.WordPiece(vocab, unk_token="<unk>")
    elif kind == "WordLevel":
        model = models.WordLevel(vocab, unk_token="<unk>")
    else:
        model = models.Unigram([(word, -1.0 - i) for word, i in vocab.items()], unk_id=0)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    made.add_tokens([AddedToken(token, lstrip=True, normalized=False) for token in plain])
    document: dict[str, Any] = json.loads(made.to_str())
    return document


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
@pytest.mark.parametrize("ordinary", [False, True])
def test_numbers(kind: str, ordinary: bool) -> None:
    """What is there keeps its number, and what is added has the one that its row has."""
    base = tokenizer(kind, WORDS, ["<s>", "</s>"], [])
    other = tokenizer(kind, [*WORDS, "d", "e"][: 9 if ordinary else 7], ["<s>", "<t>"], ["<p>"])
    before = Tokenizer.from_str(json.dumps(base))
    first = before.get_vocab_size()
    new = [*(["d", "e"] if ordinary else []), "<t>", "<p>", "<nobody>"]
    numbers = {token: first + i for i, token in enumerate(new)}
    everything = {**before.get_vocab(), **numbers}
    added = AddedTokens(everything, new, [(other, {})])
    after = Tokenizer.from_str(added.in_tokenizer(base, {}, "here").decode())
    assert after.get_vocab() == {**before.get_vocab(), **numbers}
    text = "ab c a b </s><t> <p><nobody>ab"
    expected = [numbers["<t>"], numbers["<p>"], numbers["<nobody>"]]
    assert after.encode(text).ids[-4:-1] == expected
    plain = "ab c a"
    assert after.encode(plain).ids == before.encode(plain).ids
    decoder = after.get_added_tokens_decoder()
    assert decoder[numbers["<t>"]].special
    assert not decoder[numbers["<p>"]].special
    assert decoder[numbers["<p>"]].lstrip
    assert "d" not in {token.content for token in decoder.values()}
    if ordinary and kind in ("WordPiece", "WordLevel", "Unigram"):
        assert after.encode("d").ids == [numbers["d"]]


def test_a_gap_in_unigram() -> None:
    base = tokenizer("Unigram", WORDS, [], [])
    other = tokenizer("Unigram", [*WORDS, "d"], [], [])
    with pytest.raises(InputError, match=r"here: .* gap before 9"):
        AddedTokens(
            {**dict(zip(WORDS, range(7), strict=True)), "d": 9}, ["d"], [(other, {})]
        ).in_tokenizer(base, {}, "here")


def test_numbers_are_those_of_the_library() -> None:
    """Whatever stands in the file; and names in other files come behind."""
    document = tokenizer("BPE", WORDS, ["<s>", "</s>", "ab"], [])
    for token, number in zip(document["added_tokens"], (50, 3, 12), strict=True):
        token["id"] = number
    expected = Tokenizer.from_str(json.dumps(document)).get_vocab()
    data = json.dumps(document).encode()
    found = read_vocabulary("tokenizer.json", data)
    assert {token: number for number, token in found.items()} == expected
    behind = read_vocabulary("tokenizer.json", data, ["<s>", "<new>"])
    assert behind == {**found, len(expected): "<new>"}
