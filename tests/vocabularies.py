"""Models of other vocabularies, made by transformers; and their rows aligned by hand, in torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from della_dist.demo import make_family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_models(
    folder: Path, *, dtype: str = "F32", tie: bool = False, vocab: int = 600
) -> dict[str, Path]:
    """Write a base and experts of it whose vocabularies differ; return where they are.

    `same` has that of the base, `a` and `b` have added tokens (`<both>` is of both), `b` padded
    rows, and `moved` has its ordinary tokens at other numbers.
    """
    family = make_family(
        folder / "family", hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2,
        vocab=vocab, num_experts=4, dtype=dtype, tie=tie,
    )  # fmt: skip
    names = ("base", "same", "a", "b", "moved")
    paths = dict(zip(names, (family.base, *family.experts), strict=True))
    add_tokens(paths["a"], ["<a>", "<both>"])
    add_tokens(paths["b"], ["<both>", "<b1>", "<b2>"], pad_to_multiple_of=64)
    move_tokens(paths["moved"])
    return paths


def add_tokens(path: Path, tokens: Sequence[str], **how: Any) -> None:
    """Add special tokens to a model, as those who fine-tune do; their rows are random."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    model.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False, **how)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            new = layer.weight[len(tokenizer) - len(tokens) :]
            numbers = torch.arange(new.numel()).reshape(new.shape)
            new.copy_(torch.sin(numbers * 0.7 + len(tokens)) * 0.05)
    replace_model(path, model, tokenizer)


def replace_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a model in the place of another."""
    shutil.rmtree(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def move_tokens(path: Path, *, weights: bool = True) -> None:
    """Give every third ordinary token the number of another, and its rows with it, if `weights`."""
    import torch
    from transformers import AutoModelForCausalLM

    document = json.loads((path / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    ordinary = [t for t, n in vocab.items() if n >= 10 and n % 3 == 0]
    numbers = [vocab[t] for t in ordinary]
    moved = dict(zip(ordinary, numbers[7:] + numbers[:7], strict=True))
    document["model"]["vocab"] = {**vocab, **moved}
    (path / "tokenizer.json").write_text(json.dumps(document))
    if not weights:
        return
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            before = layer.weight.clone()
            for token, number in moved.items():
                layer.weight[number] = before[vocab[token]]
            if model.config.tie_word_embeddings:
                break
    model.save_pretrained(path)


def vocabulary(path: Path) -> dict[str, int]:
    """Return number by token, as the tokenizers library has it."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
    return found


def align_by_hand(
    paths: Mapping[str, Path],
    output: Mapping[str, int],
    rows: int,
    folder: Path,
    *,
    donor: str = "base",
    has_base: bool = True,
    given: Mapping[str, tuple[str, str] | None] | None = None,
    forced: Collection[str] = (),
) -> dict[str, Path]:
    """Write the models with their rows where `output` has their tokens; `base` comes first.

    What a model lacks is the base's, or that of the one that has it, or their mean. Rows of no
    token stay where they are; where a model has none, they are the donor's, or the mean of its
    rows. What is `given` is the row of a token of a model, or zero, where a model lacks the token
    or it is `forced`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    states = {name: load_file(path / "model.safetensors") for name, path in paths.items()}
    numbers = {name: vocabulary(path) for name, path in paths.items()}
    aligned = {name: dict(state) for name, state in states.items()}
    tokens = {number: token for token, number in output.items()}
    for tensor in (EMBEDDING, HEAD):
        if tensor not in states["base"]:
            continue
        for name, state in states.items():
            own = state[tensor]
            new = torch.zeros((rows, own.shape[1]), dtype=own.dtype)
            for row in range(rows):
                token = tokens.get(row)
                if token is None:
                    old = states[donor][tensor]
                    mean = old[: max(numbers[donor].values()) + 1].double().mean(0).to(own.dtype)
                    is_free = row < min(len(own), len(old)) and row not in numbers[name].values()
                    new[row] = own[row] if is_free else old[row] if row < len(old) else mean
                    continue
                have = [n for n in states if token in numbers[n]]
                if name in have and token not in forced:
                    new[row] = own[numbers[name][token]]
                elif token in (given or {}):
                    if (one := (given or {})[token]) is not None:
                        new[row] = states[one[0]][tensor][numbers[one[0]][one[1]]]
                elif (has_base and have[0] == "base") or len(have) == 1:
                    new[row] = states[have[0]][tensor][numbers[have[0]][token]]
                else:
                    total = sum(states[n][tensor][numbers[n][token]].float() for n in have)
                    new[row] = (total / len(have)).to(own.dtype)
            aligned[name][tensor] = new
    found = {}
    for name, state in aligned.items():
        found[name] = shutil.copytree(paths["base"], folder / name)
        save_file(state, found[name] / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((found[name] / "config.json").read_text())
        (found[name] / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return found
