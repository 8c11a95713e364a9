"""`modules`: stacks of layers cut one by one, against models put together by hand in torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from della_dist import plan
from della_dist.config import config_from_mapping
from della_dist.errors import ConfigError, InputError
from della_dist.runtime.verify import verify
from tests.checkpoints import load_tensors, save_file
from tests.e2e.test_slices import source
from tests.merging import run

ENCODER, DECODER = 4, 3
SIZES: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": ENCODER, "decoder_layers": DECODER,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2,
    "num_layers": ENCODER, "num_decoder_layers": DECODER, "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    **SIZES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
    "suppress_tokens": [3, 4, 5, 6], "begin_suppress_tokens": [3, 4, 5],
}  # fmt: skip
#: Class of the model, of its configuration, and what that is made of.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-untied": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", SIZES),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", SIZES),
    "marian": ("MarianMTModel", "MarianConfig", SIZES),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SIZES),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
LAYER = re.compile(r"^(.*?(?:layers|block)\.)([0-9]+)\.")

#: Stack -> of every layer of the output, the model and its layer there.
Layers = Mapping[str, Sequence[tuple[int, int]]]


def side(name: str) -> str | None:
    """Return the stack that a parameter stands in."""
    found = re.search(r"(?:^|\.)(encoder|decoder|vision_tower|language_model)\.", name)
    return None if found is None else found[1]


def made(kind: str, seed: int, **changed: Any) -> Any:
    """Return a small model; every parameter of it is random."""
    import torch

    of_model, of_config, sizes = KINDS[kind]
    config = getattr(transformers, of_config)(**{**sizes, **changed})
    return scrambled(getattr(transformers, of_model)(config), torch.Generator().manual_seed(seed))


def scrambled(model: Any, generator: Any) -> Any:
    import torch

    with torch.no_grad():
        for one in filter(lambda p: p.requires_grad, model.parameters()):
            one.add_(torch.randn(one.shape, generator=generator) * 0.2)
    return model.eval()


def recomposed(
    models: Sequence[Any], config: Any, layers: Layers, rest: Mapping[str, tuple[int, int]]
) -> Any:
    """Return a model of layers of others.

    Parameters
    ----------
    rest
        Stack -> the models that what stands before its layers is of, and what stands behind them;
        "" for what is of none.
    """
    result = type(models[0])(config).eval()
    states = [model.state_dict() for model in models]
    state = {}
    for name in result.state_dict():
        stack, found = side(name) or "", LAYER.match(name)
        # What T5 has in its first layer is of all layers; umT5 has one in each.
        if found and stack in layers and not is_of_all(name, states[0]):
            model, number = layers[stack][int(found[2])]
            state[name] = states[model][LAYER.sub(rf"\g<1>{number}.", name)]
        else:
            is_behind = re.search(r"(coder|tower)\.(final_|post_)?layer_?norm\.", name) is not None
            state[name] = states[rest.get(stack, rest[""])[is_behind]][name]
    result.load_state_dict(state, strict=True)
    result.tie_weights()
    return result


def is_of_all(name: str, state: Mapping[str, Any]) -> bool:
    in_the_second = LAYER.sub(r"\g<1>1.", name)
    return "relative_attention_bias" in name and in_the_second not in state


def logits(model: Any) -> Any:
    import torch

    words = torch.arange(3, 15)[None]
    with torch.no_grad():
        if model.config.model_type == "whisper":
            sound = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
            return model(input_features=sound, decoder_input_ids=words).logits
        return model(input_ids=words, decoder_input_ids=words.flip(1)).logits


def loaded(kind: Any, path: Path) -> Any:
    """Return what transformers makes of an output, which must miss nothing and add nothing."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def slices(folder: Path, *which: tuple[str, int, int]) -> dict[str, Any]:
    return {"slices": [{"sources": [source(folder, *one)]} for one in which]}


