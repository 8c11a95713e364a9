"""Whether a cluster is still there."""

from __future__ import annotations

import socket
import time

from della_dist.runtime.engines.ray.address import Lifeline, answers, reason_of


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


def test_the_reason_of_a_failed_start_is_the_error() -> None:
    text = (
        "The actor died because of an error raised in its creation task, ray::A.__init__()\n"
        '  File "x.py", line 7, in __init__\n    raise ValueError\n    ^^^^^^^\n'
        "ValueError: first line,\nsecond line"
    )
    assert reason_of(ValueError(text)) == "ValueError: first line, second line"
    assert (
        reason_of(ValueError("It died.\n\tclass_name: A\n\tpid: 3\nKilled.")) == "It died. Killed."
    )
