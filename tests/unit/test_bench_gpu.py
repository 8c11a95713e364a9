"""The benchmark of GPUs runs, on torch's CPU device, and sees another digest where there is one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from della_dist.config.methods import METHODS
from della_dist.ops.gpu.backend import TorchBackend
from tests.bench import bench_gpu

TINY = ("--device", "cpu", "--million", "0.01", "--cols", "48", "--rounds", "1", "--copy", "1MiB",
        "--threads", "2", "--memory", "256MiB")  # fmt: skip


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    status = bench_gpu.main([*TINY, *arguments, "--json"])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = report(capsys, "--methods", "della", "ties", "wudi")
    assert status == 0
    assert [line["kind"] for line in lines] == ["copies", *["products"] * 4, *["merged"] * 3]
    assert all(line["is_equal"] for line in lines[5:])
    assert all(line["device_m_per_s"] > 0 < line["device_gb_per_s"] for line in lines[5:])
    assert all(line["gflop_per_s"] > 0 for line in lines[1:5])


def test_another_digest_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = TorchBackend.merge

    def wrong(self: TorchBackend, recipe: Any, prepared: Any, block: Any, out: Any) -> Any:
        stats = merge(self, recipe, prepared, block, out)
        out[-1] ^= 1
        return stats

    monkeypatch.setattr(TorchBackend, "merge", wrong)
    status, lines = report(capsys, "--methods", "task_arithmetic")
    assert status == 1
    assert not lines[-1]["is_equal"]


def test_every_method_is_measured_but_those_of_singular_values() -> None:
    assert set(METHODS) - set(bench_gpu.TIMED) == {"iso_c", "tsv"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no CUDA device here: nothing was measured")