@pytest.mark.parametrize("kind", KINDS)
def test_both_stacks(tmp_path: Path, kind: str) -> None:
    """Of two models, neither beginning with its first layer: the same function, to the bit."""
    import torch

    models = [made(kind, seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        saved(model, tmp_path / str(i))
    out = tmp_path / "out"
    modules = {
        "encoder": slices(tmp_path, ("1", 1, 3), ("0", 0, 4)),
        "decoder": slices(tmp_path, ("0", 1, 3), ("1", 2, 3), ("0", 0, 2)),
    }
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), out)
    made_of = loaded(type(models[0]), out)
    layers = {
        "encoder": [(1, 1), (1, 2), (0, 0), (0, 1), (0, 2), (0, 3)],
        "decoder": [(0, 1), (0, 2), (1, 2), (0, 0), (0, 1)],
    }
    hand = recomposed(
        models, made_of.config, layers, {"encoder": (1, 0), "decoder": (0, 0), "": (0, 0)}
    )
    assert torch.equal(logits(made_of), logits(hand))
    assert not torch.equal(logits(made_of), logits(models[0]))
    assert verify(str(out), recompute=20).model_digest


ALL_OF_ONE = {"": (0, 0)}


def counts(path: Path) -> dict[str, Any]:
    content = json.loads((path / "config.json").read_text())
    return {k: v for k, v in content.items() if k.endswith("_layers")}


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack(tmp_path: Path, kind: str, stack: str) -> None:
    """The other is taken whole, and config.json says how many layers each has."""
    import torch

    model = made(kind, 3)
    saved(model, tmp_path / "a")
    out = tmp_path / "out"
    modules = {stack: slices(tmp_path, ("a", 0, 1), ("a", 0, 3))}
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), out)
    made_of = loaded(type(model), out)
    layers = {stack: [(0, 0), (0, 0), (0, 1), (0, 2)]}
    hand = recomposed([model], made_of.config, layers, ALL_OF_ONE)
    assert torch.equal(logits(made_of), logits(hand))
    numbers = {"encoder": ENCODER, "decoder": DECODER, stack: 4}
    names = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
    expected = {
        names[s] if kind == "t5" else f"{s}_layers": number for s, number in numbers.items()
    }
    assert counts(out) == expected
    before, after = (json.loads((one / "config.json").read_text()) for one in (tmp_path / "a", out))
    assert {**before, **expected} == after


def test_heads_that_are_named_by_their_layer(tmp_path: Path) -> None:
    """Whisper's timestamps read the attention of some."""
    model = made("whisper", 3)
    model.generation_config.alignment_heads = [[0, 1], [2, 0], [2, 1]]
    saved(model, tmp_path / "a")
    for name, ranges, expected in (
        ("one", [("a", 2, 3), ("a", 1, 3)], [[0, 0], [0, 1], [2, 0], [2, 1]]),
        ("none", [("a", 1, 2)], None),
    ):
        modules = {"decoder": slices(tmp_path, *ranges)}
        out = tmp_path / name
        run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), out)
        stated = json.loads((out / "generation_config.json").read_text())
        assert stated.get("alignment_heads") == expected
    modules = {"encoder": slices(tmp_path, ("a", 1, 2))}
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), tmp_path / "en")
    files = [(tmp_path / name / "generation_config.json").read_bytes() for name in ("a", "en")]
    assert files[0] == files[1]


