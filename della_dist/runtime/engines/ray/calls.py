"""A function that is called on several actors of a Ray cluster at once."""

from __future__ import annotations

import contextlib
import os
import socket
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

#: So often it is looked whether the cluster is still there.
LOOK_S = 1.0
#: A call whose actor died is made so often in all.
TRIES = 2

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
        free = list(range(min(self.num_fitting, len(arguments))))
        calls: dict[Any, tuple[int, int, int]] = {}
        while waiting or calls:
            while waiting and free:
                (index, number), actor = waiting.pop(0), free.pop(0)
                calls[self._actor(actor).call.remote(arguments[index])] = index, number, actor
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=LOOK_S)
            if missing := self._lifeline.missing():
                raise RunError(
                    f"the Ray cluster is gone: nothing answers at {missing}. Run the same command "
                    "again once there is a cluster: it continues."
                )
            for ref in ready:
                index, number, actor = calls.pop(ref)
                free.append(actor)
                try:
                    result = ray.get(ref)
                except RayError as error:
                    self._forget(actor)
                    if number < TRIES:
                        waiting.append((index, number + 1))
                        continue
                    result = Death(reason_of(error))
                if isinstance(result, _Error):
                    raise result.error
                yield index, result

    def _actor(self, index: int) -> Any:  # noqa: ANN401
        if index not in self._actors:
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
        return self._actors[index]

    def _forget(self, index: int) -> None:
        actor = self._actors.pop(index, None)
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
