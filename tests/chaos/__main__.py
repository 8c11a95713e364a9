"""Run the chaos tests and print what they measured: ``python -m tests.chaos``, from the root."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos.figures import VARIABLE, table
from tests.chaos.s3_faults import figures as s3_figures

with tempfile.TemporaryDirectory() as folder:
    figures = Path(folder) / "figures"
    figures.touch()
    os.environ[VARIABLE] = str(figures)
    status = pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]])
    print(table(figures))
for number, row in enumerate(s3_figures()):
    print("| " + " | ".join(row) + " |")
    if number == 0:
        print("|---" * len(row) + "|")
sys.exit(status)