def test_layers_that_are_averaged(tmp_path: Path) -> None:
    """Each module with parameters of its own; models that are given whole are of all layers."""
    import torch

    models = [made("bart", seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        saved(model, tmp_path / str(i))
    sources = [source(tmp_path, "0", 1, 3), source(tmp_path, "1", 0, 2, weight=1)]
    whole = [{"model": str(tmp_path / name)} for name in "01"]
    modules = {
        "decoder": {"slices": [{"sources": sources}], "parameters": {"weight": 3}},
        "encoder": {"models": whole},
    }
    content = {"merge_method": "linear", "modules": modules, "parameters": {"weight": 0.5}}
    out = tmp_path / "out"
    run(config_from_mapping(content), out)
    made_of = loaded(type(models[0]), out)
    first, second = (model.state_dict() for model in models)
    state = {}
    for name in made_of.state_dict():
        shares, number = (0.5, 0.5) if side(name) == "encoder" else (3.0, 1.0), LAYER.match(name)
        mine, other = name, name
        if side(name) == "decoder" and number:
            mine = LAYER.sub(rf"\g<1>{int(number[2]) + 1}.", name)
        total = shares[0] + shares[1]
        state[name] = (shares[0] * first[mine] + shares[1] * second[other]) / total
    hand = type(models[0])(made_of.config).eval()
    hand.load_state_dict(state)
    assert torch.equal(logits(made_of), logits(hand))
    again = json.loads((out / "della_manifest.json").read_text())["config"]
    assert list(again["modules"]) == ["decoder", "encoder"]
    assert again["modules"]["encoder"]["slices"][0]["sources"][1]["layer_range"] == [0, ENCODER]
    assert config_from_mapping(again).normalized() == again
    assert run(config_from_mapping(content), out).already_complete
    described = plan(content, str(out))
    assert described.complete
    assert described.layers[0].startswith("decoder 0 to 1: 1 to 2 of ")
    assert described.layers[1].startswith(f"encoder 0 to {ENCODER - 1}: 0 to {ENCODER - 1} of ")


@pytest.mark.parametrize("kind", ["t5", "t5-untied", "marian", "whisper"])
def test_as_if_the_models_had_been_cut_before(tmp_path: Path, kind: str) -> None:
    """With random words too: by the names that the layers have in the output."""
    models = [made(kind, seed) for seed in (0, 1, 2)]
    layers = {"encoder": [(0, 2), (0, 3), (0, 0), (0, 1)], "decoder": [(0, 1), (0, 0), (0, 1)]}
    for i, model in enumerate(models):
        saved(model, tmp_path / str(i))
        saved(recomposed([model], model.config, layers, ALL_OF_ONE), tmp_path / f"cut{i}")

    def both(*ranges: tuple[int, int]) -> dict[str, Any]:
        made_of = [[source(tmp_path, name, *one) for name in "12"] for one in ranges]
        return {"slices": [{"sources": sources} for sources in made_of]}

    content = {
        "merge_method": "della",
        "parameters": {"density": 0.6, "weight": 0.7},
        "dtype": "bfloat16",
        "seed": 5,
    }
    modules = {"encoder": both((2, 4), (0, 2)), "decoder": both((1, 2), (0, 2))}
    cut = {**content, "modules": modules, "base_model": str(tmp_path / "0")}
    run(config_from_mapping(cut), tmp_path / "sliced", shard_bytes=10_000)
    listed = [{"model": str(tmp_path / f"cut{i}")} for i in (1, 2)]
    whole = {**content, "models": listed, "base_model": str(tmp_path / "cut0")}
    run(config_from_mapping(whole), tmp_path / "whole")
    assert load_tensors(tmp_path / "sliced") == load_tensors(tmp_path / "whole")
    loaded(type(models[0]), tmp_path / "sliced")
    assert verify(str(tmp_path / "sliced"), recompute=30).model_digest


def images(seed: int, **changed: Any) -> Any:
    """Return a small LLaVA."""
    import torch

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
            num_attention_heads=2,
        ),
        image_token_index=31,
        **changed,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    return scrambled(model, torch.Generator().manual_seed(seed))


LAYERS = 4


def seen(model: Any) -> Any:
    """Return the logits of words behind an image of four patches."""
    import torch

    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([[3, 31, 31, 31, 31, 5, 6, 7]])
    with torch.no_grad():
        return model(input_ids=words, pixel_values=pixels).logits


@pytest.mark.parametrize("named", [("vision_tower",), ("visual", "language_model"), ("text",)])
def test_a_model_with_images(tmp_path: Path, named: tuple[str, ...]) -> None:
    import torch

    models = [images(seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        saved(model, tmp_path / str(i))
    vision = slices(tmp_path, ("1", 0, 2), ("0", 2, 5), ("0", 4, 5))
    text = slices(tmp_path, ("0", 0, 3), ("1", 1, 4))
    modules = {name: vision if name.startswith("vis") else text for name in named}
    out = tmp_path / "out"
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), out)
    made_of = loaded(type(models[0]), out)
    layers: dict[str, Sequence[tuple[int, int]]] = {}
    rest = {"": (0, 0)}
    if named != ("text",):
        layers["vision_tower"] = [(1, 0), (1, 1), (0, 2), (0, 3), (0, 4), (0, 4)]
        rest["vision_tower"] = (1, 0)
        if len(named) == 1:  # all else is of the first slice
            rest[""] = (1, 1)
    if named != ("vision_tower",):
        layers["language_model"] = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    hand = recomposed(models, made_of.config, layers, rest)
    if "language_model" in layers:
        hand.model.language_model.norm.weight = models[1].model.language_model.norm.weight
        hand.lm_head.weight = models[1].lm_head.weight
    assert torch.equal(seen(made_of), seen(hand))
    config = json.loads((out / "config.json").read_text())
    found = (config["text_config"], config["vision_config"])
    expected = (6 if "language_model" in layers else 4, 6 if "vision_tower" in layers else 5)
    assert tuple(one["num_hidden_layers"] for one in found) == expected
    manifest = json.loads((out / "della_manifest.json").read_text())["config"]
    assert ("slices" in manifest) is (named == ("text",))
    assert verify(str(out), recompute=20).model_digest


def refused(modules: Mapping[str, Any], **keys: Any) -> str:
    """Return why a configuration of modules, or a plan of it, is refused."""
    with pytest.raises((ConfigError, InputError)) as caught:
        plan({"merge_method": "passthrough", "modules": modules, **keys})
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved(made("t5", 1), folder / "t5")
    saved(made("t5", 1, d_ff=16), folder / "narrow")
    saved(made("bart", 1), folder / "bart")
    saved(images(1), folder / "images")
    saved(images(1, vision_feature_layer=3), folder / "third")
    return folder


def test_names_of_no_stack(folder: Path) -> None:
    t5, text = slices(folder, ("t5", 0, 2)), slices(folder, ("images", 0, 2))
    message = refused({"shared": {"models": [{"model": str(folder / "t5")}]}, "encoder": t5})
    assert "`modules.shared` is no stack of layers of" in message
    assert "which has encoder and decoder" in message
    message = refused({"encoder": t5, "decodr": t5, "body": t5})
    assert "2 problems. (1) `modules.body`" in message
    assert "(2) `modules.decodr`" in message
    assert "has text_decoder and vision_tower" in refused({"decoder": text})
    message = refused({"text_model": text, "language_model": text})
    assert "`modules.text_model` is the same stack of layers as `modules.language_model`" in message


def test_an_encoder_and_a_decoder_want_names(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan({"merge_method": "passthrough", **slices(folder, ("t5", 0, 2))})
    assert "is an encoder and a decoder, and `slices` does not say of which" in str(caught.value)
    assert "`modules: {encoder: {slices: [...]}, decoder: {slices: [...]}}`" in str(caught.value)
    assert "is an encoder and a decoder" in refused({"text": slices(folder, ("t5", 0, 2))})


def test_layers_that_a_stack_has_not(folder: Path) -> None:
    t5 = slices(folder, ("t5", 0, 2))
    message = refused({"encoder": t5, "decoder": slices(folder, ("t5", 0, 4))})
    assert "has 3 layers in its decoder, and `layer_range: [0, 4]` asks for more" in message
    message = refused({"vision_tower": slices(folder, ("images", 3, 6))})
    assert "has 5 layers in its vision_tower, and `layer_range: [3, 6]` asks for more" in message
    message = refused({"encoder": slices(folder, ("t5", 0, 2), ("bart", 0, 2)), "decoder": t5})
    assert "bart has 1 of the 76 tensors of" in message
    # Its encoder fits, but no decoder that reads an encoder of another size.
    message = refused({"encoder": t5, "decoder": slices(folder, ("narrow", 0, 2))})
    assert "layers of other sizes do not make one model" in message
    message = refused({"encoder": slices(folder, ("images", 0, 2)), "decoder": t5})
    assert f"{folder / 'images'} has no decoder by its config.json" in message


def test_problems_of_every_module_are_said() -> None:
    def one(*ranges: list[int]) -> dict[str, Any]:
        sources = [{"model": f"m{i}", "layer_range": r} for i, r in enumerate(ranges)]
        return {"slices": [{"sources": sources}]}

    message = refused({"encoder": one([0, 2], [0, 3]), "decoder": one([0, 2], [1, 3])})
    assert "2 problems. (1) `modules.decoder.slices[0].sources` lists 2 models" in message
    assert "(2) `modules.encoder.slices[0].sources` lists 2 models" in message
    twice = {"models": [{"model": "a"}, {"model": "a"}]}
    message = refused({"encoder": twice, "decoder": one([0, 2])}, merge_method="linear")
    assert "`modules.encoder.models` is 'a' again, with the same layers" in message
    scaled = {**one([0, 2]), "parameters": {"rescale": "inverse"}}
    message = refused(
        {"encoder": scaled, "decoder": one([0, 2])}, merge_method="ties", base_model="b"
    )
    assert "`modules.encoder.parameters.rescale` is inverse, but ties has no" in message


def test_layers_whose_output_is_read_by_their_number(folder: Path) -> None:
    """The projector reads what is behind the third layer: it must be the third one still."""
    message = refused({"vision_tower": slices(folder, ("third", 0, 2), ("third", 3, 5))})
    assert "`vision_feature_layer` is about layer 3, which is no longer the same" in message
    kept = slices(folder, ("third", 0, 3), ("third", 4, 5))
    assert plan({"merge_method": "passthrough", "modules": {"vision_tower": kept}}).num_tensors


def test_layers_that_cannot_be_counted(folder: Path, tmp_path: Path) -> None:
    saved(images(1), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["vision_config"]["num_hidden_layers"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    message = refused({"vision_tower": slices(tmp_path, ("a", 0, 2))})
    assert "does not say how many layers its vision_tower has" in message
    text = {"merge_method": "passthrough", **slices(tmp_path, ("a", 0, 2))}
    assert plan(text).num_tensors


def test_a_decoder_that_has_as_many_layers_because_the_encoder_has(tmp_path: Path) -> None:
    """T5's config.json may leave the number of the decoder's out."""
    model = made("t5", 1, num_decoder_layers=ENCODER)
    saved(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["num_decoder_layers"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    for stack, numbers in (("encoder", (2, ENCODER)), ("decoder", (ENCODER, 2))):
        out = tmp_path / stack
        modules = {stack: slices(tmp_path, ("a", 1, 3))}
        run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), out)
        loaded(type(model), out)
        assert counts(out) == dict(zip(("num_layers", "num_decoder_layers"), numbers, strict=True))


def test_layers_of_another_kind_that_are_spread(tmp_path: Path) -> None:
    """Switch: every so many layers has experts, and how many follows from the number of layers."""
    saved(made("t5", 1), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["num_sparse_decoder_layers"] = 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    message = refused({"decoder": slices(tmp_path, ("a", 0, 2))})
    assert "`num_sparse_decoder_layers` spreads layers of another kind" in message


def test_an_embedding_stored_three_times_stays_one(tmp_path: Path) -> None:
    """As old checkpoints of T5 are: with random words, the copies would drift apart."""
    for i in range(3):
        saved(made("t5", i), tmp_path / str(i))
        tensors = load_tensors(tmp_path / str(i))
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"]
        save_file(tmp_path / str(i) / "model.safetensors", tensors)
    both = {
        "slices": [
            {"sources": [source(tmp_path, name, *one) for name in "12"]} for one in ((1, 3), (0, 2))
        ]
    }
    content: dict[str, Any] = {"merge_method": "della", "base_model": str(tmp_path / "0")}
    content |= {"modules": {"encoder": both, "decoder": both}, "parameters": {"density": 0.5}}
    run(config_from_mapping(content), tmp_path / "out")
    made_of = load_tensors(tmp_path / "out")
    assert made_of["encoder.embed_tokens.weight"] == made_of["shared.weight"]
    assert made_of["decoder.embed_tokens.weight"] == made_of["shared.weight"]
    assert verify(str(tmp_path / "out"), recompute=100).model_digest


def test_embeddings_of_each_side(tmp_path: Path) -> None:
    """Marian may have two languages' own: each comes with its stack."""
    models = [made("marian", seed, share_encoder_decoder_embeddings=False) for seed in (1, 2)]
    for i, model in enumerate(models):
        saved(model, tmp_path / str(i))
    modules = {"encoder": slices(tmp_path, ("1", 0, 2)), "decoder": slices(tmp_path, ("0", 0, 2))}
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), tmp_path / "out")
    theirs = [load_tensors(tmp_path / name) for name in ("0", "1", "out")]
    for stack, number in (("encoder", 1), ("decoder", 0)):
        name = f"model.{stack}.embed_tokens.weight"
        assert theirs[2][name] == theirs[number][name]
    loaded(type(models[0]), tmp_path / "out")


def test_a_configuration_nested_for_each_side(tmp_path: Path) -> None:
    """T5Gemma's, whose lists by layer follow in each."""
    import torch

    of_side = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
    }  # fmt: skip
    side_config = transformers.T5GemmaModuleConfig(**of_side)
    config = transformers.T5GemmaConfig(encoder=side_config, decoder=side_config, vocab_size=32)
    model = scrambled(
        transformers.T5GemmaForConditionalGeneration(config), torch.Generator().manual_seed(1)
    )
    saved(model, tmp_path / "a")
    modules = {
        "encoder": slices(tmp_path, ("a", 0, 1), ("a", 2, 4)),
        "decoder": slices(tmp_path, ("a", 1, 3), ("a", 1, 4)),
    }
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), tmp_path / "out")
    made_of = loaded(type(model), tmp_path / "out")
    numbers = {"encoder": [0, 2, 3], "decoder": [1, 2, 1, 2, 3]}
    for stack, layers in numbers.items():
        kinds = getattr(config, stack).layer_types
        assert getattr(made_of.config, stack).layer_types == [kinds[n] for n in layers]
    hand = recomposed(
        [model], made_of.config, {s: [(0, n) for n in ns] for s, ns in numbers.items()}, ALL_OF_ONE
    )
    assert torch.equal(logits(made_of), logits(hand))


def test_a_vision_tower_that_counts_its_depth(tmp_path: Path) -> None:
    """Qwen's, some of whose layers are named as of another kind."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "out_hidden_size": 16, "fullatt_block_indexes": [1, 3], "patch_size": 4,
        },
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    saved(model, tmp_path / "a")
    modules = {"visual": slices(tmp_path, ("a", 0, 2), ("a", 3, 4))}
    run(config_from_mapping({"merge_method": "passthrough", "modules": modules}), tmp_path / "out")
    made_of = loaded(type(model), tmp_path / "out")
    vision = made_of.config.vision_config
    assert (vision.depth, vision.fullatt_block_indexes) == (3, [1, 2])
    before, after = (load_tensors(tmp_path / name) for name in ("a", "out"))
    moved = [name for name in after if "blocks.2." in name]
    assert moved
    assert all(after[n] == before[n.replace("blocks.2.", "blocks.3.")] for n in moved)
    assert {n for n in before if "blocks." not in n} == {n for n in after if "blocks." not in n}
