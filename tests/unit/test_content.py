"""Comparing and sampling tensors reads the right bytes, few of them, from any store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from della_dist.errors import InputError
from della_dist.runtime.task.content import StoredContent
from della_dist.runtime.task.inputs import InputStores
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.samples import SAMPLE_BYTES
from tests.checkpoints import Tensor, save_checkpoint
from tests.remote import upload

SIZE = (5 << 20) + 3
DIFFERENT = (0, SAMPLE_BYTES + 1, SIZE // 2, SIZE - 1)


@pytest.fixture(params=["local", "memory"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointIndex:
    data = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    tensors = {
        "a": Tensor("U8", (SIZE,), data.tobytes()),
        "b": Tensor("U8", (SIZE,), data.tobytes()),
    }
    for place in DIFFERENT:
        changed = data.copy()
        changed[place] ^= 1
        tensors[f"at {place}"] = Tensor("U8", (SIZE,), changed.tobytes())
    tensors["short"] = Tensor("U8", (SIZE - 1,), data[:-1].tobytes())
    folder = save_checkpoint(tmp_path / "model", tensors, num_shards=2)
    if request.param == "local":
        return open_checkpoint(str(folder))
    return open_checkpoint(upload(folder, f"memory://content-{tmp_path.name}"))


def test_equal(checkpoint: CheckpointIndex) -> None:
    content = StoredContent(InputStores(2).get)
    tensors = checkpoint.tensors
    assert content.equal(checkpoint, tensors["a"], tensors["b"])
    assert content.equal(checkpoint, tensors["a"], tensors["a"])
    for name in ("short", *(f"at {place}" for place in DIFFERENT)):
        assert not content.equal(checkpoint, tensors["a"], tensors[name])
        assert not content.equal(checkpoint, tensors[name], tensors["b"])


def test_samples(checkpoint: CheckpointIndex) -> None:
    content = StoredContent(InputStores(2).get)

    def sample(name: str) -> str:
        return content.sample(checkpoint, checkpoint.tensors[name])

    assert sample("a") == sample("b") != sample("at 0")
    assert sample("a") == sample(f"at {SAMPLE_BYTES + 1}")  # the first block alone


@pytest.mark.parametrize("checkpoint", ["local"], indirect=True)
def test_a_shard_that_is_gone(checkpoint: CheckpointIndex, tmp_path: Path) -> None:
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    content = StoredContent(InputStores(2).get)
    with pytest.raises(InputError, match="model-00001"):
        content.sample(checkpoint, checkpoint.tensors["a"])
