"""A function that is called on several actors of a Ray cluster at once."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from della_dist.errors import DellaDistError, FaultError, RunError
from della_dist.report.failures import fault_message
from della_dist.runtime.engines.ray.address import reason_of
from della_dist.runtime.engines.ray.answers import Death
from della_dist.runtime.engines.ray.connection import connect, lifeline
from della_dist.runtime.engines.ray.sizing import BASELINE_BYTES, pool_shape
from della_dist.runtime.options import MAX_PARALLEL, RunOptions
from della_dist.wording import plural

#: So often it is looked whether the cluster is still there.
LOOK_S = 1.0
#: Actors that have no room after this are spoken of.
SAY_S = 10.0
#: A call whose actor died is made so often in all.
TRIES = 2

log = logging.getLogger("della_dist.run")

_ray: Any = ray  # its stubs do not know that actors have options

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Error:
    """In the place of an answer: the function raised it."""

    error: DellaDistError


class _Actor(Generic[A, R]):
    """Makes the function when it is called first, in the driver's working directory."""

    def __init__(self, make: Callable[[], Callable[[A], R]], directory: str) -> None:
        with contextlib.suppress(OSError):  # there may be none; paths from / on work all the same
            os.chdir(directory)
        self._make = make
        self._function: Callable[[A], R] | None = None

    def is_ready(self) -> bool:
        """Answer, which an actor without room does not."""
        return True

    def call(self, argument: A) -> R | _Error:
        """Call the function."""
        try:
            if self._function is None:
                self._function = self._make()
            return self._function(argument)
        except DellaDistError as error:
            return _Error(error)
        except (OSError, MemoryError) as error:
            return _Error(RunError(f"{socket.gethostname()}: {type(error).__name__}: {error}"))
        except Exception as error:
            host = f"which the log of the worker on {socket.gethostname()} has"
            return _Error(FaultError(fault_message(error, host)))


class Calls(Generic[A, R]):
    """Actors that have a function each. A context manager.

    Connects to a cluster, or starts one on this machine for as long as it is open.

    Parameters
    ----------
    make
        Called in every actor with an index of its own and how it is to run there; returns the
        function.
    options
        Of the run: where the cluster is, and how large actors are.

    Raises
    ------
    ConfigError
        If there is no cluster at the address, or it has nothing that can run an actor.
    RunError
        If a cluster answers there, but drops every connection.
    """

    def __init__(
        self, make: Callable[[int, RunOptions], Callable[[A], R]], options: RunOptions
    ) -> None:
        self._make, self._options = make, options
        address = connect(options)
        try:
            self._lifeline = lifeline(address)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._shape = pool_shape(options, MAX_PARALLEL, nodes)
        except BaseException:
            ray.shutdown()
            raise
        self._actors: dict[int, Any] = {}
        #: Of actors that may have no room yet: what there is once they have.
        self._starting: dict[Any, int] = {}
        self._is_said = False

    @property
    def num_fitting(self) -> int:
        """How many actors were asked for, or else have room."""
        return self._shape.num_workers

    def map(self, arguments: Sequence[A]) -> Iterator[tuple[int, R | Death]]:
        """Call the function for each argument, as many at once as there are actors.

        Yields
        ------
        index, result
            As they come. An argument with which actors died twice has their death.

        Raises
        ------
        DellaDistError
            What the function raised.
        RunError
            If the cluster is gone.
        """
        waiting = [(i, 1) for i in range(len(arguments))]
        free = sorted(self._actors.keys() - self._starting.values())
        calls: dict[Any, tuple[int, int, int]] = {}
        started_s, num_failed = time.monotonic(), 0
        while waiting or calls:
            while waiting and free:
                (index, number), actor = waiting.pop(0), free.pop(0)
                calls[self._actors[actor].call.remote(arguments[index])] = index, number, actor
            # A cluster may have no room for all of them: those that there are take every call.
            if waiting:
                self._start(min(self.num_fitting, len(waiting) + len(calls)))
            ready, _ = ray.wait([*calls, *self._starting], num_returns=1, timeout=LOOK_S)
            if missing := self._lifeline.missing():
                raise RunError(
                    f"the Ray cluster is gone: nothing answers at {missing}. Run the same command "
                    "again once there is a cluster: it continues."
                )
            if waiting and self._starting and time.monotonic() - started_s > SAY_S:
                self._say_missing()
            for ref in ready:
                if ref in self._starting:
                    actor = self._starting.pop(ref)
                    try:
                        ray.get(ref)
                        free.append(actor)
                    except RayError:
                        self._forget(actor)
                        num_failed += 1
                        if num_failed == TRIES * self.num_fitting:
                            raise
                    continue
                index, number, actor = calls.pop(ref)
                try:
                    result = ray.get(ref)
                    free.append(actor)
                except RayError as error:
                    self._forget(actor)
                    if number < TRIES:
                        waiting.append((index, number + 1))
                        continue
                    result = Death(reason_of(error))
                if isinstance(result, _Error):
                    raise result.error
                yield index, result

    def _start(self, count: int) -> None:
        """Ask for actors, until there are so many, with those that still start."""
        for index in range(self.num_fitting):
            if len(self._actors) >= count:
                return
            if index in self._actors:
                continue
            shape = self._shape
            here = replace(
                self._options,
                engine="local",
                address=None,
                workers=None,
                threads=shape.threads,
                # Actors without a GPU of their own leave those of their node alone.
                device=self._options.device if shape.uses_gpu else "cpu",
                gpu_memory=self._options.gpu_memory if shape.uses_gpu else None,
            )
            self._actors[index] = _REMOTE.options(
                num_cpus=shape.threads,
                num_gpus=1 if shape.uses_gpu else 0,
                memory=self._options.memory_bytes + BASELINE_BYTES,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            ).remote(partial(self._make, index, here), str(Path.cwd()))
            self._starting[self._actors[index].is_ready.remote()] = index

    def _say_missing(self) -> None:
        """Say once that not all have started."""
        if self._is_said:
            return
        self._is_said = True
        log.warning(
            "%d of %s have not started: the Ray cluster may have no room for them. Those that have "
            "make all calls until then. Fewer --threads or less --memory make them smaller.",
            len(self._starting),
            plural(len(self._actors), "worker"),
        )

    def _forget(self, index: int) -> None:
        actor = self._actors.pop(index, None)
        self._starting = {ref: i for ref, i in self._starting.items() if i != index}
        # Without its head, or its client's connection, ray.kill would wait, or start a Ray anew.
        if actor is not None and ray.is_initialized() and self._lifeline.holds():
            with contextlib.suppress(ConnectionError):
                ray.kill(actor, no_restart=True)

    def __enter__(self) -> Calls[A, R]:
        return self

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        try:
            for index in list(self._actors):
                self._forget(index)
        finally:
            ray.shutdown()
        if isinstance(exc, RayError | ConnectionError):  # the latter is Ray Client's
            raise RunError(
                f"the Ray cluster failed, or the connection to it ({reason_of(exc)}). Run the same "
                "command again: it continues."
            ) from exc


_REMOTE = _ray.remote(_Actor)
