"""How good a merge is: what a command of the user's says of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from della_dist.errors import ConfigError

#: Stands for the merged model in a command.
MODEL = "{model}"
#: Bytes of what a command wrote that a reason shows.
_SHOWN = 300


class Failed(Exception):
    """An evaluation gave no score: no error of the program, but of a trial."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation said."""

    score: float
    """Finite; more is better."""
    facts: Mapping[str, Any]
    """Whatever else it said, by name."""


class Command:
    """A command that is run for every merge and ends its output with a line of JSON.

    That line is a number, or an object with a number ``score``.

    Parameters
    ----------
    text
        Split as a shell would, without one; `MODEL` in it becomes the folder of the merge.
    timeout_s
        How long it may take.

    Raises
    ------
    ConfigError
        If it does not name the model, or is no command.
    """

    def __init__(self, text: str, timeout_s: float) -> None:
        self.text = text
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--evaluate {text!r} is no command: {error}.") from None
        if not any(MODEL in word for word in self._words):
            raise ConfigError(
                f"--evaluate {text!r} does not say where the model goes: write {MODEL} there."
            )
        self._timeout_s = timeout_s

    def __call__(self, model: str) -> Evaluation:
        """Evaluate the merge in a folder.

        Raises
        ------
        Failed
            If the command cannot be started, ends with another status than 0, takes too long, or
            says no finite number.
        """
        words = [word.replace(MODEL, model) for word in self._words]
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise Failed(f"the command cannot be started: {error}") from error
        try:
            printed, _ = process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"it took more than {self._timeout_s:g} s") from None
        finally:
            # Whatever it started ends with it, and with this program.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if process.returncode != 0:
            raise Failed(f"it ended with status {process.returncode}")
        return evaluation(printed.decode(errors="replace"))


def evaluation(printed: str) -> Evaluation:
    """Return what the last line of a command's output says.

    Raises
    ------
    Failed
        If it is no score.
    """
    lines = printed.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        said = json.loads(last)
    except ValueError:
        raise Failed(f"its last line is no JSON: {last[:_SHOWN]!r}") from None
    facts = said if isinstance(said, dict) else {"score": said}
    score = facts.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise Failed(f"its last line has no number `score`: {last[:_SHOWN]!r}")
    if not math.isfinite(score):
        raise Failed(f"its score is {score}")
    return Evaluation(float(score), {key: facts[key] for key in facts if key != "score"})
