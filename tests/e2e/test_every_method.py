"""What every method of the table does in the same way: stages, vocabularies, open files."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from della_dist.config import METHODS, config_from_mapping
from della_dist.runtime.verify import verify
from tests.checkpoints import Tensor, load_tensors, tensor
from tests.every_method import OF_MANY, document_of, number_of
from tests.merging import run, save_family
from tests.staged import NAMING, by_hand, contents, staged
from tests.vocabularies import align_by_hand, make_models, vocabulary


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three experts: two shards of matrices, a stack, a vector, whole numbers."""
    rng = np.random.default_rng(4)

    def random(dtype: str, *shape: int) -> Tensor:
        return tensor(rng.normal(0, 0.05, shape), dtype)

    base = {
        "model.embed_tokens.weight": random("BF16", 60, 24),
        "model.layers.0.mlp.down_proj.weight": random("BF16", 24, 40),
        "model.layers.0.mlp.experts.weight": random("F32", 2, 30, 24),
        "model.norm.weight": random("BF16", 24),
        "counts": tensor(np.arange(5), "I64"),
    }
    return save_family(tmp_path_factory.mktemp("family"), base, config={"model_type": "llama"})


@pytest.mark.parametrize("method", METHODS)
def test_stages(family: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    """The bytes of runs one after another, where a stage is made by the method, and read by it."""
    base, experts = family
    config = staged(
        document_of(method, base, experts, name="first"),
        document_of(method, experts[2], ["first", experts[1], base]),
    )
    out = tmp_path / "out"
    run(config, out, shard_bytes=4000, keep_stages=True)
    hand = by_hand(config, tmp_path / "hand", shard_bytes=4000)
    assert contents(out, but=NAMING) == contents(hand, but=NAMING)
    stage = tmp_path / "out.stages" / "first"
    assert contents(stage, but=NAMING) == contents(tmp_path / "hand" / "first", but=NAMING)
    first, last = load_tensors(stage), load_tensors(out)
    if method != "passthrough":
        for made, before in ((first, load_tensors(experts[0])), (last, first)):
            assert any(made[name].data != before[name].data for name in before)
    assert verify(str(out), recompute=3).recomputed


NAMES = ("base", "a", "b", "moved")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = make_models(tmp_path_factory.mktemp("models"), vocab=300)
    return {name: made[name] for name in NAMES}


@pytest.fixture(scope="module")
def aligned(
    vocabularies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Path]]:
    """By how many models besides the base are merged: the same, every row at its token."""
    found = {}
    for count in (1, 2, 3):
        paths = {name: vocabularies[name] for name in NAMES[: count + 1]}
        output = dict(vocabulary(paths["base"]))
        for path in paths.values():
            theirs = vocabulary(path)
            for token in sorted(theirs, key=theirs.__getitem__):
                output.setdefault(token, max(output.values()) + 1)
        folder = tmp_path_factory.mktemp(f"aligned{count}")
        found[count] = align_by_hand(paths, output, len(output), folder)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_vocabularies(
    vocabularies: dict[str, Path],
    aligned: dict[int, dict[str, Path]],
    tmp_path: Path,
    method: str,
) -> None:
    """The rows of a union are those of models whose rows were put at their tokens before."""
    made = {}
    given = {"tokenizer_source": "union"}
    by_hand = aligned[number_of(method, 3)]
    for name, paths, keys in (("out", vocabularies, given), ("hand", by_hand, {})):
        base, *models = (paths[one] for one in NAMES if one in paths)
        document = document_of(method, base, models, **keys)
        document["base_model"] = str(base)
        run(config_from_mapping(document), tmp_path / name)
        made[name] = {n: (t.shape, t.data) for n, t in load_tensors(tmp_path / name).items()}
    assert made["out"] == made["hand"]


NUM_MANY = 48
#: That may be open at once, whatever the number of experts.
MOST_FILES = 24


@pytest.fixture(scope="module")
def many(
    family: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """Three experts under many names."""
    base, experts = family
    folder = tmp_path_factory.mktemp("many")
    return base, [
        shutil.copytree(experts[number % 3], folder / f"expert{number}", copy_function=os.link)
        for number in range(NUM_MANY)
    ]


@contextlib.contextmanager
def few_files(count: int) -> Iterator[None]:
    """Let this process open so many files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = (number for number in range(limits[0]) if number not in descriptors)
    last = [next(free) for _ in range(count)][-1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_all(paths: list[Path]) -> None:
    with contextlib.ExitStack() as opened:
        for path in paths:
            opened.enter_context((path / "model.safetensors").open("rb"))


@pytest.mark.parametrize("method", OF_MANY)
def test_files_of_many_experts(many: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    """Half as many may be open as there are experts, each of which is a file."""
    config = config_from_mapping(document_of(method, *many))
    with few_files(MOST_FILES):
        with pytest.raises(OSError, match="Too many open files"):
            open_all(many[1])
        run(config, tmp_path / "out", shard_bytes=4000)
    assert load_tensors(tmp_path / "out").keys() == load_tensors(many[0]).keys()
