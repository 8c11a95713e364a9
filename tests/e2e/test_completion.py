"""What shells complete, asked in the shells themselves: those that are installed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: A word to complete, and what comes of it.
WORDS = {
    "della-dist mer": "della-dist merge",
    "della-dist merge --thr": "della-dist merge --threads",
    "della-dist merge --device cud": "della-dist merge --device cuda",
    "della-dist verify outp": "della-dist verify outputs/",
    "della-dist merge merge.yaml outp": "della-dist merge merge.yaml outputs/",
    "della-dist init outp": "della-dist init outputs/",
    "della-dist plan mer": "della-dist plan merge.yaml",
}
ESCAPES = re.compile(r"\x1b(\[[\d;?>=]*[a-zA-Z]|[=>]|\][^\x07]*\x07)")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return one with the program on its path; there are a folder and a configuration."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "merge.yaml").touch()
    program = tmp_path / "bin" / "della-dist"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m della_dist "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TERM": "xterm"}


def line_of_readme(shell: str) -> str:
    """Return what the README says to write."""
    (line,) = [line for line in README.splitlines() if f"{shell}_source" in line]
    return line.partition("  #")[0].strip()


class Terminal:
    """A shell on a terminal, and what it has shown."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + 60
        while text not in ESCAPES.sub("", self.shown):
            ready, _, _ = select.select([self._ours], [], [], deadline_s - time.monotonic())
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._ours, 4096).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.parametrize(
    "command",
    [
        ["bash", "--norc", "--noprofile", "-i"],
        ["zsh", "-f", "-i"],
    ],
    ids=lambda command: command[0],
)
def test_at_a_terminal(command: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    terminal = Terminal(command, tmp_path, environment)
    try:
        if command[0] == "zsh":
            terminal.type("autoload -Uz compinit; compinit -u\n")
        terminal.type(f"{line_of_readme(command[0])}; echo 're'ady\n")
        terminal.wait_for("ready")
        for begun, whole in WORDS.items():
            terminal.shown = ""
            terminal.type(f"{begun}\t")
            terminal.wait_for(whole)
            terminal.type("\x15")  # ^U takes the line away
    finally:
        terminal.close()


def test_fish(tmp_path: Path, environment: dict[str, str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    asked = "; ".join(f'complete -C "{begun}"' for begun in WORDS)
    done = subprocess.run(
        ["fish", "-c", f"{line_of_readme('fish')}; {asked}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {line.partition("\t")[0] for line in done.stdout.splitlines()}
    assert {whole.rpartition(" ")[2] for whole in WORDS.values()} <= found
