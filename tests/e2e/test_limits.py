"""What cannot be ranked is refused while planning."""

from __future__ import annotations

from pathlib import Path

import pytest

from della_dist.errors import InputError
from della_dist.runtime.open_plan import open_plan
from tests.merging import config_for
from tests.sparse import link_checkpoint, save_sparse


def test_more_elements_than_ranks(tmp_path: Path) -> None:
    base = save_sparse(tmp_path / "base", {"huge": (1 << 16, 1 << 16)})
    expert = link_checkpoint(base, tmp_path / "expert")
    by_row = config_for(base, [expert], parameters={"density": 0.5})
    assert open_plan(by_row).num_tensors == 1
    whole = config_for(base, [expert], parameters={"density": 0.5}, granularity="tensor")
    with pytest.raises(InputError, match="4294967296 elements that are to be ranked together"):
        open_plan(whole)
