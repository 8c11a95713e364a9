"""Whether a cluster is still there."""

from __future__ import annotations

import socket
import time

from della_dist.runtime.cluster_address import Lifeline, answers


def test_a_process_that_goes_away_is_missed_after_a_while() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as there,
        socket.create_server(("127.0.0.1", 0)) as goes,
    ):
        stays, leaves = (f"127.0.0.1:{s.getsockname()[1]}" for s in (there, goes))
        lifeline = Lifeline({stays: 0.2, leaves: 0.2}, 0.05)
        assert lifeline.holds()
        time.sleep(0.3)
        assert lifeline.missing() is None
        goes.close()
        assert not lifeline.holds()
        assert lifeline.missing() is None  # it may come back
        time.sleep(0.3)
        assert lifeline.missing() == leaves
        assert answers(stays)


def test_what_is_no_address() -> None:
    assert not answers("nowhere")
    assert Lifeline({}, 1).holds()
