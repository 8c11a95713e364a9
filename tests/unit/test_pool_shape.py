"""How many actors a cluster is asked for."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from della_dist.errors import ConfigError
from della_dist.runtime.engines.ray.sizing import PoolShape, pool_shape
from della_dist.runtime.options import RunOptions

GIB = 1 << 30


def node(cpus: int, gpus: int = 0, memory: int = 64 * GIB) -> dict[str, float]:
    return {"CPU": cpus, "memory": memory, **({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([node(2)], {}, PoolShape(1, 2, uses_gpu=False)),
        ([node(32), node(32)], {}, PoolShape(8, 8, uses_gpu=False)),
        ([node(32), node(12)], {"threads": 4}, PoolShape(11, 4, uses_gpu=False)),
        # The memory of a node bounds what fits: 1 GiB of buffers, half of one for the rest.
        ([node(32, memory=4 * GIB)], {"threads": 4}, PoolShape(2, 4, uses_gpu=False)),
        ([node(32), node(32)], {"workers": 3}, PoolShape(3, 8, uses_gpu=False)),
        ([node(64, gpus=4), node(64)], {}, PoolShape(4, 8, uses_gpu=True)),
        # Few cores beside many GPUs: every GPU gets its actor all the same.
        ([node(32, gpus=8), node(64, gpus=8)], {}, PoolShape(16, 4, uses_gpu=True)),
        ([node(4, gpus=8)], {}, PoolShape(4, 1, uses_gpu=True)),
        # One without a GPU beside is left alone; if none with a GPU has room, it is taken.
        ([node(64), node(8, gpus=1), node(4)], {}, PoolShape(1, 8, uses_gpu=True)),
        ([node(8, gpus=1, memory=GIB), node(64)], {}, PoolShape(8, 8, uses_gpu=False)),
        ([node(64, gpus=4)], {"device": "cpu"}, PoolShape(8, 8, uses_gpu=False)),
        ([node(64)] * 100, {}, PoolShape(50, 8, uses_gpu=False)),  # one a task
    ],
)
def test_shape(nodes: list[Any], options: dict[str, Any], expected: PoolShape) -> None:
    assert pool_shape(RunOptions(**options), 50, nodes) == expected


def test_no_room(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [node(2), node(4, memory=GIB)]
    with pytest.raises(ConfigError, match=r"no node with 4 CPU cores, 1536 MiB of memory"):
        pool_shape(RunOptions(threads=4), 50, nodes)
    with pytest.raises(ConfigError, match="and a GPU"):
        pool_shape(RunOptions(device="cuda"), 50, nodes)
    # With --workers an autoscaler may bring it.
    with caplog.at_level(logging.WARNING, "della_dist.run"):
        assert pool_shape(RunOptions(threads=4, workers=2), 50, nodes).num_workers == 2
    assert "waiting for one" in caplog.text
