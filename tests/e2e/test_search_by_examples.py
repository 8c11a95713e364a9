"""`della-dist search --data`: merges are scored by how well they predict experts' responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from della_dist.cli import main
from della_dist.config import config_from_mapping
from della_dist.errors import InputError
from della_dist.runtime.options import RunOptions
from della_dist.runtime.search.evaluators import Failed
from della_dist.runtime.search.examples import load_skill
from della_dist.runtime.search.responses import Responses
from della_dist.runtime.search.spaces import open_space
from tests.merging import assert_paragraph

LETTERS = "abcdefghijklmnopqrstuvwxyz:"
#: What each expert answers, whatever it is asked.
ANSWERS = {"math": "xyxyxy", "code": "pqqpqq"}


def items(name: str, count: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    asked = ("".join(rng.choice(list(LETTERS[:16]), 4)) + ":" for _ in range(count))
    return [{"prompt": prompt, "response": ANSWERS[name]} for prompt in dict.fromkeys(asked)]


def train(model: Any, tokenizer: Any, texts: list[str], steps: int) -> None:
    """Train on texts of equal length."""
    ids = torch.tensor([tokenizer(text)["input_ids"] + [0] for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = ids[step * 16 % len(ids) :][:16]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: products of a few numbers wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, two trained experts, and examples of both."""
    folder = tmp_path_factory.mktemp("trained")
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    vocabulary = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                drawn = rng.normal(0, parameter.shape[1] ** -0.5, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    train(model, tokenizer, ["".join(rng.choice(list(LETTERS), 11)) for _ in range(64)], 20)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("base", *ANSWERS):
        model.load_state_dict(base)
        if name != "base":
            texts = [one["prompt"] + one["response"] for one in items(name, 64, 2)]
            train(model, tokenizer, texts, 40)
            lines = [json.dumps(one) for one in items(name, 24, 3)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": {"search": [0.0, 1.5]}}}
            for name in ANSWERS
        ],
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(document))
    return folder


def options(folder: Path) -> list[str]:
    return [word for name in ANSWERS for word in ("--data", f"{name}={folder / name}.jsonl")]


def invoke(folder: Path, *words: object) -> Result:
    return CliRunner().invoke(main, ["search", str(folder / "space.yaml"), *map(str, words)])


def config_of(folder: Path, *weights: float) -> Any:
    document = yaml.safe_load((folder / "space.yaml").read_text())
    for one, weight in zip(document["models"], weights, strict=True):
        one["parameters"]["weight"] = weight
    return config_from_mapping(document)


def loss_of(folder: Path, weights: dict[str, float], path: Path) -> float:
    """Return the loss of a merge done by hand, example by example."""
    states = {
        name: LlamaForCausalLM.from_pretrained(folder / name).state_dict()
        for name in ("base", *weights)
    }
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    base = states["base"]
    model.load_state_dict(
        {
            key: base[key] + sum(w * (states[name][key] - base[key]) for name, w in weights.items())
            for key in base
        }
    )
    total, count = 0.0, 0
    for one in load_skill("x", path).searched:
        prompt, response = (
            [LETTERS.index(c) + 1 for c in text] for text in (one.prompt, one.response)
        )
        ids = torch.tensor([[*prompt, *response, 0]])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0].log_softmax(-1)
        for i in range(len(prompt), ids.shape[1]):
            total -= float(found[i - 1, ids[0, i]])
            count += 1
    return total / count


def test_scores(family: Path, tmp_path: Path) -> None:
    """0 as the base, 1 as each expert; what is copied into the model is what is loaded."""
    skills = [load_skill(name, family / f"{name}.jsonl") for name in ANSWERS]
    config = config_of(family, 0.5, 0.5)
    responses = Responses(config, skills, tmp_path / "trial", RunOptions())
    assert not (tmp_path / "trial").exists()
    scores = dict(responses(config_of(family, 0.0, 0.0)).facts)
    assert scores == pytest.approx(dict.fromkeys(ANSWERS, 0.0), abs=1e-6)
    assert responses(config_of(family, 1.0, 0.0)).facts["math"] == pytest.approx(1.0, abs=1e-6)
    found = responses(config_of(family, 0.7, 0.4))
    assert found.score == pytest.approx(np.mean(list(found.facts.values())))
    for name in ANSWERS:
        path = family / f"{name}.jsonl"
        base, own, merged = (
            loss_of(family, weights, path)
            for weights in ({}, {name: 1.0}, {"math": 0.7, "code": 0.4})
        )
        assert found.facts[name] == pytest.approx((base - merged) / (base - own), abs=1e-4)
    responses._is_copied_to = False  # every merge in a folder, loaded by transformers
    assert responses(config_of(family, 0.7, 0.4)) == found


