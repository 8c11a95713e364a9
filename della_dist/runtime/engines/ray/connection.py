"""The connection of a driver to Ray."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from della_dist.errors import ConfigError, RunError
from della_dist.runtime.budget import available_cores
from della_dist.runtime.engines.ray.address import Lifeline, answers, reason_of, running_cluster
from della_dist.runtime.options import RunOptions

#: Nothing but the plan goes through Ray's object store.
OBJECT_STORE_BYTES = 256 << 20
#: The head of a cluster may be restarted, and is missed for a while (after 60 s Ray ends the
#: process without a word); a node never comes back.
HEAD_AWAY_S = 40.0
NODE_AWAY_S = 5.0
#: How often both are looked for.
PROBE_S = 2.0
#: Ray 2.60 loses about 7 % of the processes that serve ``ray://`` while it forks them
#: (ray-project/ray#63202): a connection is tried so often.
CONNECT_TRIES = 4

log = logging.getLogger("della_dist.run")


def connect(options: RunOptions) -> str:
    """Connect this process to Ray, or start one for this run.

    Returns
    -------
    str
        The address of the cluster; ``local`` for one that this call started.

    Raises
    ------
    ConfigError
        There is no cluster at the address, or the process is connected already.
    RunError
        A cluster answers at a ``ray://`` address, but drops every connection.
    """
    with _own_sigterm():
        return _connect(options)


def _connect(options: RunOptions) -> str:
    if ray.is_initialized():
        raise ConfigError(
            "this process is connected to Ray already; the ray engine makes a connection of its "
            "own. Call ray.shutdown() first."
        )
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = options.address
    if address in (None, "auto"):
        address = running_cluster()
        if address is None and options.address == "auto":
            raise ConfigError(
                "--address auto: no running Ray cluster was found on this machine. Start one "
                "('ray start --head'), give its address, or leave --address out."
            )
    if address in (None, "local"):
        log.info("starting Ray on this machine")
        cpus = options.threads or available_cores()
        ray.init(
            address="local",
            num_cpus=cpus * (options.workers or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )
        return "local"
    if not address.startswith("ray://") and not answers(address):
        raise _unreachable(address, "nothing listens there")
    for _ in range(CONNECT_TRIES):
        reason = _why_dropped(address, quiet)
        if reason is None:
            return address
        log.warning("%s did not take the connection: %s", address, reason)
    raise RunError(
        f"--address {address}: a Ray cluster answers there, but no server for this driver stayed "
        f"alive, tried {CONNECT_TRIES} times ({reason}). Ray's logs on the head node may tell why; "
        "the same command continues."
    )


def _why_dropped(address: str, how: Mapping[str, Any]) -> str | None:
    """Connect to a cluster; return None, or why a cluster that answers dropped the connection."""
    try:
        ray.init(address=address, **how)
    except ConnectionAbortedError as error:
        return reason_of(error)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, reason_of(error)) from error
    return None


def lifeline(address: str) -> Lifeline:
    """Return what to watch of the cluster: its head, and the node that this driver hangs on."""
    if address.startswith("ray://"):  # then the other end of the connection watches
        return Lifeline({}, PROBE_S)
    context = ray.get_runtime_context()
    own = next(n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
    raylet = f"{own['NodeManagerAddress']}:{own['NodeManagerPort']}"
    return Lifeline({context.gcs_address: HEAD_AWAY_S, raylet: NODE_AWAY_S}, PROBE_S)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM: Ray puts one there that ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _unreachable(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--address {address}: no Ray cluster answers there ({reason}). Check the address, and "
        "that the cluster runs the same version of Ray and Python."
    )
