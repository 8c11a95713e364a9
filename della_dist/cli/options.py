"""The fields of `RunOptions` as options of commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

from della_dist.runtime.options import RunOptions, flag_of


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `RunOptions` as options.

    What is written goes to `RunOptions`, which says what is wrong with it.
    """
    for option in reversed(fields(RunOptions)):
        facts = option.metadata
        choices = facts.get("choices")
        how: dict[str, Any] = {"metavar": facts["metavar"]}
        if choices:
            how = {
                "metavar": f"[{'|'.join(choices)}]",
                "shell_complete": partial(_completed, choices),
            }
        elif isinstance(option.default, bool):
            how = {"is_flag": True}
        elif isinstance(option.default, tuple):
            how["multiple"] = True
        elif facts["metavar"] == "DIR":
            how["shell_complete"] = folders
        command = click.option(flag_of(option), option.name, help=facts["said"], **how)(command)
    return command


def _completed(
    choices: Sequence[str], context: click.Context, option: click.Parameter, begun: str
) -> list[str]:
    """Return which of the choices a shell may complete a word to."""
    del context, option
    return [choice for choice in choices if choice.startswith(begun)]


def folders(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Let a shell complete a word to directories: models and outputs, where they are local."""
    del context, parameter
    return [CompletionItem(begun, type="dir")]


def options_of(run: Mapping[str, Any]) -> RunOptions:
    """Return the options that were written."""
    given: dict[str, Any] = {}
    for option in fields(RunOptions):
        value = run.get(option.name)
        if value is None or value == ():
            continue
        if isinstance(option.default, bool):
            if value:  # a switch turns its default around
                given[option.name] = not option.default
        else:
            given[option.name] = (
                _number(value) if option.metadata["metavar"] == "INTEGER" else value
            )
    return RunOptions(**given)


def _number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:  # RunOptions says so
        return text
