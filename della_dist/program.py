"""What makes the command line a program: streams, signals, errors in one paragraph, exit status."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import logging
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from della_dist.errors import ConfigError, StorageError
from della_dist.locations import masked
from della_dist.mergekit_options import MERGEKIT_OPTIONS
from della_dist.report import run_log, streams
from della_dist.report.failures import failure_of, paragraph
from della_dist.report.run_events import RunFailed

#: What the libraries reserve on a few cores, with room to compile the kernels. Below of it they do
#: not raise anything: LLVM ends the process.
_LEAST_ADDRESS_SPACE = 1 << 30

#: A signal that a callback dropped is raised again after so long.
_AGAIN_S = 0.01


class Commands(click.Group):
    """A group of commands whose usage errors are one paragraph, as all errors are."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program; see click."""
        streams.guard()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse what stands before the command; see click."""
        try:
            return super().make_context(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _echo_error(_usage(error, "della-dist"))
            raise click.exceptions.Exit(error.exit_code) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; see click."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            named = f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip()
            path = named if error.ctx is None else error.ctx.command_path
            _echo_error(_usage(error, path))
            ctx.exit(error.exit_code)


def _usage(error: click.UsageError, path: str) -> str:
    """Return what is wrong with a command line; `path` is that of the command."""
    if isinstance(error, click.NoSuchOption) and error.option_name in MERGEKIT_OPTIONS:
        instead = MERGEKIT_OPTIONS[error.option_name]
        return f"{error.option_name} is an option of mergekit; here {instead}."
    return f"{error.format_message()} See {path} --help."


def _echo_error(message: str) -> None:
    click.echo(f"della-dist: {paragraph(message)}", err=True)


def failures(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into one paragraph on stderr and the exit status of their class.

    Gives the command the options that say how much is shown, and tells it `quiet`.
    """

    @click.option(
        "-q", "--quiet", is_flag=True, help="Show errors alone: the exit status tells the rest."
    )
    @click.option("-v", "--verbose", is_flag=True, help="Show every step, worker and shard.")
    @click.option("--debug", is_flag=True, help="Show that, tracebacks, and what led to a failure.")
    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, verbose: bool, debug: bool, **kwargs: Any) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other; leave one out.")
        # Imports make hundreds of thousands of objects that stay: not worth looking at so often.
        gc.set_threshold(100_000)
        _interrupt_on_signals()
        _let_watchers_die()
        level = logging.DEBUG if verbose else logging.INFO
        level = run_log.HISTORY if debug else level
        try:
            _check_address_space()
            with run_log.lines_to(_say, run_log.NOTHING if quiet else level):
                command(*args, quiet=quiet, **kwargs)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                click.echo(masked(traceback.format_exc()), err=True, nl=False)
            status, message = failure_of(error)
            _echo_error(message)
            sys.exit(status)
        else:
            if (loss := _loss()) is not None:  # of words about work that is done
                _echo_error(f"done, but {loss}")
        finally:
            # The interpreter's last garbage collection would look at every object of Numba's.
            gc.freeze()

    return wrapped


def _say(line: str) -> None:
    click.echo(line, err=True)


def logged(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that merges ``--log-json``, which writes down what happens."""

    @log_option
    @functools.wraps(command)
    def wrapped(*args: Any, log_json: str | None, **kwargs: Any) -> None:
        with contextlib.ExitStack() as closing:
            if log_json is not None:
                closing.enter_context(run_log.JsonLines(log_json))
            try:
                command(*args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                status, message = failure_of(error)
                kind = type(error)
                named = KeyboardInterrupt if issubclass(kind, KeyboardInterrupt) else kind
                failed = RunFailed(named.__name__, paragraph(message), status)
                run_log.tell(failed, run_log.UNSEEN)  # a person is told in the end
                raise

    return wrapped


log_option = click.option(
    "--log-json",
    type=click.Path(),
    metavar="FILE",
    help="Append a line of JSON to FILE for every event, as it happens.",
)


def _loss() -> str | None:
    """Return what to say if stdout did not take what was written; a reader may go when it likes."""
    failure = streams.lost_output()
    if failure is None or failure.errno == errno.EPIPE:
        return None
    return f"stdout could not be written ({failure.strerror}): what was to be shown is lost."


def check_shown() -> None:
    """Raise if what was printed is lost: the end of commands that are run for that."""
    if (loss := _loss()) is not None:
        raise StorageError(loss)


def _check_address_space() -> None:
    """Raise `ConfigError` where ``ulimit -v`` leaves too little for the libraries."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE:
        raise ConfigError(
            f"this process may have {limit >> 20} MiB of address space (ulimit -v), and the "
            f"libraries alone need {_LEAST_ADDRESS_SPACE >> 20} MiB; input files are mapped "
            "besides. Raise that limit; a cgroup limits the memory itself."
        )


@functools.cache
def _interrupt_on_signals() -> None:
    """Let go of the output on a scheduler's notice or a lost terminal as on Ctrl-C."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # One that whoever started this has set to be ignored (nohup) stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    others = sys.unraisablehook

    def hook(args: sys.UnraisableHookArgs) -> None:
        if isinstance(args.exc_value, _Interrupted):
            # A signal of the system's, which ends a wait as well.
            again = (threading.main_thread().ident, args.exc_value.number)
            threading.Timer(_AGAIN_S, signal.pthread_kill, again).start()
        else:
            others(args)

    # While LLVM compiles, Python runs in its callbacks only, which drop what is raised there: a
    # signal that came meanwhile is raised again when the callback is over.
    sys.unraisablehook = hook


@functools.cache
def _let_watchers_die() -> None:
    """From now on, say nothing of threads of gRPC that die with the channel they watch.

    When Ray Client loses its connection it closes the channel under such a thread, whose traceback
    would come before the error that tells what happened.
    """
    others = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if "Cannot monitor channel state" not in str(args.exc_value):
            others(args)

    threading.excepthook = hook


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(number)


class _Interrupted(KeyboardInterrupt):
    """A signal came; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
