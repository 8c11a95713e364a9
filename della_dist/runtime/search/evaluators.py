"""How good a merge is: what a command of the user's says of it.

A command and whatever it starts is one group of processes. It is ended when its time is over, and
when this process ends in any way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, InputChangedError, InputError

#: Stands for the merged model in a command.
MODEL = "{model}"
#: Bytes of what a command wrote that a reason shows.
_SHOWN = 300
#: Bytes that are looked at for its last line.
_TAIL_BYTES = 1 << 20
#: Lists and mappings in each other that a score may come with.
_MOST_DEEP = 32
#: Waits until nobody holds the other end of its input any more, then ends a group of processes.
_ENDS_WITH_US = ("/bin/sh", "-c", 'read -r _; kill -KILL -"$1"', "sh")


class Failed(Exception):
    """An evaluation gave no score: no error of the program, but of a trial."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation said."""

    score: float
    """Finite; more is better."""
    facts: Mapping[str, Any]
    """Whatever else it said, by name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial."""

    seconds: float
    """Of merging and evaluating."""
    evaluation: Evaluation | None = None
    reason: str = ""
    """Why there is no evaluation."""


def outcome_of(evaluate: Callable[[MergeConfig], Evaluation], config: MergeConfig) -> Outcome:
    """Try a configuration: an evaluation that fails is an outcome, too.

    So is a merge that its values break.

    Raises
    ------
    DellaDistError
        If it is not for these values: a disk that is full, inputs that were changed.
    """
    started = time.monotonic()
    try:
        found = evaluate(config)
    except InputChangedError:
        raise
    except (Failed, ConfigError, InputError) as error:
        return Outcome(time.monotonic() - started, reason=str(error))
    return Outcome(time.monotonic() - started, found)


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
        with tempfile.TemporaryFile() as printed:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=printed, start_new_session=True
                )
            except OSError as error:
                raise Failed(f"the command cannot be started: {error}") from error
            try:
                with _ended_with_us(process.pid):
                    process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                raise Failed(f"it took more than {self._timeout_s:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode != 0:
                raise Failed(f"it ended with status {process.returncode}")
            printed.seek(-min(_TAIL_BYTES, printed.seek(0, os.SEEK_END)), os.SEEK_END)
            return evaluation(printed.read().decode(errors="replace"))


@contextlib.contextmanager
def _ended_with_us(group: int) -> Iterator[None]:
    """See to it that a group of processes ends when this process is killed."""
    watcher = subprocess.Popen(
        [*_ENDS_WITH_US, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        assert watcher.stdin is not None
        watcher.stdin.close()


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
    except RecursionError:
        is_deep = True
    else:
        is_deep = _is_deeper(said, _MOST_DEEP)
    if is_deep:  # nor could it be kept
        raise Failed(f"its last line is nested too deeply: {last[:_SHOWN]!r}")
    facts = said if isinstance(said, dict) else {"score": said}
    score = facts.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise Failed(f"its last line has no number `score`: {last[:_SHOWN]!r}")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Failed(f"its score is {value}")
    return Evaluation(value, {key: facts[key] for key in facts if key != "score"})


def _is_deeper(node: Any, depth: int) -> bool:  # noqa: ANN401
    """Tell whether lists and mappings lie in each other more than so many times."""
    if not isinstance(node, (list, dict)):
        return False
    inner = node.values() if isinstance(node, dict) else node
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)