def test_it_finds_more_than_one_lambda_for_all(family: Path, tmp_path: Path) -> None:
    result = invoke(family, tmp_path / "out", *options(family), "--trials", 12, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    held_out = found["held_out"]
    assert list(held_out)[:3] == ["base", "math", "code"]
    assert held_out["base"] == {"math": 0.0, "code": 0.0}
    assert (held_out["math"]["math"], held_out["code"]["code"]) == (1.0, 1.0)
    means = {name: np.mean(list(scores.values())) for name, scores in held_out.items()}
    (plain,) = (mean for name, mean in means.items() if name.startswith("task arithmetic"))
    assert means["best"] > plain - 0.02
    assert max(one["score"] for one in found["trials"]) == found["score"] > 0.5
    LlamaForCausalLM.from_pretrained(tmp_path / "out")
    again = invoke(family, tmp_path / "out", *options(family), "--trials", 12)
    assert "held out" in again.stdout
    assert f"score of the best               {found['score']:.6g}" in again.stdout


def test_auto(family: Path, tmp_path: Path) -> None:
    """The configuration as it is comes first, then its lambda; all are compared at the end."""
    document = yaml.safe_load((family / "space.yaml").read_text())
    for one in document["models"]:
        one["parameters"] = {"weight": 0.8}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(document))
    words = ["search", "--auto", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--seed", "3"]
    result = CliRunner().invoke(main, [*words, *options(family), "--trials", "6", "--json"])
    assert result.exit_code == 0, result.output
    assert "searching weight of math in self_attn: 0 to 1.6, 0.8 first" in result.stderr
    found = json.loads(result.stdout)
    assert list(found["labels"].values())[-1] == "lambda"
    lambdas = [one["values"]["parameters.lambda"] for one in found["trials"]]
    assert lambdas[:5] == [1.0, 0.5, 0.35, 0.7, 1.4]
    skills = [load_skill(name, family / f"{name}.jsonl") for name in ANSWERS]
    responses = Responses(config_of(family, 1, 1), skills, tmp_path / "trial", RunOptions())
    assert responses(config_of(family, 0.8, 0.8)).score == pytest.approx(found["first"], abs=1e-6)
    held_out = responses.closing(config_of(family, 0.8, 0.8), config_of(family, 1, 1))
    assert held_out["first"] == pytest.approx(found["held_out"]["first"], abs=1e-6)
    # What was searched is a space by itself.
    space = open_space(tmp_path / "out.search" / "space.yaml", auto=False)
    assert {one.name: one.label for one in space.dimensions} == found["labels"]
    assert list(space.first.values()) == [*[0.8] * 6, 1.0]


def test_losses_that_are_not_finite(family: Path, tmp_path: Path) -> None:
    """Are trials without a score, rows without numbers; of base and experts they are refused."""
    skills = [load_skill(name, family / f"{name}.jsonl") for name in ANSWERS]
    responses = Responses(config_of(family, 1, 1), skills, tmp_path / "trial", RunOptions())
    far = config_of(family, 1e30, 1e30)
    with pytest.raises(Failed, match="its loss on math is nan"):
        responses(far)
    assert responses.closing(far, config_of(family, 1, 1))["first"] == {"math": None, "code": None}
    broken = yaml.safe_load((family / "space.yaml").read_text())
    model = LlamaForCausalLM.from_pretrained(family / "math")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "broken" / "math")
    AutoTokenizer.from_pretrained(family / "math").save_pretrained(tmp_path / "broken" / "math")
    broken["models"][0] = {"model": str(tmp_path / "broken" / "math")}
    config = config_from_mapping({**broken, "models": broken["models"][:1]})
    with pytest.raises(InputError, match="the expert math has a loss of nan"):
        Responses(config, skills[:1], tmp_path / "trial", RunOptions())


def test_what_is_held_out_is_not_searched(family: Path) -> None:
    skill = load_skill("math", family / "math.jsonl")
    assert len(skill.searched) == len(skill.held_out) == 12
    assert not set(skill.searched) & set(skill.held_out)


def test_conversations(family: Path, tmp_path: Path) -> None:
    """The answer alone is predicted, as the template writes it."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": one["prompt"]},
                    {"role": "assistant", "content": one["response"]},
                ]
            }
        )
        for one in items("math", 24, 3)
    ]
    (tmp_path / "math.jsonl").write_text("\n".join(lines))
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
        "{% endfor %}"
    )
    for name in ("base", *ANSWERS):
        (family / name / "chat_template.jinja").write_text(template)
    try:
        asked = [load_skill("math", path / "math.jsonl") for path in (tmp_path, family)]
        config = config_of(family, 0.7, 0.4)
        found = [
            Responses(config, [skill], tmp_path / "trial", RunOptions()).closing(config, config)
            for skill in asked
        ]
        # Other halves of the same examples.
        assert found[0]["best"]["math"] == pytest.approx(found[1]["best"]["math"], abs=0.1)
    finally:
        for name in ("base", *ANSWERS):
            (family / name / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: is no JSON"),
        ("[]", "has neither texts"),
        ('{"prompt": "a"}', "has neither texts"),
        ('{"prompt": "a", "response": ""}', "has neither texts"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has neither texts"),
        ('{"prompt": "a", "response": "b"}', "has 2 different examples"),
    ],
)
def test_what_are_no_examples(family: Path, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "math.jsonl").write_text('{"prompt": "c", "response": "d"}\n' + f"{line}\n" * 5)
    result = invoke(family, tmp_path / "out", "--data", f"math={tmp_path / 'math.jsonl'}")
    assert_paragraph(result, 2, "--data math=", words)


def test_what_is_refused(family: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", f"math={family / 'math.jsonl'}"
    for words, said in (
        ([], "either --evaluate"),
        (["--data", data, "--evaluate", "true {model}"], "either --evaluate"),
        (["--data", "math"], "the name of an expert and a file"),
        (["--data", data, "--data", data], "is given twice"),
        (
            ["--data", f"art={family / 'math.jsonl'}"],
            "no expert is called art; there are math, code",
        ),
        (["--data", "math=/nowhere.jsonl"], "cannot be read"),
        (["--data", f"code={family / 'math.jsonl'}"], "no better than the base"),
    ):
        assert_paragraph(invoke(family, out, *words), 2, said)
    assert not out.exists()
